"""flash-attn's functions: its signatures, results and return values; a clear error for what FlashCore does not do."""

import inspect

import pytest
import torch

import flashcore
from flashcore.compat import flash_attn
from flashcore.compat.flash_attn import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from flashcore.errors import InvalidInputError, UnsupportedError
from tests.tolerance import assert_forward, assert_gradients

# The arguments of FlashAttention 2.8, in order, with their defaults.
TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
FLASH_ATTN = {
    "flash_attn_func": f"q, k, v, {TAIL}",
    "flash_attn_qkvpacked_func": f"qkv, {TAIL}",
    "flash_attn_kvpacked_func": f"q, kv, {TAIL}",
    "flash_attn_varlen_func": (
        f"q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {TAIL}, block_table=None"
    ),
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {TAIL}",
    "flash_attn_varlen_kvpacked_func": f"q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {TAIL}",
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False"
    ),
}


@pytest.mark.parametrize("name", FLASH_ATTN)
def test_signature(name):
    """Positional arguments are flash-attn's; what is ours is a keyword. Transformers reads the signature."""
    parameters = inspect.signature(getattr(flash_attn, name)).parameters.values()
    kinds = {p.kind for p in parameters}
    assert kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    positional = [str(p) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert ", ".join(positional) == FLASH_ATTN[name]
    assert name in flash_attn.__all__


def inputs(seqlen_q=5, seqlen_k=9, heads_k=2, **options):
    shapes = (2, seqlen_q, 4, 16), (2, seqlen_k, heads_k, 16), (2, seqlen_k, heads_k, 16)
    return [torch.randn(shape, **options) for shape in shapes]


def test_result_and_gradients():
    q, k, v = (t.requires_grad_() for t in inputs())
    out = flash_attn_func(q, k, v, 0.0, 0.3, True)
    assert_forward(out.detach(), None, q, k, v, causal=True, scale=0.3)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    assert_gradients(grads, q, k, v, dout, causal=True, scale=0.3)


@pytest.mark.parametrize("window", [(-1, -1), (None, None), [-1, None], (8, 4), (4096, -1), torch.tensor([-1, -1])])
def test_no_window(window):
    q, k, v = inputs()
    assert torch.equal(flash_attn_func(q, k, v, window_size=window), flashcore.attention(q, k, v))


@pytest.mark.parametrize("window", [(-1, 0), (None, 0)])
def test_causal_window(window):
    q, k, v = inputs()
    assert torch.equal(
        flash_attn_func(q, k, v, window_size=window), flashcore.attention(q, k, v, causal=True)
    )


@pytest.mark.parametrize("window", [(-1, -1), (4096, 4096), (8, 3), (-1, 0), (None, None)])
def test_window_that_hides_nothing_beside_the_future(window):
    q, k, v = inputs()
    out = flash_attn_func(q, k, v, causal=True, window_size=window)
    assert torch.equal(out, flashcore.attention(q, k, v, causal=True))


def test_qkvpacked():
    qkv = torch.randn(2, 7, 3, 4, 16, requires_grad=True)
    out = flash_attn_qkvpacked_func(qkv, causal=True)
    expected = flash_attn_func(*qkv.unbind(2), causal=True)
    assert torch.equal(out, expected)
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    (expected_grad,) = torch.autograd.grad(expected.sum(), qkv)
    assert torch.equal(grad, expected_grad)


def test_kvpacked():
    q, k, v = inputs()
    out, lse, _ = flash_attn_kvpacked_func(q, torch.stack((k, v), 2), 0.0, 0.5, return_attn_probs=True)
    assert_forward(out, lse, q, k, v, scale=0.5)


def test_returns_what_flash_attn_returns():
    q, k, v = inputs()
    out, lse, probabilities = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert_forward(out, lse, q, k, v, causal=True)
    assert probabilities.shape == (0,)
    out, lse = flash_attn_func(q, k, v, return_lse=True)
    assert_forward(out, lse, q, k, v)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "empty"), [(5, 2, 3), (5, 0, 5), (5, 5, 0)])
def test_lse_of_a_query_without_a_key(seqlen_q, seqlen_k, empty):
    q, k, v = inputs(seqlen_q, seqlen_k)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert lse[:, :, :empty].isposinf().all()
    assert lse[:, :, empty:].isfinite().all()
    assert not out[:, :empty].any()


