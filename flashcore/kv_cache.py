"""KV caches of one capacity: new keys and values are appended in place, and attention reads what is filled.

Lengths are on the device and never read back. A cache that lies there is packed keys of which `used` says how much is
filled, so that one plan, and one captured graph, serves all lengths.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch

from flashcore import env
from flashcore.errors import FlashCoreWarning, InvalidInputError
from flashcore.sequences import Packed, Paged


@torch.no_grad()
def append(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    *,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    interleaved: bool = False,
    batch_index: torch.Tensor | None = None,
) -> None:
    """Write new keys and values behind those that a cache has, in place: row ``i`` of `k` at ``lengths[b] + i``.

    It is made of PyTorch's operations, on any device, and waits for none: CUDA graphs capture it, and replays read the
    lengths anew. `lengths` stays as it is; ``lengths += k.shape[1]`` is the caller's. No gradient goes into a cache.

    What would be beyond the capacity is not written, and what is there stays; so it is with a sequence whose length is
    negative or whose `batch_index` is none of the cache. With ``FLASHCORE_CHECK_LENGTHS=1`` these raise, negative
    lengths apart, for which the call waits for the device.

    :param k_cache: (batch_cache, capacity, heads_k, head_dim), any strides.
    :param v_cache: (batch_cache, capacity, heads_k, head_dim_v).
    :param k: (batch, new, heads_k, head_dim), in the cache's dtype. batch is batch_cache without `batch_index`.
    :param v: (batch, new, heads_k, head_dim_v).
    :param lengths: int32 (batch,), on the cache's device: how many positions are filled before the call.
    :param rotary: (cos, sin), each (positions, rotary_dim / 2), for as many positions as the cache has or more: the
        first rotary_dim numbers of each key are rotated by row ``lengths[b] + i``, in float32, before they are written.
    :param interleaved: rotate neighbours, (0, 1), (2, 3) and so on, instead of the first half with the second,
        (0, rotary_dim / 2), (1, rotary_dim / 2 + 1) and so on.
    :param batch_index: int32 (batch,): the cache's row of each sequence; no two are the same.
    :raises InvalidInputError: they are not that; there are more new positions than the cache has.
    """
    _check_new(k_cache, v_cache, k, v)
    _check_integers("lengths", lengths, k)
    (batch, new), (rows, capacity) = k.shape[:2], k_cache.shape[:2]
    if batch_index is None and batch != rows:
        raise InvalidInputError(
            f"append: k has {batch} sequences and the cache {rows}. Pass batch_index, which says where each one's is."
        )
    if new > capacity:
        raise InvalidInputError(f"append: {new} new positions are more than the cache's capacity, {capacity}.")
    check_lengths("append", lengths, capacity - new)
    if rotary is not None:
        check_rotary("append", rotary, k_cache)
        k = rotate(k, rotary, lengths, interleaved)

    own, length = torch.arange(batch, device=k.device), lengths.long()
    row = own
    if batch_index is not None:
        _check_integers("batch_index", batch_index, k)
        known = (batch_index >= 0) & (batch_index < rows)
        if env.check_lengths() and not known.all():
            raise InvalidInputError(f"append: batch_index {batch_index.tolist()} is not all in a cache of {rows} rows.")
        if batch == 0 or rows == 0:
            return
        # Who has no row does again what the first does that has one, so that no place gets two different numbers.
        own = torch.where(known, own, known.int().argmax())
        row = batch_index.long()[own].clamp(0, rows - 1)
        length = torch.where(known[own], length[own], -1)
    own, row, length = own[:, None], row[:, None], length[:, None]
    # As many positions as there are new rows, all inside and none twice: where the cache is too full they begin before
    # its length, and keep what they have up to there.
    position = length.clamp(0, capacity - new) + torch.arange(new, device=k.device)
    source = position - length
    fits = ((length >= 0) & (source >= 0))[..., None, None]
    source = source.clamp(0, max(new - 1, 0))
    for cached, given in ((k_cache, k), (v_cache, v)):
        cached[row, position] = torch.where(fits, given[own, source], cached[row, position])


def rotate(
    x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], first: torch.Tensor, interleaved: bool, step: int = 1
) -> torch.Tensor:
    """x (batch, seqlen, heads, head_dim), rotated by the rows ``first[b] + step * i`` of cos and sin."""
    exact = torch.float64 if x.dtype is torch.float64 else torch.float32
    positions = first.long()[:, None] + step * torch.arange(x.shape[1], device=x.device)
    positions = positions.clamp(0, rotary[0].shape[0] - 1)
    cos, sin = (table[positions].to(exact)[:, :, None] for table in rotary)
    rotated, rest = x.split((2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]), dim=-1)
    rotated = rotated.to(exact)
    a, b = (rotated[..., ::2], rotated[..., 1::2]) if interleaved else rotated.chunk(2, dim=-1)
    pair = a * cos - b * sin, a * sin + b * cos
    rotated = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((rotated.to(x.dtype), rest), dim=-1)


def as_packed(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor,
    leftpad: torch.Tensor | None = None, batch_index: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Packed | Paged]]:  # fmt: skip
    """q, k, v, and which queries and keys they are, for ``attention`` of dense queries over what a cache holds.

    :param lengths: int32 (batch,): how many positions are filled.
    :param leftpad: int32 (batch,): how many of them, the first, belong to nobody.
    :param batch_index: int32 (batch,): the cache's row of each sequence.
    """
    batch, seqlen_q = q.shape[:2]
    if (
        k_cache.dim() != 4 or v_cache.shape[:3] != k_cache.shape[:3] or (batch_index is None and len(k_cache) != batch)
    ):  # fmt: skip
        raise InvalidInputError(
            f"attention over a cache: k_cache and v_cache must be ({batch}, capacity, heads_k, head_dim), as q has "
            f"sequences, and alike but for head_dim (given {tuple(k_cache.shape)} and {tuple(v_cache.shape)})."
        )
    capacity = k_cache.shape[1]
    flat, queries = q.flatten(0, 1), Packed(_offsets(batch, seqlen_q, seqlen_q, q.device), seqlen_q)
    if batch_index is not None:
        rows = batch_index.clamp(0, len(k_cache) - 1)
        in_graph = torch.compiler.is_compiling()  # which takes no pages
        if leftpad is None and capacity and capacity % 16 == 0 and not in_graph:  # a row of the cache is a page
            return flat, k_cache, v_cache, {"queries": queries, "keys": Paged(rows[:, None], lengths, capacity)}
        _warn_of_a_copy("batch_index needs a capacity that is a multiple of 16, and no padding on the left")
        k_cache, v_cache = (cached.index_select(0, rows) for cached in (k_cache, v_cache))
    k, v, apart = _rows(k_cache, v_cache)
    starts = _offsets(batch, apart, capacity, q.device)
    if leftpad is not None:  # a sequence ends where the next begins, or at its length, which is before that
        starts, lengths = starts + torch.nn.functional.pad(leftpad, (0, 1)), lengths - leftpad
    return flat, k, v, {"queries": queries, "keys": Packed(starts, capacity, lengths)}


def _rows(*caches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The caches as (rows, heads, head_dim), and how many rows apart sequences begin. Nothing is copied of a part of
    a larger cache, nor where heads come before positions in memory, as long as both caches lie alike."""
    batch, capacity = caches[0].shape[:2]
    if batch > 1 and all(cached.stride(1) for cached in caches):
        apart = caches[0].stride(0) // caches[0].stride(1)
        if apart > capacity and all(cached.stride(0) == apart * cached.stride(1) for cached in caches):
            rows = (batch - 1) * apart + capacity
            k, v = (cached.as_strided((rows, *cached.shape[2:]), cached.stride()[1:]) for cached in caches)
            return k, v, apart
    k, v = (cached.flatten(0, 1) for cached in caches)
    if batch > 1 < capacity and any(cached.stride(0) != capacity * cached.stride(1) for cached in caches):
        _warn_of_a_copy("keys and values lie differently, or sequences do not begin a whole number of rows apart")
    return k, v, capacity


