"""FlashAttention-3's functions: signatures, results and return values; a clear error for what FlashCore does not do.

What the arguments do is tested where the functions are that compute: test_flash_attn.py and test_kvcache.py.
"""

import inspect

import pytest
import torch

from flashcore.compat import flash_attn, flash_attn_interface
from flashcore.compat.flash_attn_interface import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
)
from flashcore.errors import InvalidInputError, UnsupportedError
from tests.tolerance import assert_forward, assert_gradients

pytestmark = pytest.mark.filterwarnings("ignore:attention over a cache:flashcore.errors.FlashCoreWarning")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}

# The arguments of FlashAttention-3 (3.0.0), in order, with their defaults.
DESCALES = "q_descale=None, k_descale=None, v_descale=None"
TAIL = (
    f"softmax_scale=None, causal=False, qv=None, {DESCALES}, window_size=(-1, -1), attention_chunk=0, softcap=0.0, "
    "num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False"
)
FLASH_ATTN_3 = {
    "flash_attn_func": f"q, k, v, {TAIL}",
    "flash_attn_qkvpacked_func": (
        f"qkv, softmax_scale=None, causal=False, {DESCALES}, window_size=(-1, -1), attention_chunk=0, softcap=0.0, "
        "deterministic=False, num_heads_q=None, sm_margin=0, return_attn_probs=False"
    ),
    "flash_attn_varlen_func": (
        "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, "
        + TAIL
    ),
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, "
        f"max_seqlen_q=None, rotary_seqlens=None, {DESCALES}, softmax_scale=None, causal=False, window_size=(-1, -1), "
        "attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=0, "
        "pack_gqa=None, sm_margin=0, return_softmax_lse=False"
    ),
    "get_scheduler_metadata": (
        "batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens, "
        "qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None, cache_leftpad=None, "
        "page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1), attention_chunk=0, "
        "has_softcap=False, num_splits=0, pack_gqa=None, sm_margin=0"
    ),
}


def test_signatures():
    assert set(flash_attn_interface.__all__) == set(FLASH_ATTN_3)
    for name, expected in FLASH_ATTN_3.items():
        parameters = inspect.signature(getattr(flash_attn_interface, name)).parameters.values()
        assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
        assert ", ".join(map(str, parameters)) == expected


def inputs(seqlen_q=5, seqlen_k=9, device="cpu", **options):
    dtype = DTYPES[device]
    shapes = (2, seqlen_q, 4, 64), (2, seqlen_k, 2, 64), (2, seqlen_k, 2, 64)
    return [torch.randn(shape, device=device, dtype=dtype, **options) for shape in shapes]


def int32(*numbers, device="cpu"):
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def softcapped(score, *_):
    return 1.5 * torch.tanh(score / 1.5)


@pytest.mark.parametrize("device", DEVICES)
def test_result_lse_and_gradients(device):
    """By position, in FlashAttention-3's order."""
    q, k, v = inputs(device=device, requires_grad=True)
    call = 0.3, False, None, None, None, None, (3, 1), 0, 1.5, 1, None, False, 0
    features = {"scale": 0.3, "window": (3, 1), "score": softcapped}
    out, lse = flash_attn_func(q, k, v, *call, True)
    assert_forward(out.detach(), lse.detach(), q, k, v, **features)
    dout = torch.randn_like(out)
    assert_gradients(torch.autograd.grad(out, (q, k, v), dout), q, k, v, dout, **features)
    out = flash_attn_func(q, k, v, *call)
    assert_forward(out.detach(), None, q, k, v, **features)


@pytest.mark.parametrize("seqlen_k", [0, 2, 5])
def test_lse_of_a_query_without_a_key_is_negative(seqlen_k):
    q, k, v = inputs(5, seqlen_k)
    out, lse = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert lse[:, :, : 5 - seqlen_k].isneginf().all()  # assert_forward says the same of each
    assert_forward(out, lse, q, k, v, causal=True)