@pytest.mark.parametrize(("window", "empty"), [((-1, 0), 3), ((1, 1), 2), ((0, 3), 0), ((2, -1), 0)])
def test_lse_of_a_window_without_a_key(window, empty):
    q, k, v = inputs(5, 2)
    out, lse, _ = flash_attn_func(q, k, v, window_size=window, return_attn_probs=True)
    assert lse[:, :, :empty].isposinf().all()
    assert lse[:, :, empty:].isfinite().all()
    assert not out[:, :empty].any()


# ---- windows, softcap, ALiBi, sinks ------------------------------------------------------------------------------


def definition(q, k, v, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, sink=None):
    """What flash-attn documents, in float64: out (B, Sq, H, D) and lse (B, H, Sq)."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    i = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    j = torch.arange(k.shape[2])[None, :]
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.double()[..., None, None] * (i - j).abs()
    left, right = window_size
    hidden = torch.zeros(q.shape[2], k.shape[2], dtype=torch.bool)
    if causal or right not in (-1, None):
        hidden |= j > i + (0 if causal else right)
    if left not in (-1, None):
        hidden |= j < i - left
    scores = scores.masked_fill(hidden, -1e300)  # a row of these alone is uniform, and not compared
    if sink is not None:
        scores = torch.cat([scores, sink.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=3)
        v = torch.nn.functional.pad(v, (0, 0, 0, 1))
    return (scores.softmax(3) @ v).transpose(1, 2), scores.logsumexp(3)


SLOPES = torch.tensor([0.5, 0.25, 0.7, 0.1])
FEATURES = {
    "window": {"window_size": (2, 1)},
    "left": {"window_size": (2, None)},
    "right": {"window_size": (-1, 2)},
    "own_key": {"window_size": (0, 0)},
    "causal_window": {"window_size": (3, -1), "causal": True},
    "causal_window_to_the_right": {"window_size": (3, 4), "causal": True},
    "softcap": {"softcap": 1.5},
    "softcap_integer": {"softcap": 2, "causal": True},
    "alibi": {"alibi_slopes": SLOPES},
    "alibi_causal": {"alibi_slopes": SLOPES, "causal": True},
    "alibi_of_batches": {"alibi_slopes": torch.stack([SLOPES, 2 * SLOPES])},
    "alibi_of_batches_causal": {"alibi_slopes": torch.stack([SLOPES, 2 * SLOPES]), "causal": True},
    "softcap_before_alibi": {"softcap": 1.5, "alibi_slopes": SLOPES, "window_size": (4, 1)},
}  # fmt: skip
SINKS = ("s_aux", "learnable_sink", "sinks")


@pytest.mark.parametrize("lengths", [(5, 9), (7, 7)])
@pytest.mark.parametrize("sink", [None, *SINKS])
@pytest.mark.parametrize("name", FEATURES)
def test_features(name, sink, lengths):
    features = FEATURES[name]
    tensors = [t.mul_(2).requires_grad_() for t in inputs(*lengths)]
    sinks = torch.tensor([0.3, -1.0, 2.0, 0.0], requires_grad=True) if sink else None
    wanted = [*tensors, *([sinks] if sink else [])]
    options = {sink: sinks} if sink else {}
    out, lse, _ = flash_attn_func(*tensors, **features, **options, return_attn_probs=True)
    expected, expected_lse = definition(*tensors, **features, sink=sinks)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse.detach(), rtol=1e-4, atol=1e-5)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, wanted, dout)
    for grad, truth in zip(grads, torch.autograd.grad(expected, wanted, dout.double()), strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-4, atol=1e-5)
    without_lse = flash_attn_func(*tensors, **features, **options)  # perhaps by another backend
    torch.testing.assert_close(without_lse, out, rtol=1e-4, atol=1e-5)


def test_sinks_of_another_half_precision():
    """flash-attn's sinks are bfloat16, whatever q is."""
    q, k, v = inputs(dtype=torch.float16)
    sinks = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.bfloat16, requires_grad=True)
    out = flash_attn_func(q, k, v, s_aux=sinks)
    torch.testing.assert_close(out.double(), definition(q, k, v, sink=sinks)[0], rtol=5e-3, atol=5e-3)
    (grad,) = torch.autograd.grad(out.float().sum(), sinks)
    assert grad.dtype == torch.bfloat16
    assert grad.any()