def _offsets(batch: int, apart: int, longest: int, device: torch.device) -> torch.Tensor:
    """Of sequences that begin every `apart` rows, the last with `longest`."""
    if torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return _new_offsets(batch, apart, longest, device)  # filled when the graph runs, not now
    return _kept_offsets(batch, apart, longest, device)


def _new_offsets(batch: int, apart: int, longest: int, device: torch.device) -> torch.Tensor:
    offsets = torch.arange(batch + 1, dtype=torch.int32, device=device) * apart
    offsets[-1:] -= apart - longest if batch else 0
    return offsets


_kept_offsets = cache(_new_offsets)  # for good: captured graphs read them, and nobody knows which


@cache
def _warn_of_a_copy(why: str) -> None:
    if torch.compiler.is_compiling():
        return
    message = f"attention over a cache: each call copies it first, because {why}."
    warnings.warn(message, FlashCoreWarning, stacklevel=2)


def check_lengths(function: str, lengths: torch.Tensor, most: int) -> None:
    """Where the user asks for it, wait for the device and raise if one is too large."""
    if env.check_lengths() and (lengths > most).any():
        raise InvalidInputError(
            f"{function}: lengths {lengths.tolist()} are not all {most} or less, which is what the cache has room for. "
            "Make it larger, or stop those sequences."
        )


