"""flash-attn's functions, computed by FlashCore: ``from flashcore.compat.flash_attn import flash_attn_func``.

Names, the order of positional arguments, defaults, layouts and return values are FlashAttention-2's (2.8). Arguments
that flash-attn calls differently elsewhere may be given by either name (``s_aux``, ``learnable_sink``, ``sinks``;
``block_table``, ``page_table``), and a window's -1 may be None.

Packed sequences (varlen) may also say how many of their rows are used, by FlashAttention-3's names (``seqused_q``,
``seqused_k``), and a call over a cache how its queries and new keys are packed (``cu_seqlens_q``,
``cu_seqlens_k_new``). Dropout raises UnsupportedError. Hints of how to compute (FlashAttention-3's ``num_splits``,
``pack_gqa``, ``sm_margin``, ``scheduler_metadata``) are accepted and change nothing; nothing else is ignored. Where
flash-attn wants a GPU and half precision, these take all that :func:`flashcore.attention` takes.
"""

from __future__ import annotations

import torch

from flashcore import api, backends, calls, kv_cache
from flashcore.errors import InvalidInputError, UnsupportedError
from flashcore.problem import check_out, checked_mask, refuse_gradients_of_pages
from flashcore.score import alibi, chained
from flashcore.score import softcap as softcapped
from flashcore.sequences import Packed, Paged

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    *,
    return_lse=False,
    s_aux=None,
    learnable_sink=None,
    sinks=None,
    num_splits=1,
    pack_gqa=None,
    sm_margin=0,
    out=None,
):
    """Attention of q (batch, seqlen_q, heads_q, head_dim) over k and v (batch, seqlen_k, heads_k, head_dim).

    :param softmax_scale: ``head_dim ** -0.5`` when None.
    :param causal: aligned to the bottom right. ``window_size=(-1, 0)`` means the same.
    :param window_size: (left, right): query ``i`` sees the keys from ``i + seqlen_k - seqlen_q - left`` to
        ``i + seqlen_k - seqlen_q + right``, both included; -1 or None: all on that side. With `causal` right is 0.
    :param softcap: ``softcap * tanh(score / softcap)`` takes the place of each scaled score; 0 or None: none.
    :param alibi_slopes: float32 (heads_q,) or (batch, heads_q): ``slope * |i + seqlen_k - seqlen_q - j|`` is subtracted
        from the score of query ``i`` and key ``j``, after `softcap`. They get no gradient.
    :param deterministic: gradients with the same bits each time, which FlashCore's own backward passes give. Where the
        backward pass is PyTorch's (:func:`flashcore.explain` tells), and under torch.compile, they need
        ``torch.use_deterministic_algorithms(True)``, without which it raises UnsupportedError.
    :param return_attn_probs: return (out, softmax_lse, an empty tensor) like flash-attn, whose probabilities are only
        there with dropout. softmax_lse is float32 (batch, heads_q, seqlen_q), of the scores as they are described here
        and with the sinks; +inf for a query without a key and a sink.
    :param return_lse: return (out, softmax_lse), as FlashAttention-4 does.
    :param s_aux: sinks (heads_q,), half precision or float32: ``exp(sink)`` joins the softmax's denominator, as a key
        without a value would. They get a gradient. Also `learnable_sink`, `sinks`.
    :param num_splits: a hint, like `pack_gqa` and `sm_margin`: they say how FlashAttention-3 is to compute, and change
        nothing here.
    :param out: where the output is written, as :func:`flashcore.attention` has it.
    :returns: out (batch, seqlen_q, heads_q, head_dim), or a tuple as above.
    :raises InvalidInputError: arguments that are wrong or contradict each other.
    :raises UnsupportedError: naming the argument that asks for what FlashCore does not do yet.
    """
    sink = _sink("flash_attn_func", q, s_aux=s_aux, learnable_sink=learnable_sink, sinks=sinks)
    return _attend(
        "flash_attn_func", q, k, v, {}, sink, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs, return_lse, out,
    )  # fmt: skip