def test_sinks_are_the_lse_of_a_query_without_a_key():
    q, k, v = inputs(5, 2)
    out, lse = flash_attn_func(q, k, v, causal=True, sinks=torch.arange(4.0), return_lse=True)
    assert torch.equal(lse[:, :, :3], torch.arange(4.0).view(1, 4, 1).expand(2, 4, 3))
    assert not out[:, :3].any()


@pytest.mark.parametrize("hint", [{"num_splits": 4}, {"pack_gqa": True}, {"sm_margin": 8}])
def test_hints_change_nothing(hint):
    q, k, v = inputs()
    assert torch.equal(flash_attn_func(q, k, v, causal=True, **hint), flash_attn_func(q, k, v, causal=True))


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_refuses_dropout():
    with pytest.raises(UnsupportedError, match=r"dropout_p=0.1 .* does not have dropout"):
        flash_attn_func(*inputs(), dropout_p=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"softcap": -1.0}, "softcap: cap must be a positive number"),
        ({"alibi_slopes": torch.ones(3)}, "dimension of size 3, but there are 4"),
        ({"alibi_slopes": torch.ones(2, 2, 4)}, r"slopes must be a tensor \(heads_q,\)"),
        ({"alibi_slopes": torch.ones(4, dtype=torch.float64)}, "tensors of float32, bfloat16 or float16"),
        ({"alibi_slopes": torch.ones(4, requires_grad=True)}, "requires a gradient, and gets none"),
        ({"sinks": torch.ones(3)}, r"sink must be \(4,\)"),
        ({"sinks": torch.ones(4), "s_aux": torch.ones(4)}, "s_aux and sinks name the same argument"),
    ],
)
def test_invalid_features_are_named(arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        flash_attn_func(*inputs(), **arguments)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "window",
    [
        (None, -5), (-5, None), (-2, 0), (0, -2), (-1, -(2**40)), (True, -1), (-1, False), (-1.0, -1), (3.5, 0),
        ("-1", -1), (torch.tensor(3), -1), (), (-1,), (-1, -1, -1), -1, 0, None, "-1",
        {-1: 0, 0: -1}, torch.tensor([[-1, -1]]),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_a_window(window, causal):
    q, k, v = inputs()
    with pytest.raises(InvalidInputError, match=r"window_size=.* is not a window. Pass \(left, right\)"):
        flash_attn_func(q, k, v, causal=causal, window_size=window)
    with pytest.raises(InvalidInputError, match="is not a window"):
        flash_attn_kvpacked_func(q, torch.stack((k, v), 2), causal=causal, window_size=window)
    with pytest.raises(InvalidInputError, match="is not a window"):
        flash_attn_qkvpacked_func(torch.stack((q, q, q), 2), causal=causal, window_size=window)


@pytest.mark.parametrize("packed", [flash_attn_qkvpacked_func, flash_attn_kvpacked_func])
def test_packed_functions_hand_everything_on(packed):
    tensors = [torch.randn(2, 5, 3, 4, 16)]
    if packed is flash_attn_kvpacked_func:
        tensors = [torch.randn(2, 5, 4, 16), torch.randn(2, 5, 2, 4, 16)]
    parts = tensors[0].unbind(2) if len(tensors) == 1 else (tensors[0], *tensors[1].unbind(2))
    for arguments in FEATURES.values():
        assert torch.equal(packed(*tensors, **arguments), flash_attn_func(*parts, **arguments))
    with pytest.raises(UnsupportedError, match="dropout_p"):
        packed(*tensors, dropout_p=0.1)
    with pytest.raises(UnsupportedError, match="deterministic=True"):
        packed(*(t.requires_grad_() for t in tensors), deterministic=True)


def test_determinism_is_not_promised_for_nothing():
    q, k, v = inputs()
    assert torch.equal(flash_attn_func(q, k, v, deterministic=True), flash_attn_func(q, k, v))
    sinks = torch.zeros(4, requires_grad=True)
    with pytest.raises(UnsupportedError, match="use_deterministic_algorithms"):
        flash_attn_func(q, k, v, sinks=sinks, deterministic=True)
    q.requires_grad_()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pytest.raises(UnsupportedError, match="use_deterministic_algorithms"):
            flash_attn_func(q, k, v, deterministic=True)
        torch.use_deterministic_algorithms(True)
        flash_attn_func(q, k, v, deterministic=True).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert q.grad is not None


@pytest.mark.parametrize("features", [{}, FEATURES["softcap_before_alibi"]])
def test_a_backward_of_our_own_is_deterministic(add_backend, features):
    """The kernels' gradients have the same bits each time; PyTorch's behind the same forward may not."""
    add_backend("fake", backward=lambda problem, config, q, k, v, *_: (q, k, v))
    q, k, v = (t.requires_grad_() for t in inputs())
    flash_attn_func(q, k, v, deterministic=True, **features).sum().backward()
    assert torch.equal(q.grad, q)
    flash_attn_func(q, k[:, :0], v[:, :0], deterministic=True, causal=True)  # gradients of zero
    with flashcore.plan.override(backward="reference-recompute"), pytest.raises(UnsupportedError, match="PyTorch's"):
        flash_attn_func(q, k, v, deterministic=True, **features)


def test_invalid_arguments_are_named():
    q, k, v = inputs()
    with pytest.raises(InvalidInputError, match="k and v must have one seqlen"):
        flash_attn_func(q, k, v[:, 1:])
    with pytest.raises(InvalidInputError, match=r"qkv must be \(batch, seqlen, 3, heads, head_dim\) \(given \(2, 7, 2"):
        flash_attn_qkvpacked_func(torch.randn(2, 7, 2, 4, 16))
    with pytest.raises(InvalidInputError, match=r"kv must be \(batch, seqlen, 2, heads, head_dim\) \(given list"):
        flash_attn_kvpacked_func(q, [k, v])


# ---- packed sequences --------------------------------------------------------------------------------------------

OFFSETS_Q, OFFSETS_K = (torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 5, 12], [0, 9, 11, 18]))


