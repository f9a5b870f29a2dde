"""FlashAttention-3's functions, by FlashCore: ``from flashcore.compat.flash_attn_interface import flash_attn_func``.

Names, the order of arguments, defaults, layouts and return values are those of FlashAttention-3's module
``flash_attn_interface`` (3.0.0). The functions of ``flashcore.compat.flash_attn`` compute all of it: their pages say
what more an argument may be. The LSE of a query without a key is -inf here, as in FlashAttention-3, and +inf there;
where no sequence has a key at all, FlashAttention-3 gives +inf, and these -inf.

`qv`, `q_descale`, `k_descale`, `v_descale`, an `attention_chunk` other than 0 and tensors of FP8 raise
UnsupportedError. Hints of how to compute (`num_splits`, `pack_gqa`, `sm_margin`, `scheduler_metadata`) are accepted and
change nothing; nothing else is ignored. FlashAttention-3's ``flash_attn_combine`` is not among them.
"""

from __future__ import annotations

import torch

from flashcore.compat import flash_attn
from flashcore.errors import InvalidInputError, UnsupportedError
from flashcore.sequences import check_numbers

__all__ = [
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]


def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    """Attention of q (batch, seqlen_q, heads_q, head_dim) over k and v (batch, seqlen_k, heads_k, head_dim).

    :param softmax_scale: ``head_dim ** -0.5`` when None.
    :param causal: aligned to the bottom right.
    :param window_size: (left, right), as in :func:`flashcore.compat.flash_attn.flash_attn_func`; -1 or None: all on
        that side.
    :param softcap: ``softcap * tanh(score / softcap)`` takes the place of each scaled score; 0: none.
    :param deterministic: gradients with the same bits each time, as in
        :func:`flashcore.compat.flash_attn.flash_attn_func`.
    :param num_splits: a hint, like `pack_gqa` and `sm_margin`.
    :param return_attn_probs: return (out, softmax_lse): no probabilities. softmax_lse is float32 (batch, heads_q,
        seqlen_q), the natural logarithm; -inf for a query without a key.
    :returns: out (batch, seqlen_q, heads_q, head_dim), or (out, softmax_lse).
    :raises InvalidInputError: arguments that are wrong or contradict each other.
    :raises UnsupportedError: naming the argument that asks for what FlashCore does not do yet: `qv`, `q_descale`,
        `k_descale`, `v_descale`, `attention_chunk` or tensors of FP8.
    """
    _refuse(
        "flash_attn_func", attention_chunk, qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
        q=q, k=k, v=v,
    )  # fmt: skip
    result = flash_attn.flash_attn_func(
        q, k, v, 0.0, softmax_scale, causal, window_size, softcap, None, deterministic, return_lse=return_attn_probs
    )  # fmt: skip
    return _as_fa3(result)