def _attend(
    function, q, k, v, packed, sink, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
    deterministic, return_attn_probs, return_lse, out,
):  # fmt: skip
    """What `function` returns. `packed`: the arguments that say where packed sequences lie."""
    if dropout_p != 0:
        raise UnsupportedError(
            f"{function}: dropout_p={dropout_p} is not supported: FlashCore does not have dropout yet. Pass 0.0, or "
            "use flash-attn's own function."
        )
    score = chained(
        softcapped(softcap) if softcap else None, None if alibi_slopes is None else alibi(alibi_slopes)
    )
    mask = checked_mask(bool(causal), _window(function, window_size))
    visible = None if mask.left is None and not mask.right else mask.of(*_lengths(q, k, **packed))
    hides = visible is not None and (visible.bounded_left or (mask.right != 0 and visible.bounded_right))
    options = {
        "causal": mask.right == 0,
        "window": (mask.left, mask.right) if hides else None,
        "scale": softmax_scale,
        "score": score,
        "sink": sink,
        **packed,
    }
    if deterministic and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, sink) if t is not None):
        _refuse_nondeterminism(function, q, k, v, options)
    if not (return_attn_probs or return_lse):
        return api.attention(q, k, v, **options, out=out)
    out, lse = api.attention(q, k, v, **options, return_lse=True, out=out)
    if packed or mask.of(q.shape[1], k.shape[1]).empty_rows:
        lse = lse.masked_fill(lse.isneginf(), torch.inf)  # flash-attn's sign for a query without a key
    return (out, lse, q.new_empty(0)) if return_attn_probs else (out, lse)


def _lengths(q, k, queries: Packed | None = None, keys: Packed | None = None) -> tuple[int, int]:
    """Of queries and keys; of packed ones at most."""
    return (q.shape[1], k.shape[1]) if queries is None else (queries.longest, keys.longest)


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """:func:`flash_attn_func` of qkv (batch, seqlen, 3, heads, head_dim), read where it is."""
    q, k, v = unpack(qkv, "qkv", "batch, seqlen, 3, heads, head_dim")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """:func:`flash_attn_func` of q and kv (batch, seqlen_k, 2, heads_k, head_dim), read where they are."""
    k, v = unpack(kv, "kv", "batch, seqlen, 2, heads, head_dim")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )  # fmt: skip


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
    *,
    seqused_q=None,
    seqused_k=None,
    page_table=None,
    return_lse=False,
    s_aux=None,
    learnable_sink=None,
    sinks=None,
    num_splits=1,
    pack_gqa=None,
    sm_margin=0,
    out=None,
):
    """Attention of the packed sequences q (total_q, heads_q, head_dim) over k and v (total_k, heads_k, head_dim).

    Masks and slopes are those of each sequence. See :func:`flash_attn_func` for what is not named here.

    :param cu_seqlens_q: int32 (batch + 1,), on q's device: sequence ``b`` has the queries from ``cu_seqlens_q[b]`` to
        ``cu_seqlens_q[b + 1] - 1``. It is read by the kernels alone: nothing waits for the GPU.
    :param cu_seqlens_k: the same of the keys.
    :param max_seqlen_q: an int, how many queries a sequence has at most. Longer ones are cut off there.
    :param max_seqlen_k: the same of the keys.
    :param seqused_q: int32 (batch,): of a sequence only so many queries, its first, are used; the others give 0.
    :param seqused_k: the same of the keys.
    :param block_table: int32 (batch, max_pages): k and v are caches in pages, (pages, page_size, heads_k, head_dim) and
        (pages, page_size, heads_k, head_dim_v), with pages of 1 row or a multiple of 16, as :class:`flashcore.Paged`
        has them. A sequence has as many keys as `seqused_k` says, or else `cu_seqlens_k`; with the former the latter
        may be None. There is no backward pass. Also `page_table`.
    :returns: out (total_q, heads_q, head_dim), or a tuple of it and softmax_lse, float32 (heads_q, total_q).
    :raises InvalidInputError: arguments that are wrong or contradict each other.
    :raises UnsupportedError: naming the argument that asks for what FlashCore does not do yet.
    """
    function = "flash_attn_varlen_func"
    table = _one(function, block_table=block_table, page_table=page_table)
    if dropout_p is None or isinstance(dropout_p, torch.Tensor):
        raise InvalidInputError(
            f"{function}: dropout_p={'None' if dropout_p is None else 'a tensor'}: arguments by position are in "
            "FlashAttention-2's order. Pass seqused_q, seqused_k and what comes after them by name."
        )
    sink = _sink(function, q, s_aux=s_aux, learnable_sink=learnable_sink, sinks=sinks)
    queries = Packed(cu_seqlens_q, max_seqlen_q, seqused_q)
    if table is None:
        keys = Packed(cu_seqlens_k, max_seqlen_k, seqused_k)
    else:
        if cu_seqlens_k is None and seqused_k is None:
            raise InvalidInputError(f"{function}: block_table without the number of keys. Pass seqused_k.")
        keys = Paged(table, cu_seqlens_k.diff() if seqused_k is None else seqused_k, max_seqlen_k)
        kv_cache.check_lengths(function, keys.lengths, kv_cache.capacity_of(k, table))
        kv_cache.check_pages(function, table, keys.lengths, k)
        if out is not None:
            check_out(out, *calls.autocast(q, k, v), *(() if sink is None else (sink,)))
    with torch.set_grad_enabled(torch.is_grad_enabled() and table is None):
        result = _attend(
            function, q, k, v, {"queries": queries, "keys": keys}, sink, dropout_p, softmax_scale, causal, window_size,
            softcap, alibi_slopes, deterministic, return_attn_probs, return_lse, out,
        )  # fmt: skip
    inputs = q, k, v, sink
    if table is None or not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)):
        return result
    return _OfPages.apply(*inputs, *result) if isinstance(result, tuple) else _OfPages.apply(*inputs, result)[0]