def packed_inputs(**options):
    return [torch.randn(total, heads, 16, **options) for total, heads in ((12, 4), (18, 2), (18, 2))]


def each(q, k, v, function=flash_attn_func, **features):
    """The dense function, a sequence at a time: out (total, H, D) and lse (H, total)."""
    outs, lses = [], []
    for b in range(3):
        (i, j), (m, n) = (offsets[b : b + 2].tolist() for offsets in (OFFSETS_Q, OFFSETS_K))
        slopes = features.get("alibi_slopes")
        own = {"alibi_slopes": slopes[b]} if slopes is not None and slopes.dim() == 2 else {}
        one = (t[None, at] for t, at in ((q, slice(i, j)), (k, slice(m, n)), (v, slice(m, n))))
        out, lse = function(*one, **(features | own), return_lse=True)
        outs.append(out[0]), lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


PACKED_FEATURES = {
    name: {k: v.repeat(2, 1)[:3] if k == "alibi_slopes" and v.dim() == 2 else v for k, v in features.items()}
    for name, features in FEATURES.items()
} | {"plain": {}, "causal": {"causal": True}}


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("name", PACKED_FEATURES)
def test_varlen(name, sinks):
    features = PACKED_FEATURES[name] | ({"sinks": torch.tensor([0.3, -1.0, 2.0, 0.0])} if sinks else {})
    q, k, v = (t.mul_(2).requires_grad_() for t in packed_inputs())
    out, lse, nothing = flash_attn.flash_attn_varlen_func(
        q, k, v, OFFSETS_Q, OFFSETS_K, 7, 9, **features, return_attn_probs=True
    )
    assert nothing.shape == (0,)
    expected, expected_lse = each(q, k, v, **features)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    dout = torch.randn_like(out)
    grads, truths = (torch.autograd.grad(x, (q, k, v), dout) for x in (out, expected))
    for grad, truth in zip(grads, truths, strict=True):
        torch.testing.assert_close(grad, truth)
    without = flash_attn.flash_attn_varlen_func(q, k, v, OFFSETS_Q, OFFSETS_K, 7, 9, **features)
    torch.testing.assert_close(without, out)