def flash_attn_qkvpacked_func(
    qkv,
    softmax_scale=None,
    causal=False,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    deterministic=False,
    num_heads_q=None,
    sm_margin=0,
    return_attn_probs=False,
):
    """:func:`flash_attn_func` of qkv (batch, seqlen, 3, heads, head_dim), read where it is.

    :param num_heads_q: qkv may then be (batch, seqlen, num_heads_q + 2 * heads_k, head_dim): the heads of q, of k and
        of v, one after the other.
    """
    if num_heads_q is not None and isinstance(qkv, torch.Tensor) and qkv.dim() == 4:
        heads_k, odd = divmod(qkv.shape[2] - num_heads_q, 2)
        if odd or heads_k < 1 or num_heads_q < 1:
            raise InvalidInputError(
                "flash_attn_qkvpacked_func: qkv must be (batch, seqlen, num_heads_q + 2 * heads_k, head_dim) with 1 "
                f"head of each or more (given {tuple(qkv.shape)}, num_heads_q={num_heads_q})."
            )
        q, k, v = qkv.split((num_heads_q, heads_k, heads_k), dim=2)
    else:
        q, k, v = flash_attn.unpack(qkv, "qkv", "batch, seqlen, 3, heads, head_dim")
        if num_heads_q not in (None, q.shape[2]):
            raise InvalidInputError(
                f"flash_attn_qkvpacked_func: num_heads_q={num_heads_q} contradicts qkv {tuple(qkv.shape)}, which has "
                f"{q.shape[2]} heads. Leave it out."
            )
    return flash_attn_func(
        q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap,
        deterministic=deterministic, return_attn_probs=return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    """Attention of the packed sequences q (total_q, heads_q, head_dim) over k and v (total_k, heads_k, head_dim).

    Masks are those of each sequence. See :func:`flash_attn_func` for what is not named here, and
    :func:`flashcore.compat.flash_attn.flash_attn_varlen_func` for how offsets and lengths are read.

    :param cu_seqlens_q: int32 (batch + 1,), on q's device: where each sequence's queries begin, and the end.
    :param cu_seqlens_k: the same of the keys.
    :param max_seqlen_q: an int, how many queries a sequence has at most.
    :param max_seqlen_k: the same of the keys.
    :param seqused_q: int32 (batch,): of a sequence only so many queries, its first, are used; the others give 0.
    :param seqused_k: the same of the keys.
    :returns: out (total_q, heads_q, head_dim), or a tuple of it and softmax_lse, float32 (heads_q, total_q).
    :raises InvalidInputError: arguments that are wrong or contradict each other.
    :raises UnsupportedError: as :func:`flash_attn_func`.
    """
    _refuse(
        "flash_attn_varlen_func", attention_chunk, qv=qv, q_descale=q_descale, k_descale=k_descale,
        v_descale=v_descale, q=q, k=k, v=v,
    )  # fmt: skip
    result = flash_attn.flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale, causal, window_size,
        softcap, None, deterministic, seqused_q=seqused_q, seqused_k=seqused_k, return_lse=return_attn_probs,
    )  # fmt: skip
    return _as_fa3(result)


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    qv=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    page_table=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    max_seqlen_q=None,
    rotary_seqlens=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
    return_softmax_lse=False,
):
    """Attention of q (batch, seqlen_q, heads_q, head_dim) over a cache, to which k and v are first appended in place.

    Caches, lengths, tables, rotary embedding and packed queries are as in
    :func:`flashcore.compat.flash_attn.flash_attn_with_kvcache`. No gradient comes from it. See :func:`flash_attn_func`
    for the rest.

    :param k_cache: (batch_cache, capacity, heads_k, head_dim), or with `page_table` (pages, page_size, heads_k,
        head_dim).
    :param v_cache: (batch_cache, capacity, heads_k, head_dim_v) or (pages, page_size, heads_k, head_dim_v).
    :param k: (batch, new, heads_k, head_dim), or (total_new, heads_k, head_dim) with `cu_seqlens_k_new`. With `v` and
        `cache_seqlens`, or not at all.
    :param v: (batch, new, heads_k, head_dim_v) or (total_new, heads_k, head_dim_v).
    :param cache_seqlens: how many positions were filled before the call: int32 (batch,), or an int; None: all.
    :param page_table: int32 (batch, max_pages), which flash_attn_with_kvcache of FlashAttention-2 calls `block_table`.
    :param cu_seqlens_q: int32 (batch + 1,): q is packed, (total_q, heads_q, head_dim). With `max_seqlen_q`.
    :param num_splits: a hint, like `pack_gqa`, `sm_margin` and `scheduler_metadata`.
    :param return_softmax_lse: return (out, softmax_lse, out_accum, softmax_lse_accum). The last two are where
        FlashAttention-3 has the results of its splits, and empty, as they are there without splits.
    :returns: out (batch, seqlen_q, heads_q, head_dim_v), or a tuple as above with softmax_lse, float32 (batch, heads_q,
        seqlen_q). Of packed queries they are (total_q, heads_q, head_dim_v) and (heads_q, total_q).
    :raises InvalidInputError: arguments that are wrong or contradict each other; more is appended than the host knows
        room for.
    :raises UnsupportedError: as :func:`flash_attn_func`.
    """
    _refuse(
        "flash_attn_with_kvcache", attention_chunk, qv=qv, q_descale=q_descale, k_descale=k_descale,
        v_descale=v_descale, q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v,
    )  # fmt: skip
    result = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, None,
        softmax_scale, causal, window_size, softcap, rotary_interleaved, return_softmax_lse=return_softmax_lse,
        page_table=page_table, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q,
        cu_seqlens_k_new=cu_seqlens_k_new, rotary_seqlens=rotary_seqlens,
    )  # fmt: skip
    if not return_softmax_lse:
        return result
    return (*_as_fa3(result), *(q.new_empty(0, dtype=torch.float32) for _ in range(2)))