class _OfPages(torch.autograd.Function):
    """Ties results over pages to the inputs, as flash-attn does: it is their backward pass that raises."""

    @staticmethod
    def forward(ctx, q, k, v, sink, *results):
        return tuple(result.view_as(result) for result in results)

    @staticmethod
    def backward(ctx, *_):
        refuse_gradients_of_pages()


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """:func:`flash_attn_varlen_func` of qkv (total, 3, heads, head_dim), read where it is."""
    q, k, v = unpack(qkv, "varlen_qkv", "total, 3, heads, head_dim")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """:func:`flash_attn_varlen_func` of q and kv (total_k, 2, heads_k, head_dim), read where they are."""
    k, v = unpack(kv, "varlen_kv", "total, 2, heads, head_dim")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
    *,
    page_table=None,
    cu_seqlens_q=None,
    max_seqlen_q=None,
    cu_seqlens_k_new=None,
    rotary_seqlens=None,
    return_lse=False,
    s_aux=None,
    learnable_sink=None,
    sinks=None,
    pack_gqa=None,
    sm_margin=0,
    scheduler_metadata=None,
    out=None,
):
    """Attention of q (batch, seqlen_q, heads_q, head_dim) over a cache, to which k and v are first appended in place.

    No gradient comes from it, as in flash-attn. See :func:`flash_attn_func` for what is not named here; seqlen_k is a
    sequence's length, with what is appended and without its `cache_leftpad`. Lengths and tables on the device are never
    read back: CUDA graphs replay with new ones. Lengths beyond the cache's capacity are cut off there, and what is
    appended beyond it is not written (:func:`flashcore.append`); ``FLASHCORE_CHECK_LENGTHS=1`` raises instead, and
    where a sequence is said to have what is no page.

    :param k_cache: (batch_cache, capacity, heads_k, head_dim), any strides; read where it is, if v_cache lies alike.
        With `block_table` (pages, page_size, heads_k, head_dim), read where it is if a page has 1 row or a multiple of
        16, or v_cache lies alike.
    :param v_cache: (batch_cache, capacity, heads_k, head_dim_v) or (pages, page_size, heads_k, head_dim_v).
    :param k: (batch, new, heads_k, head_dim), written from position ``cache_seqlens[b]`` on. With `v` and
        `cache_seqlens`, or not at all.
    :param v: (batch, new, heads_k, head_dim_v).
    :param rotary_cos: (positions, rotary_dim / 2) for as many positions as the capacity or more, with `rotary_sin` and
        `k`: k is rotated by row ``cache_seqlens[b] + i`` before it is written, and so is q with
        `causal` or a window, else each query by row ``cache_seqlens[b]``.
    :param cache_seqlens: how many positions were filled before the call: int32 (batch,) on the device, or an int, for
        which there is a plan of its own where the cache is dense; None: the cache is full.
    :param cache_batch_idx: int32 (batch,): the row of the cache, or of `block_table`, of each sequence, no two the same
        if k is given.
    :param cache_leftpad: int32 (batch,): the first so many positions belong to nobody. Rotary positions count them.
    :param block_table: int32 (batch, max_pages), each row contiguous: position ``p`` of sequence ``b`` is row
        ``p % page_size`` of page ``block_table[b, p // page_size]``. The capacity is ``max_pages * page_size``. Also
        `page_table`.
    :param rotary_interleaved: rotate neighbours, instead of the first half with the second.
    :param num_splits: a hint, like `pack_gqa`, `sm_margin` and `scheduler_metadata`.
    :param return_softmax_lse: also return softmax_lse, float32 (batch, heads_q, seqlen_q). Also `return_lse`.
    :param cu_seqlens_q: int32 (batch + 1,): q is packed, (total_q, heads_q, head_dim), as in
        :func:`flash_attn_varlen_func`. With `max_seqlen_q`.
    :param max_seqlen_q: an int, how many queries a sequence has at most.
    :param cu_seqlens_k_new: int32 (batch + 1,): k and v are packed, (total_new, heads_k, head_dim) and (total_new,
        heads_k, head_dim_v).
    :param rotary_seqlens: int32 (batch,): the first row of rotary_cos for each sequence, where it is not
        `cache_seqlens`.
    :returns: out (batch, seqlen_q, heads_q, head_dim_v), or a tuple as above. Of packed queries they are (total_q,
        heads_q, head_dim_v) and (heads_q, total_q).
    :raises InvalidInputError: arguments that are wrong or contradict each other; more is appended than the host knows
        room for.
    :raises UnsupportedError: naming the argument that asks for what FlashCore does not do yet.
    """
    function = "flash_attn_with_kvcache"
    table = _one(function, block_table=block_table, page_table=page_table)
    sink = _sink(function, q, s_aux=s_aux, learnable_sink=learnable_sink, sinks=sinks)
    if (k is None) != (v is None) or (k is not None and cache_seqlens is None):
        raise InvalidInputError(f"{function}: k, v and cache_seqlens belong together. Pass all three to append.")
    if (rotary_cos is None) != (rotary_sin is None) or (rotary_cos is not None and k is None):
        raise InvalidInputError(f"{function}: rotary_cos and rotary_sin belong together, and need new k and v.")
    if cu_seqlens_k_new is not None and k is None:
        raise InvalidInputError(f"{function}: cu_seqlens_k_new says where new k and v lie. Pass them, too.")
    if (cu_seqlens_q is None) != (max_seqlen_q is None):
        raise InvalidInputError(f"{function}: cu_seqlens_q and max_seqlen_q belong together. Pass both, or neither.")
    queries = None if cu_seqlens_q is None else Packed(cu_seqlens_q, max_seqlen_q)
    rotary = None if rotary_cos is None else (rotary_cos, rotary_sin)
    mask = checked_mask(bool(causal), _window(function, window_size))
    if table is not None:
        kv_cache.check_table(function, table, k_cache)
    batch, capacity = len(q) if queries is None else queries.batch, kv_cache.capacity_of(k_cache, table)
    new = 0 if k is None or cu_seqlens_k_new is not None else k.shape[1]
    filled = capacity if cache_seqlens is None else cache_seqlens
    on_host = not isinstance(filled, torch.Tensor)
    if on_host and not (isinstance(filled, int) and 0 <= filled <= capacity - new):
        raise InvalidInputError(
            f"{function}: cache_seqlens must be an int32 tensor, or an int from 0 to {capacity - new}, so that the new "
            f"positions ({new}) fit into the cache's capacity, {capacity} (given {filled!r})."
        )
    for name, numbers in (
        ("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad), ("rotary_seqlens", rotary_seqlens),
    ):  # fmt: skip
        if numbers is not None:
            kv_cache.check_integers(f"{function}: {name}", numbers, batch, q.device)
    if rotary_seqlens is not None and rotary_cos is None:
        raise InvalidInputError(f"{function}: rotary_seqlens needs rotary_cos and rotary_sin.")
    by_views = on_host and queries is None and all(
        given is None for given in (table, cache_batch_idx, cache_leftpad, cu_seqlens_k_new)
    )  # fmt: skip
    with torch.no_grad():
        if out is not None:
            check_out(out, *calls.autocast(q, k_cache, v_cache))
        into = out if out is None or by_views or queries is not None else out.flatten(0, 1)
        if k is not None:
            before = q.new_full((batch,), filled, dtype=torch.int32) if on_host else filled
            if rotary is not None:
                kv_cache.check_rotary(function, rotary, k_cache, capacity)
                first = before if rotary_seqlens is None else rotary_seqlens
                masked = any(side is not None and side < capacity for side in (mask.left, mask.right))
                q = _rotated(q, cu_seqlens_q, rotary, first, rotary_interleaved, step=1 if masked else 0)
                k = _rotated(k, cu_seqlens_k_new, rotary, first, rotary_interleaved)
            kv_cache.append(
                k_cache, v_cache, k, v, before, batch_index=cache_batch_idx, table=table, offsets=cu_seqlens_k_new
            )
            filled = filled + new if cu_seqlens_k_new is None else before + cu_seqlens_k_new.diff()
            if isinstance(filled, torch.Tensor):  # nothing is written behind a negative length
                filled = filled.where(before >= 0, 0)
        if by_views:
            rows_q, k, v, packed = q, k_cache[:, :filled], v_cache[:, :filled], {}
        else:
            if not isinstance(filled, torch.Tensor):
                filled = q.new_full((batch,), filled, dtype=torch.int32)
            kv_cache.check_lengths(function, filled, capacity)
            if table is not None:
                kv_cache.check_pages(function, table, filled, k_cache, cache_batch_idx)
            rows_q, k, v, packed = kv_cache.as_packed(
                q, k_cache, v_cache, filled, leftpad=cache_leftpad, batch_index=cache_batch_idx, table=table,
                queries=queries,
            )  # fmt: skip
        returns_lse = return_softmax_lse or return_lse
        result = _attend(
            function, rows_q, k, v, packed, sink, 0.0, softmax_scale, causal, window_size, softcap, alibi_slopes, False,
            False, returns_lse, into,
        )  # fmt: skip
    if not packed or queries is not None:
        return result
    flat, lse = result if returns_lse else (result, None)
    out = flat.view(*q.shape[:3], v.shape[-1]) if out is None else out
    return (out, lse.view(q.shape[2], *q.shape[:2]).transpose(0, 1).contiguous()) if returns_lse else out


def _rotated(x, offsets, rotary, first, interleaved: bool, step: int = 1) -> torch.Tensor:
    """x, whose sequence b is rotated by the rows ``first[b] + step * i``."""
    sequence, index = kv_cache.members(x, offsets)
    return kv_cache.rotate(x, rotary, first[sequence] + step * index, interleaved)


def _window(function: str, window_size) -> tuple[int | None, int | None]:
    """How many keys to the left and to the right of its own a query sees; None: all of them."""
    if isinstance(window_size, torch.Tensor) and window_size.device.type == "cpu":  # as flash-attn's own tests have it
        window_size = window_size.tolist()
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2 or not all(map(_is_size, window_size)):
        raise InvalidInputError(
            f"{function}: window_size={window_size!r} is not a window. Pass (left, right): two integers, each the "
            "number of keys seen on that side, or -1 or None for all of them."
        )
    left, right = (None if size == -1 else size for size in window_size)
    return left, right


def _is_size(size: object) -> bool:
    return size is None or (isinstance(size, int) and not isinstance(size, bool) and size >= -1)


def _sink(function: str, q: torch.Tensor, **given) -> torch.Tensor | None:
    """The sinks, by whichever name, in a dtype that they may have beside q."""
    sink = _one(function, **given)
    if isinstance(sink, torch.Tensor) and sink.dtype in (torch.bfloat16, torch.float16) and sink.dtype != q.dtype:
        return sink.float()
    return sink


def _one(function: str, **given):
    """An argument by whichever name."""
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise InvalidInputError(f"{function}: {' and '.join(names)} name the same argument. Pass one of them.")
    return given[names[0]] if names else None


def unpack(packed: torch.Tensor, name: str, layout: str) -> tuple[torch.Tensor, ...]:
    """The tensors that `packed` is made of, along the dimension whose size stands in `layout`."""
    sizes = layout.split(", ")
    dim = next(i for i, size in enumerate(sizes) if size.isdigit())
    if not isinstance(packed, torch.Tensor) or packed.dim() != len(sizes) or packed.shape[dim] != int(sizes[dim]):
        given = tuple(packed.shape) if isinstance(packed, torch.Tensor) else type(packed).__name__
        argument = name.removeprefix("varlen_")
        raise InvalidInputError(f"flash_attn_{name}packed_func: {argument} must be ({layout}) (given {given}).")
    return packed.unbind(dim)


def _refuse_nondeterminism(function: str, q, k, v, options) -> None:
    """Raise unless the backward pass is one of FlashCore's own, or PyTorch has been told to be deterministic."""
    if not torch.compiler.is_compiling():  # which cannot trace the plan, nor whether PyTorch would only warn;
        backward = api.explain(q, k, v, **options).backward
        if backward is None or backward.backend in (*backends.ATTENTION.providers, "empty"):
            return
        warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    else:
        warns_only = False  # PyTorch warns of what is not deterministic when the graph runs
    if warns_only or not torch.are_deterministic_algorithms_enabled():
        raise UnsupportedError(
            f"{function}: deterministic=True with gradients needs PyTorch's switch as well, since the backward "
            "pass may be PyTorch's. Call torch.use_deterministic_algorithms(True), or pass deterministic=False."
        )
