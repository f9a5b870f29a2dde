"""flash-attn's functions, computed by FlashCore: ``from flashcore.compat.flash_attn import flash_attn_func``.

Names, the order of positional arguments, defaults, layouts and return values are FlashAttention-2's (2.8). Arguments
that flash-attn calls differently elsewhere may be given by either name (``s_aux``, ``learnable_sink``, ``sinks``;
``block_table``, ``page_table``), and a window's -1 may be None.

Dropout, sliding windows, softcap, ALiBi and sinks raise UnsupportedError, as do packed sequences (varlen) and the KV
cache; nothing is ignored. Where flash-attn wants a GPU and half precision, these take all that
:func:`flashcore.attention` takes.
"""

from __future__ import annotations

import torch

from flashcore import api
from flashcore.errors import InvalidInputError, UnsupportedError

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
):
    """Attention of q (batch, seqlen_q, heads_q, head_dim) over k and v (batch, seqlen_k, heads_k, head_dim).

    :param softmax_scale: ``head_dim ** -0.5`` when None.
    :param causal: aligned to the bottom right. ``window_size=(-1, 0)`` means the same.
    :param deterministic: gradients with the same bits each time. They need
        ``torch.use_deterministic_algorithms(True)``, without which it raises UnsupportedError.
    :param return_attn_probs: return (out, softmax_lse, an empty tensor) like flash-attn, whose probabilities are only
        there with dropout. softmax_lse is float32 (batch, heads_q, seqlen_q), and +inf for a query without a key.
    :param return_lse: return (out, softmax_lse), as FlashAttention-4 does.
    :returns: out (batch, seqlen_q, heads_q, head_dim), or a tuple as above.
    :raises InvalidInputError: arguments that contradict each other.
    :raises UnsupportedError: naming the argument that asks for what FlashCore does not do yet.
    """
    sink = next((s for s in (s_aux, learnable_sink, sinks) if s is not None), None)
    _refuse(dropout_p, softcap, alibi_slopes, sink)
    causal = _is_causal(q, k, causal, window_size)
    if deterministic and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        _refuse_nondeterminism()
    if not (return_attn_probs or return_lse):
        return api.attention(q, k, v, causal=causal, scale=softmax_scale)
    out, lse = api.attention(q, k, v, causal=causal, scale=softmax_scale, return_lse=True)
    if k.shape[1] == 0 or (causal and q.shape[1] > k.shape[1]):
        lse = lse.masked_fill(lse.isneginf(), torch.inf)  # flash-attn's sign for a query without a key
    return (out, lse, q.new_empty(0)) if return_attn_probs else (out, lse)


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
    q, k, v = _unpack(qkv, "qkv", "batch, seqlen, 3, heads, head_dim")
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
    k, v = _unpack(kv, "kv", "batch, seqlen, 2, heads, head_dim")
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
    page_table=None,
    return_lse=False,
    s_aux=None,
    learnable_sink=None,
    sinks=None,
):
    """Attention of packed sequences: not there yet.

    :raises UnsupportedError: always.
    """
    raise _no_varlen("flash_attn_varlen_func", "flash_attn_func")


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
    """Attention of packed sequences: not there yet.

    :raises UnsupportedError: always.
    """
    raise _no_varlen("flash_attn_varlen_qkvpacked_func", "flash_attn_qkvpacked_func")


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
    """Attention of packed sequences: not there yet.

    :raises UnsupportedError: always.
    """
    raise _no_varlen("flash_attn_varlen_kvpacked_func", "flash_attn_kvpacked_func")


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
    return_lse=False,
    s_aux=None,
    learnable_sink=None,
    sinks=None,
):
    """Attention over a KV cache: not there yet.

    :raises UnsupportedError: always.
    """
    raise UnsupportedError(
        "flash_attn_with_kvcache: decoding over a KV cache is not supported yet. Call flash_attn_func with the filled "
        "part of the cache, k_cache[:, :length], or use flash-attn's own function."
    )


def _no_varlen(function: str, padded: str) -> UnsupportedError:
    return UnsupportedError(
        f"{function}: packed sequences (cu_seqlens) are not supported yet. Pad them into a batch for {padded}, or call "
        "it once per sequence."
    )


def _is_causal(q: torch.Tensor, k: torch.Tensor, causal, window_size) -> bool:
    """Whether the future is hidden. Raises if the window hides more than that, or a part of it."""
    left, right = _window(window_size)
    right = 0 if causal else right
    # The last query is aligned to the last key, and the first one to seqlen_q - 1 keys before it.
    hides_past = left is not None and left < k.shape[1] - 1
    hides_future = right is not None and 0 < right < q.shape[1] - 1
    if hides_past or hides_future:
        instead = (-1, 0) if right == 0 else (-1, -1)
        raise _unsupported("sliding windows", f"window_size={tuple(window_size)}", instead)
    return right == 0


def _window(window_size) -> tuple[int | None, int | None]:
    """How many keys to the left and to the right of its own a query sees; None: all of them."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2 or not all(map(_is_size, window_size)):
        raise InvalidInputError(
            f"flash_attn_func: window_size={window_size!r} is not a window. Pass (left, right): two integers, each the "
            "number of keys seen on that side, or -1 or None for all of them."
        )
    left, right = (None if size == -1 else size for size in window_size)
    return left, right


def _is_size(size: object) -> bool:
    return size is None or (isinstance(size, int) and not isinstance(size, bool) and size >= -1)


def _refuse(dropout_p, softcap, alibi_slopes, sink) -> None:
    """Raise if an argument asks for something that FlashCore does not do."""
    for wanted, feature, given, neutral in (
        (dropout_p != 0, "dropout", f"dropout_p={dropout_p}", "0.0"),
        (softcap, "softcapped scores", f"softcap={softcap}", "0.0"),
        (alibi_slopes is not None, "ALiBi", "alibi_slopes", "None"),
        (sink is not None, "attention sinks", "s_aux (learnable_sink, sinks)", "None"),
    ):
        if wanted:
            raise _unsupported(feature, given, neutral)


def _unsupported(feature: str, given: str, instead) -> UnsupportedError:
    return UnsupportedError(
        f"flash_attn_func: {given} is not supported: FlashCore does not have {feature} yet. Pass {instead}, or use "
        "flash-attn's own function."
    )


def _unpack(packed: torch.Tensor, name: str, layout: str) -> tuple[torch.Tensor, ...]:
    """The tensors that `packed` is made of, along its third dimension: as many as stand there in `layout`."""
    count = int(layout.split(", ")[2])
    if not isinstance(packed, torch.Tensor) or packed.dim() != 5 or packed.shape[2] != count:
        given = tuple(packed.shape) if isinstance(packed, torch.Tensor) else type(packed).__name__
        raise InvalidInputError(f"flash_attn_{name}packed_func: {name} must be ({layout}) (given {given}).")
    return packed.unbind(2)


def _refuse_nondeterminism() -> None:
    """Raise unless PyTorch's backward passes, one of which may be ours, are deterministic."""
    # torch.compile cannot trace the second question; PyTorch warns of what is not deterministic when the graph runs.
    warns_only = not torch.compiler.is_compiling() and torch.is_deterministic_algorithms_warn_only_enabled()
    if warns_only or not torch.are_deterministic_algorithms_enabled():
        raise UnsupportedError(
            "flash_attn_func: deterministic=True with gradients needs PyTorch's switch as well, since the backward "
            "pass may be PyTorch's. Call torch.use_deterministic_algorithms(True), or pass deterministic=False."
        )