@pytest.mark.parametrize("num_heads_q", [None, 4])
def test_qkvpacked(num_heads_q):
    qkv = torch.randn(2, 7, 3, 4, 64, requires_grad=True)
    q, k, v = qkv.detach().unbind(2)
    out, lse = flash_attn_qkvpacked_func(
        qkv, 0.3, True, None, None, None, (3, -1), 0, 1.5, False, num_heads_q, 0, True
    )
    features = {"causal": True, "scale": 0.3, "window": (3, None), "score": softcapped}
    assert_forward(out.detach(), lse.detach(), q, k, v, **features)
    dout = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, qkv, dout)
    assert_gradients(grad.unbind(2), q, k, v, dout, **features)


def test_qkvpacked_of_grouped_heads():
    qkv = torch.randn(2, 7, 8, 64, requires_grad=True)
    q, k, v = (qkv.detach()[:, :, heads] for heads in (slice(4), slice(4, 6), slice(6, 8)))
    out = flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=4)
    assert_forward(out.detach(), None, q, k, v, causal=True)
    dout = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, qkv, dout)
    assert_gradients(grad.split((4, 2, 2), dim=2), q, k, v, dout, causal=True)


@pytest.mark.parametrize(
    ("shape", "num_heads_q", "message"),
    [
        (
            (2, 7, 7, 16),
            4,
            r"num_heads_q \+ 2 \* heads_k, head_dim\) .* \(given \(2, 7, 7, 16\), num_heads_q=4",
        ),
        ((2, 7, 4, 16), 4, "with 1 head of each or more"),
        ((2, 7, 4, 16), 0, "with 1 head of each or more"),
        ((2, 7, 8, 16), None, r"qkv must be \(batch, seqlen, 3, heads, head_dim\)"),
        ((2, 7, 2, 4, 16), 4, r"qkv must be \(batch, seqlen, 3, heads, head_dim\)"),
        ((2, 7, 3, 4, 16), 8, r"num_heads_q=8 contradicts qkv \(2, 7, 3, 4, 16\), which has 4 heads"),
    ],
)
def test_what_is_not_packed(shape, num_heads_q, message):
    with pytest.raises(InvalidInputError, match=f"flash_attn_qkvpacked_func: .*{message}"):
        flash_attn_qkvpacked_func(torch.randn(shape), num_heads_q=num_heads_q)


