"""flash-attn's functions: its signatures, results and return values; a clear error for what FlashCore does not do."""

import inspect
import re

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


@pytest.mark.parametrize("window", [(-1, -1), (None, None), [-1, None], (8, 4), (4096, -1)])
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


REFUSED = {
    "dropout_p": (0.1, "dropout_p=0.1 .* does not have dropout"),
    "window_size": ((3, 3), r"window_size=\(3, 3\) .* sliding windows"),
    "softcap": (30.0, "softcap=30.0 .* softcapped scores"),
    "alibi_slopes": (torch.ones(4), "alibi_slopes .* ALiBi"),
    "s_aux": (torch.ones(4), "s_aux .* attention sinks"),
    "learnable_sink": (torch.ones(4), "learnable_sink.* attention sinks"),
    "sinks": (torch.ones(4), "sinks.* attention sinks"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_it_does_not_do(name):
    value, message = REFUSED[name]
    with pytest.raises(UnsupportedError, match=message):
        flash_attn_func(*inputs(), **{name: value})


def test_refuses_windows_on_either_side():
    for window, instead in (
        ((4, 0), "(-1, 0)"), ((7, -1), "(-1, -1)"), ((-1, 3), "(-1, -1)"), ((0, 0), "(-1, 0)"), ((None, 2), "(-1, -1)"),
    ):  # fmt: skip
        with pytest.raises(UnsupportedError, match=f"sliding windows yet. Pass {re.escape(instead)},"):
            flash_attn_func(*inputs(), window_size=window)
    with pytest.raises(UnsupportedError, match=r"Pass \(-1, 0\),"):
        flash_attn_func(*inputs(), causal=True, window_size=(7, -1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "window",
    [
        (None, -5), (-5, None), (-2, 0), (0, -2), (-1, -(2**40)), (True, -1), (-1, False), (-1.0, -1), (3.5, 0),
        ("-1", -1), (torch.tensor(3), -1), (), (-1,), (-1, -1, -1), -1, 0, None, "-1",
        {-1: 0, 0: -1}, torch.tensor([-1, -1]),
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
    for name in ("dropout_p", "window_size", "softcap", "alibi_slopes"):
        value, message = REFUSED[name]
        with pytest.raises(UnsupportedError, match=message):
            packed(*tensors, **{name: value})
    with pytest.raises(UnsupportedError, match="deterministic=True"):
        packed(*(t.requires_grad_() for t in tensors), deterministic=True)


def test_determinism_is_not_promised_for_nothing():
    q, k, v = inputs()
    assert torch.equal(flash_attn_func(q, k, v, deterministic=True), flash_attn_func(q, k, v))
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


def test_functions_that_are_not_there_yet_say_so():
    q = torch.randn(7, 4, 16)
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    with pytest.raises(UnsupportedError, match=r"packed sequences .* not supported yet"):
        flash_attn.flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, 4, 4, causal=True)
    with pytest.raises(UnsupportedError, match="flash_attn_varlen_qkvpacked_func: packed sequences"):
        flash_attn.flash_attn_varlen_qkvpacked_func(torch.stack((q, q, q), 1), cu_seqlens, 4)
    with pytest.raises(UnsupportedError, match="into a batch for flash_attn_kvpacked_func"):
        flash_attn.flash_attn_varlen_kvpacked_func(q, torch.stack((q, q), 1), cu_seqlens, cu_seqlens, 4, 4)
    with pytest.raises(UnsupportedError, match="KV cache is not supported yet"):
        flash_attn.flash_attn_with_kvcache(*inputs(), cache_seqlens=4)


def test_invalid_arguments_are_named():
    q, k, v = inputs()
    with pytest.raises(InvalidInputError, match="k and v must have one seqlen"):
        flash_attn_func(q, k, v[:, 1:])
    with pytest.raises(InvalidInputError, match=r"qkv must be \(batch, seqlen, 3, heads, head_dim\) \(given \(2, 7, 2"):
        flash_attn_qkvpacked_func(torch.randn(2, 7, 2, 4, 16))
    with pytest.raises(InvalidInputError, match=r"kv must be \(batch, seqlen, 2, heads, head_dim\) \(given list"):
        flash_attn_kvpacked_func(q, [k, v])