def get_scheduler_metadata(
    batch_size,
    max_seqlen_q,
    max_seqlen_k,
    num_heads_q,
    num_heads_kv,
    headdim,
    cache_seqlens,
    qkv_dtype=torch.bfloat16,
    headdim_v=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    cache_leftpad=None,
    page_size=None,
    max_seqlen_k_new=0,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    has_softcap=False,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
):
    """An empty tensor for :func:`flash_attn_with_kvcache`'s `scheduler_metadata`, since FlashCore plans by itself.

    A program that asks for a schedule and hands it on runs as it is. The arguments describe the call to come; those not
    named here are not looked at.

    :param cache_seqlens: int32 (batch,).
    :param qkv_dtype: not of FP8.
    :param attention_chunk: 0.
    :returns: an empty int32 tensor (0,) on the device of `cache_seqlens`.
    :raises InvalidInputError: `cache_seqlens` is not that.
    :raises UnsupportedError: the call would raise it for `qkv_dtype` or `attention_chunk`.
    """
    function = "get_scheduler_metadata"
    _refuse(function, attention_chunk)
    _refuse_fp8(function, "qkv_dtype", qkv_dtype)
    check_numbers(f"{function}: cache_seqlens", cache_seqlens, "(batch,)")
    return cache_seqlens.new_empty(0)


def _as_fa3(result):
    """`result` with FlashAttention-3's sign in the LSE of a query without a key."""
    if not isinstance(result, tuple):
        return result
    out, lse = result
    return out, lse.masked_fill(lse.isposinf(), -torch.inf)


def _refuse(
    function: str, attention_chunk, *, qv=None, q_descale=None, k_descale=None, v_descale=None, **tensors
):
    """Raise UnsupportedError for what FlashAttention-3 has and FlashCore has not."""
    use = "Leave it out, or use FlashAttention-3's own function."
    if attention_chunk != 0:
        raise UnsupportedError(
            f"{function}: attention_chunk={attention_chunk} is not supported: FlashCore does not have attention in "
            "chunks yet. Pass 0, or use FlashAttention-3's own function."
        )
    if qv is not None:
        raise UnsupportedError(
            f"{function}: qv is not supported: FlashCore does not have queries of values yet. {use}"
        )
    for name, scale in (("q_descale", q_descale), ("k_descale", k_descale), ("v_descale", v_descale)):
        if scale is not None:
            raise UnsupportedError(
                f"{function}: {name} is not supported: FlashCore does not have FP8 yet. {use}"
            )
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor):
            _refuse_fp8(function, name, tensor.dtype)


def _refuse_fp8(function: str, name: str, dtype) -> None:
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize == 1:
        raise UnsupportedError(
            f"{function}: {name} is {str(dtype).removeprefix('torch.')}: FlashCore does not have FP8 yet. Cast it to "
            "bfloat16 or float16, or use FlashAttention-3's own function."
        )