@pytest.mark.parametrize("device", DEVICES)
def test_varlen(device):
    """By position, in FlashAttention-3's order: the numbers of rows that are used come before the scale."""
    offsets_q, offsets_k = int32(0, 5, 5, 12, device=device), int32(0, 9, 11, 14, device=device)
    used_q, used_k = int32(3, 0, 7, device=device), int32(9, 1, 2, device=device)
    (q,), (k, v) = (
        [
            torch.randn(rows, heads, 64, device=device, dtype=DTYPES[device]).requires_grad_()
            for _ in range(tensors)
        ]
        for rows, heads, tensors in ((12, 4, 1), (14, 2, 2))
    )
    out, lse = flash_attn_varlen_func(
        q, k, v, offsets_q, offsets_k, 7, 9, used_q, used_k, 0.3, True, return_attn_probs=True
    )
    assert lse.shape == (4, 12)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    features = {"causal": True, "scale": 0.3}
    for rows, keys in (
        (slice(0, 3), slice(0, 9)),
        (slice(5, 12), slice(11, 13)),
    ):  # the latter has queries without a key
        one = q[None, rows], k[None, keys], v[None, keys]
        assert_forward(out[None, rows].detach(), lse[None, :, rows].detach().contiguous(), *one, **features)
        of_one = [grad[None, at] for grad, at in zip(grads, (rows, keys, keys), strict=True)]
        assert_gradients(of_one, *(t.detach() for t in one), dout[None, rows], **features)
    assert not out[3:5].any()
    without_lse = flash_attn_varlen_func(q, k, v, offsets_q, offsets_k, 7, 9, used_q, used_k, 0.3, True)
    torch.testing.assert_close(without_lse, out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("packed", [False, True])
def test_kvcache_in_pages(packed, device):
    """Three new tokens of each sequence are appended and attend, causally."""
    q, k_new, v_new = inputs(3, 3, device=device)
    k_cache, v_cache = torch.randn(2, 8, 16, 2, 64, device=device, dtype=q.dtype)
    table = torch.randperm(8).int().view(2, 4).to(device)
    lengths = 17, 30
    expected = [
        [
            torch.cat((pages[row.long()].flatten(0, 1)[:n], new[b]))[None]
            for pages, new in ((k_cache, k_new), (v_cache, v_new))
        ]
        for b, (row, n) in enumerate(zip(table, lengths, strict=True))
    ]
    call = {"cache_seqlens": int32(*lengths, device=device), "page_table": table, "causal": True}
    tokens = [q, k_new, v_new]
    if packed:
        offsets = int32(0, 3, 6, device=device)
        tokens = [t.flatten(0, 1) for t in tokens]
        call |= {"cu_seqlens_q": offsets, "cu_seqlens_k_new": offsets, "max_seqlen_q": 3}
    out, lse, *splits = flash_attn_with_kvcache(
        tokens[0], k_cache, v_cache, *tokens[1:], **call, return_softmax_lse=True
    )
    assert [(t.shape, t.dtype, t.device) for t in splits] == [((0,), torch.float32, q.device)] * 2
    if packed:
        assert lse.shape == (4, 6)
        out, lse = out.unflatten(0, (2, 3)), lse.unflatten(1, (2, 3)).transpose(0, 1)
    for b, (k, v) in enumerate(expected):
        assert_forward(out[b : b + 1], lse[b : b + 1].contiguous(), q[b : b + 1], k, v, causal=True)
    without_lse = flash_attn_with_kvcache(tokens[0], k_cache, v_cache, *tokens[1:], **call)  # written again
    torch.testing.assert_close(without_lse.view_as(out), out)


def test_kvcache_by_position():
    """Every argument, in FlashAttention-3's order, as flash-attn's function has it by name."""
    q, k, v = inputs(1, 1)
    caches = torch.randn(2, 3, 24, 2, 64)
    angle = torch.randn(24, 8)
    named = {
        "k": k, "v": v, "rotary_cos": angle.cos(), "rotary_sin": angle.sin(), "cache_seqlens": int32(9, 20),
        "cache_batch_idx": int32(2, 0), "cache_leftpad": int32(1, 4), "rotary_seqlens": int32(3, 5),
        "softmax_scale": 0.3, "causal": True, "window_size": (6, -1), "softcap": 1.5, "rotary_interleaved": False,
    }  # fmt: skip
    *first, seqlens, scale, causal, window, softcap, interleaved = named.values()
    *appended, cos, sin, filled, rows, pads = first
    own = (
        *appended, None, cos, sin, filled, rows, pads, None, None, None, None, seqlens, None, None, None, scale, causal,
        window, 0, softcap, interleaved, None, 0, None, 0, True,
    )  # fmt: skip
    mine, theirs = caches.clone(), caches.clone()
    results = flash_attn_with_kvcache(q, *mine, *own)[:2]
    expected = flash_attn.flash_attn_with_kvcache(q, *theirs, **named, return_softmax_lse=True)
    for one, other in zip((*results, mine), (*expected, theirs), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(mine, caches)


def test_hints_change_nothing():
    q, k, v = inputs()
    expected = flash_attn_func(q, k, v)
    assert torch.equal(flash_attn_func(q, k, v, num_splits=4, pack_gqa=True, sm_margin=8), expected)
    metadata = get_scheduler_metadata(2, 5, 9, 4, 2, 64, int32(9, 9), qkv_dtype=q.dtype, causal=True)
    assert (metadata.shape, metadata.dtype) == ((0,), torch.int32)
    hints = {"scheduler_metadata": metadata, "num_splits": 4, "pack_gqa": True, "sm_margin": 8}
    assert torch.equal(flash_attn_with_kvcache(q, k, v, cache_seqlens=9, **hints), expected)


def test_one_graph_of_torch_compile():
    torch.compiler.reset()
    q, k, v = inputs(5, 3)

    def function(q, k, v):
        return flash_attn_func(q, k, v, causal=True, return_attn_probs=True)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for mine, theirs in zip(compiled(q, k, v), function(q, k, v), strict=True):
        torch.testing.assert_close(mine, theirs)


# ---- what is refused ---------------------------------------------------------------------------------------------

CALLS = {
    "flash_attn_func": lambda **options: flash_attn_func(*inputs(), **options),
    "flash_attn_qkvpacked_func": lambda **options: flash_attn_qkvpacked_func(
        torch.randn(2, 7, 3, 4, 16), **options
    ),
    "flash_attn_varlen_func": lambda **options: flash_attn_varlen_func(
        *(t.flatten(0, 1) for t in inputs()), int32(0, 5, 10), int32(0, 9, 18), 5, 9, **options
    ),
    "flash_attn_with_kvcache": lambda **options: flash_attn_with_kvcache(*inputs(), **options),
    "get_scheduler_metadata": lambda **options: get_scheduler_metadata(
        2, 5, 9, 4, 2, 64, int32(9, 9), **options
    ),
}


@pytest.mark.parametrize("function", CALLS)
def test_refuses_by_name(function):
    call, takes = CALLS[function], FLASH_ATTN_3[function]
    call()
    one = torch.ones(2, 2)
    refused = {"qv": one, "q_descale": one, "k_descale": one, "v_descale": one, "attention_chunk": 4}
    for name, value in refused.items():
        if f"{name}=" in takes:
            with pytest.raises(
                UnsupportedError, match=f"{name}(=4)? is not supported: FlashCore does not have"
            ):
                call(**{name: value})
    assert "attention_chunk=" in takes


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_refuses_fp8(dtype):
    q, k, v = (t.to(dtype) for t in inputs())
    given = rf"is {str(dtype).removeprefix('torch.')}: FlashCore does not have FP8 yet\. Cast it"
    with pytest.raises(UnsupportedError, match=f"flash_attn_func: q {given}"):
        flash_attn_func(q, k, v)
    with pytest.raises(UnsupportedError, match=f"flash_attn_func: q {given}"):
        flash_attn_qkvpacked_func(torch.randn(2, 7, 3, 4, 16).to(dtype))
    with pytest.raises(UnsupportedError, match=f"flash_attn_varlen_func: q {given}"):
        flash_attn_varlen_func(q[0], k[0], v[0], int32(0, 5), int32(0, 9), 5, 9)
    with pytest.raises(UnsupportedError, match=f"flash_attn_with_kvcache: k_cache {given}"):
        flash_attn_with_kvcache(q.float(), k, v)
    with pytest.raises(UnsupportedError, match=f"flash_attn_with_kvcache: v {given}"):
        flash_attn_with_kvcache(*inputs(1), k.float()[:, :1], v[:, :1], cache_seqlens=8)
    with pytest.raises(UnsupportedError, match=f"get_scheduler_metadata: qkv_dtype {given}"):
        get_scheduler_metadata(2, 5, 9, 4, 2, 64, int32(9, 9), dtype)


def test_metadata_of_what_is_no_lengths():
    with pytest.raises(
        InvalidInputError, match=r"get_scheduler_metadata: cache_seqlens must be a torch\.Tensor"
    ):
        get_scheduler_metadata(2, 5, 9, 4, 2, 64, 9)
    with pytest.raises(InvalidInputError, match=r"cache_seqlens must be int32 \(batch,\)"):
        get_scheduler_metadata(2, 5, 9, 4, 2, 64, int32(9, 9).long())