def test_varlen_by_position():
    q, k, v = packed_inputs()
    given = 0.0, 0.3, True, (3, -1), 1.5, SLOPES, False, True
    out, lse, _ = flash_attn.flash_attn_varlen_func(q, k, v, OFFSETS_Q, OFFSETS_K, 7, 9, *given)
    features = {"softmax_scale": 0.3, "causal": True, "window_size": (3, -1), "softcap": 1.5, "alibi_slopes": SLOPES}
    for mine, theirs in zip((out, lse), each(q, k, v, **features), strict=True):
        torch.testing.assert_close(mine, theirs)
    kvpacked, _, _ = flash_attn.flash_attn_varlen_kvpacked_func(
        q, torch.stack((k, v), 1), OFFSETS_Q, OFFSETS_K, 7, 9, *given
    )
    assert torch.equal(kvpacked, out)
    qkv = torch.randn(12, 3, 4, 16)
    qkvpacked, _, _ = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, OFFSETS_Q, 7, *given)
    parts = qkv.unbind(1)
    assert torch.equal(
        qkvpacked, flash_attn.flash_attn_varlen_func(*parts, OFFSETS_Q, OFFSETS_Q, 7, 7, *given)[0]
    )


def test_varlen_of_rows_that_are_used():
    """FlashAttention-3's seqused: the others are nobody's."""
    q, k, v = packed_inputs()
    used_q, used_k = (torch.tensor(x, dtype=torch.int32) for x in ([3, 0, 7], [9, 1, 2]))
    call = {"causal": True, "seqused_q": used_q, "seqused_k": used_k}
    out = flash_attn.flash_attn_varlen_func(q, k, v, OFFSETS_Q, OFFSETS_K, 7, 9, **call)
    first = flash_attn_func(q[None, :3], k[None, :9], v[None, :9], causal=True)[0]
    last = flash_attn_func(q[None, 5:], k[None, 11:13], v[None, 11:13], causal=True)[0]
    torch.testing.assert_close(out, torch.cat((first, torch.zeros(2, 4, 16), last)))