def check_rotary(function: str, rotary: object, k_cache: torch.Tensor) -> None:
    """:raises InvalidInputError: it is not (cos, sin) for each position of the cache."""
    pair = isinstance(rotary, (tuple, list)) and len(rotary) == 2
    if not (pair and all(isinstance(table, torch.Tensor) for table in rotary)):
        raise InvalidInputError(f"{function}: rotary must be (cos, sin), two tensors (given {type(rotary).__name__}).")
    cos, sin = rotary
    capacity, most = k_cache.shape[1], k_cache.shape[3] // 2
    if (
        cos.dim() != 2 or cos.shape != sin.shape or cos.shape[0] < capacity or cos.shape[1] > most
        or not (cos.is_floating_point() and sin.is_floating_point()) or not cos.device == sin.device == k_cache.device
    ):  # fmt: skip
        raise InvalidInputError(
            f"{function}: cos and sin must be floating-point (positions, rotary_dim / 2) on {k_cache.device}, with "
            f"{capacity} positions or more, as the cache has, and rotary_dim / 2 up to {most} (given "
            f"{tuple(cos.shape)} and {tuple(sin.shape)}, {cos.dtype} and {sin.dtype}, {cos.device} and {sin.device})."
        )


def _check_new(k_cache: object, v_cache: object, k: object, v: object) -> None:
    tensors = {"k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4:
            given = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise InvalidInputError(
                f"append: {name} must be a tensor (batch, positions, heads, head_dim) (given {given})."
            )
    if not (
        k_cache.shape[:3] == v_cache.shape[:3] and k.shape[:3] == v.shape[:3]
        and k.shape[2:] == k_cache.shape[2:] and v.shape[2:] == v_cache.shape[2:]
    ):  # fmt: skip
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise InvalidInputError(
            "append: the caches must be alike but for head_dim, so must k and v, and these have the caches' heads and "
            f"head_dim (given {shapes})."
        )
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors.values()}
    if len(kinds) > 1:
        given = ", ".join(f"{name} {tensor.dtype} on {tensor.device}" for name, tensor in tensors.items())
        raise InvalidInputError(
            f"append: new keys and values must have the cache's dtype and device (given {given})."
        )


def _check_integers(name: str, tensor: object, k: torch.Tensor) -> None:
    if (
        not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.int32 or tensor.shape != k.shape[:1]
        or tensor.device != k.device
    ):  # fmt: skip
        given = type(tensor).__name__
        if isinstance(tensor, torch.Tensor):
            given = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        raise InvalidInputError(
            f"append: {name} must be an int32 tensor ({len(k)},), as k has sequences, on {k.device} (given {given})."
        )