def in_pages(k, v, page_size=16):
    """The caches and their table: of each sequence one page of 16 rows, or a page for each row."""
    k_cache, v_cache = (torch.full((30, page_size, *t.shape[1:]), torch.nan) for t in (k, v))
    table = torch.full((3, 16 // page_size), -1, dtype=torch.int32)
    unused = torch.randperm(30, generator=torch.Generator().manual_seed(0)).tolist()
    for b in range(3):
        rows = range(*OFFSETS_K[b : b + 2].tolist())
        for i, row in enumerate(rows):
            slot, place = divmod(i, page_size)
            if place == 0:
                table[b, slot] = unused.pop()
            k_cache[table[b, slot], place], v_cache[table[b, slot], place] = k[row], v[row]
    return k_cache, v_cache, table


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("name", PACKED_FEATURES)
def test_varlen_over_pages(name, page_size):
    """Of as many keys as cu_seqlens_k says, or seqused_k; longer bounds are right as well."""
    features = PACKED_FEATURES[name]
    q, k, v = packed_inputs()
    *caches, table = in_pages(k, v, page_size)
    expected = each(q, k, v, **features)
    varlen = flash_attn.flash_attn_varlen_func
    for offsets_k, used, longest in (
        (OFFSETS_K, None, 9), (OFFSETS_K, None, 500), (None, OFFSETS_K.diff(), 9), (OFFSETS_Q, OFFSETS_K.diff(), 16),
    ):  # fmt: skip
        call = {"seqused_k": used, "return_lse": True, "block_table": table} | features
        for mine, right in zip(varlen(q, *caches, OFFSETS_Q, offsets_k, 7, longest, **call), expected, strict=True):
            torch.testing.assert_close(mine, right)


def test_gradients_over_pages_are_refused_where_they_are_asked_for():
    """As in flash-attn, whose forward pass takes inputs that require one."""
    q, k, v = packed_inputs()
    *caches, table = in_pages(k, v)
    call = OFFSETS_Q, OFFSETS_K, 7, 9
    right = flash_attn.flash_attn_varlen_func(q, *caches, *call, page_table=table)
    assert not right.requires_grad
    for inputs in ((q.requires_grad_(), *caches), (q.detach(), caches[0], caches[1].requires_grad_())):
        out = flash_attn.flash_attn_varlen_func(*inputs, *call, page_table=table)
        assert torch.equal(out, right)
        with pytest.raises(UnsupportedError, match="paged keys have no backward pass"):
            out.sum().backward()
        out, lse, nothing = flash_attn.flash_attn_varlen_func(
            *inputs, *call, page_table=table, return_attn_probs=True
        )
        assert nothing.shape == (0,)
        with pytest.raises(UnsupportedError, match="paged keys have no backward pass"):
            (out.sum() + lse.sum()).backward()
        with torch.no_grad():
            assert not flash_attn.flash_attn_varlen_func(*inputs, *call, page_table=table).requires_grad


def test_varlen_over_pages_in_one_graph():
    q, k, v = packed_inputs()
    *caches, table = in_pages(k, v)
    call = q, *caches, OFFSETS_Q, None, 7, 9
    compiled = torch.compile(flash_attn.flash_attn_varlen_func, backend="aot_eager", fullgraph=True)
    options = {"seqused_k": OFFSETS_K.diff(), "causal": True, "block_table": table}
    torch.testing.assert_close(compiled(*call, **options), flash_attn.flash_attn_varlen_func(*call, **options))


def test_varlen_finds_what_is_no_page(monkeypatch):
    q, k, v = packed_inputs()
    *caches, table = in_pages(k, v)
    table[1] = 30
    monkeypatch.setenv("FLASHCORE_CHECK_LENGTHS", "1")
    with pytest.raises(InvalidInputError, match=r"flash_attn_varlen_func: the table names \[30\]"):
        flash_attn.flash_attn_varlen_func(q, *caches, OFFSETS_Q, OFFSETS_K, 7, 9, block_table=table)


def test_varlen_refuses_by_name():
    arguments = *packed_inputs(), OFFSETS_Q, OFFSETS_K, 7, 9
    varlen = flash_attn.flash_attn_varlen_func
    table = torch.zeros(3, 1, dtype=torch.int32)
    with pytest.raises(InvalidInputError, match="flash_attn_varlen_func: block_table and page_table name the same"):
        varlen(*arguments, block_table=table, page_table=table)
    with pytest.raises(InvalidInputError, match="k of paged sequences must have 4 dimensions"):
        varlen(*arguments, block_table=table)
    with pytest.raises(InvalidInputError, match=r"a page must have 1 row or a multiple of 16 \(given 4"):
        varlen(arguments[0], *(torch.randn(5, 4, 2, 16) for _ in range(2)), *arguments[3:], block_table=table)
    with pytest.raises(UnsupportedError, match=r"flash_attn_varlen_func: dropout_p=0.1"):
        varlen(*arguments, 0.1)
    for used in (None, OFFSETS_Q[1:]):
        with pytest.raises(InvalidInputError, match=r"in FlashAttention-2's order\. Pass seqused_q"):
            varlen(*arguments, used, None, 0.3, True)
    with pytest.raises(InvalidInputError, match="flash_attn_varlen_func: window_size=5 is not a window"):
        varlen(*arguments, window_size=5)
    with pytest.raises(InvalidInputError, match="flash_attn_varlen_func: s_aux and sinks name the same"):
        varlen(*arguments, s_aux=torch.ones(4), sinks=torch.ones(4))
    with pytest.raises(InvalidInputError, match="offsets must be int32"):
        varlen(*arguments[:3], OFFSETS_Q.long(), *arguments[4:])
    with pytest.raises(InvalidInputError, match=r"longest must be an int .*given Tensor"):
        varlen(*arguments[:5], torch.tensor(7), 9)
    with pytest.raises(InvalidInputError, match=r"qkv must be \(total, 3, heads, head_dim\) \(given \(12, 4, 16\)\)"):
        flash_attn.flash_attn_varlen_qkvpacked_func(arguments[0], OFFSETS_Q, 7)
    q, k, v = (t.requires_grad_() for t in arguments[:3])
    with pytest.raises(UnsupportedError, match="flash_attn_varlen_func: deterministic=True with gradients"):
        varlen(q, k, v, *arguments[3:], deterministic=True)
