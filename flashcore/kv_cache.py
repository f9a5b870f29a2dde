"""KV caches, dense or in pages: new keys and values are appended in place, and attention reads what is filled.

Lengths and tables are on the device and never read back. A dense cache is packed keys of which `used` says how much is
filled, one in pages is paged keys: one plan, and one captured graph, serves all lengths.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch

from flashcore import env, watching
from flashcore.errors import FlashCoreWarning, InvalidInputError, UnsupportedError
from flashcore.sequences import Packed, Paged, check_numbers


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
    table: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> None:
    """Write new keys and values behind those that a cache has, in place: row ``i`` of `k` at ``lengths[b] + i``.

    It is made of PyTorch's operations, on any device, and waits for none: CUDA graphs capture it, and replays read the
    lengths and the table anew. `lengths` stays as it is; ``lengths += k.shape[1]`` is the caller's. No gradient goes
    into a cache.

    What would be beyond the capacity is not written, and what is there stays; so it is with a sequence whose length is
    negative or whose `batch_index` is none of the cache, and where the table names no page of the cache. With
    ``FLASHCORE_CHECK_LENGTHS=1`` these raise, negative lengths apart, for which the call waits for the device.

    :param k_cache: (batch_cache, capacity, heads_k, head_dim), any strides; with `table` (pages, page_size, heads_k,
        head_dim), pages of any size.
    :param v_cache: (batch_cache, capacity, heads_k, head_dim_v) or (pages, page_size, heads_k, head_dim_v), with
        strides of its own.
    :param k: (batch, new, heads_k, head_dim), in the cache's dtype. batch is batch_cache without `batch_index`.
    :param v: (batch, new, heads_k, head_dim_v).
    :param lengths: int32 (batch,), on the cache's device: how many positions are filled before the call.
    :param rotary: (cos, sin), each (positions, rotary_dim / 2), for as many positions as a sequence may have or more:
        the first rotary_dim numbers of each key are rotated by row ``lengths[b] + i``, in float32, before they are
        written.
    :param interleaved: rotate neighbours, (0, 1), (2, 3) and so on, instead of the first half with the second,
        (0, rotary_dim / 2), (1, rotary_dim / 2 + 1) and so on.
    :param batch_index: int32 (batch,): the row of the cache, or of the table, of each sequence; no two are the same.
    :param table: int32 (batch_cache, max_pages), of which each row is contiguous: position ``p`` of a sequence is row
        ``p % page_size`` of page ``table[b, p // page_size]``, and a sequence's capacity is ``max_pages * page_size``.
        Pages of new positions belong to one sequence each.
    :param offsets: int32 (batch + 1,): k and v are packed, (total_new, heads_k, head_dim), and sequence ``b`` has the
        rows from ``offsets[b]`` to ``offsets[b + 1] - 1``. Rows of no sequence are not written.
    :raises InvalidInputError: they are not that; there are more new positions than a sequence has.
    """
    _check_new(k_cache, v_cache, k, v, packed=offsets is not None)
    batch = len(k) if offsets is None else Packed(offsets, 0).batch  # which says what is wrong with them
    if offsets is not None and offsets.device != k.device:
        raise InvalidInputError(f"append: offsets are on {offsets.device}, k on {k.device}. Move them there.")
    check_integers("append: lengths", lengths, batch, k.device)
    if batch_index is not None:
        check_integers("append: batch_index", batch_index, batch, k.device)
    if table is not None:
        check_table("append", table, k_cache)
    rows, capacity = len(k_cache if table is None else table), capacity_of(k_cache, table)
    if batch_index is None and batch != rows:
        raise InvalidInputError(
            f"append: k has {batch} sequences and the {'cache' if table is None else 'table'} {rows}. Pass "
            "batch_index, which says where each one's is."
        )
    if offsets is None:
        new = k.shape[1]
        if new > capacity:
            raise InvalidInputError(f"append: {new} new positions are more than the cache's capacity, {capacity}.")
        check_lengths("append", lengths, capacity - new)
    elif env.check_lengths():
        check_lengths("append", lengths.long() + offsets.diff(), capacity)
    if rotary is not None:
        check_rotary("append", rotary, k_cache, capacity)
    if 0 in (batch, rows, capacity, len(k_cache), k.shape[:-2].numel()):
        return

    sequence, index = members(k, offsets)
    length = lengths[:, None] if offsets is None else lengths[sequence]
    if rotary is not None:
        k = rotate(k, rotary, length + index, interleaved)
    if table is None and batch_index is None and offsets is None:
        # As many positions as there are new rows, all inside and none twice: where the cache is too full they begin
        # before its length, and keep what they have up to there.
        position = length.clamp(0, capacity - new) + index
        source = position - length
        at, own, fits = (sequence, position), (sequence, source.clamp(0, new - 1)), (length >= 0) & (source >= 0)
    else:
        at, own, fits = _places(k_cache, sequence, index, length, batch_index, table)
        k, v = k.flatten(0, -3), v.flatten(0, -3)
    fits = fits[..., None, None]
    for cached, given in ((k_cache, k), (v_cache, v)):
        cached[at] = torch.where(fits, given[own], cached[at])


def _places(
    k_cache: torch.Tensor, row: torch.Tensor, index: torch.Tensor, length: torch.Tensor,
    batch_index: torch.Tensor | None, table: torch.Tensor | None,
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor, torch.Tensor]:  # fmt: skip
    """(page, place) in a cache for each of all new rows, which of these goes there, and whether it has a place at all.

    What has none does again what the first does that has one, so that no place gets two different numbers; where none
    has, that one is to keep what it has.

    :param row: of which sequence each new row is.
    :param index: which of the sequence's; negative: it is of none.
    """
    pages, page_size = k_cache.shape[:2]
    rows, capacity = len(k_cache if table is None else table), capacity_of(k_cache, table)
    position = length + index
    fits = (length >= 0) & (index >= 0) & (position < capacity)
    if batch_index is not None:
        row_of, row = row, batch_index[row]
        fits = fits & _known("append", batch_index, rows)[row_of]
    page, place = row, position
    if table is not None:
        page = table[row.clamp(0, rows - 1), (position // page_size).clamp(0, table.shape[1] - 1)]
        _check_numbers_of_pages("append", page, fits, pages)
        place, fits = position % page_size, fits & (page >= 0) & (page < pages)
    page, place, fits = (t.expand(position.shape).flatten() for t in (page, place, fits))
    own = torch.where(fits, torch.arange(len(fits), device=fits.device), fits.int().argmax())
    return (page[own].clamp(0, pages - 1), place[own].clamp(0, page_size - 1)), own, fits[own]


def _known(function: str, batch_index: torch.Tensor, rows: int) -> torch.Tensor:
    """Which of them are rows of a cache, or of a table. Where the user asks for it, all must be."""
    known = (batch_index >= 0) & (batch_index < rows)
    if env.check_lengths() and not known.all():
        raise InvalidInputError(
            f"{function}: batch_index {batch_index.tolist()} is not all in a cache of {rows} rows."
        )
    return known


def capacity_of(k_cache: torch.Tensor, table: torch.Tensor | None) -> int:
    """How many positions a sequence has room for."""
    return k_cache.shape[1] if table is None else table.shape[1] * k_cache.shape[1]


def members(x: torch.Tensor, offsets: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Of which sequence each row of x is, and which of its rows: -1 for rows of no sequence.

    They have the shape of x before its heads, or one that is expanded to it.

    :param x: (batch, seqlen, heads, head_dim), or with `offsets` (total, heads, head_dim).
    """
    if offsets is None:
        sequence, index = (torch.arange(n, device=x.device) for n in x.shape[:2])
        return sequence[:, None], index
    rows = torch.arange(len(x), dtype=torch.int32, device=x.device)
    sequence = torch.searchsorted(offsets, rows, right=True) - 1
    there = (sequence >= 0) & (sequence < len(offsets) - 1)
    sequence = sequence.clamp(0, len(offsets) - 2)
    return sequence, torch.where(there, rows - offsets[sequence], -1).long()  # lengths are added to it


def rotate(
    x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], positions: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """x (..., heads, head_dim), rotated by the rows `positions` (...) of cos and sin."""
    exact = torch.float64 if x.dtype is torch.float64 else torch.float32
    positions = positions.clamp(0, rotary[0].shape[0] - 1)
    cos, sin = (table[positions].to(exact).unsqueeze(-2) for table in rotary)
    rotated, rest = x.split((2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]), dim=-1)
    rotated = rotated.to(exact)
    a, b = (rotated[..., ::2], rotated[..., 1::2]) if interleaved else rotated.chunk(2, dim=-1)
    pair = a * cos - b * sin, a * sin + b * cos
    rotated = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((rotated.to(x.dtype), rest), dim=-1)


def as_packed(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor, *,
    leftpad: torch.Tensor | None = None, batch_index: torch.Tensor | None = None, table: torch.Tensor | None = None,
    queries: Packed | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Packed | Paged]]:  # fmt: skip
    """q, k, v, and which queries and keys they are, for ``attention`` over what a cache holds.

    :param lengths: int32 (batch,): how many positions are filled.
    :param leftpad: int32 (batch,): how many of them, the first, belong to nobody.
    :param batch_index: int32 (batch,): the row of the cache, or of the table, of each sequence; one that is none has no
        keys.
    :param table: int32 (batch_cache, max_pages), of a cache in pages.
    :param queries: where packed queries lie; None: q is dense.
    """
    if queries is None:
        batch, seqlen_q = q.shape[:2]
        q, queries = q.flatten(0, 1), Packed(_offsets(batch, seqlen_q, seqlen_q, q.device), seqlen_q)
    _check_caches(k_cache, v_cache, table, queries.batch, batch_index)
    capacity = capacity_of(k_cache, table)
    if table is None and (batch_index is None or capacity == 0):
        k, v, apart = _rows(k_cache, v_cache)
        starts = _offsets(queries.batch, apart, capacity, q.device)
        if leftpad is not None:  # a sequence ends where the next begins, or at its length, which is before that
            starts = starts + torch.nn.functional.pad(leftpad, (0, 1))
            lengths = lengths.clamp(max=capacity) - leftpad
        return q, k, v, {"queries": queries, "keys": Packed(starts, capacity, lengths)}
    if batch_index is not None:
        rows = len(k_cache if table is None else table)
        lengths = torch.where(_known("attention over a cache", batch_index, rows), lengths, 0)
        row = batch_index.clamp(0, rows - 1)
        table = row[:, None] if table is None else table.index_select(0, row)  # a row of the cache is a page
    if leftpad is not None or (k_cache.shape[1] != 1 and k_cache.shape[1] % 16):
        k_cache, v_cache, table = _pages_of_one_row(k_cache, v_cache, table, leftpad)
        lengths = lengths if leftpad is None else lengths.clamp(max=capacity) - leftpad
    return q, k_cache, v_cache, {"queries": queries, "keys": Paged(table, lengths, capacity)}


def _pages_of_one_row(
    k_cache: torch.Tensor, v_cache: torch.Tensor, table: torch.Tensor, leftpad: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same caches and sequences, which begin behind their padding: the table names each key's row."""
    pages, page_size = k_cache.shape[:2]
    k, v, apart = _rows(k_cache, v_cache)
    if len(k) >= 2**31:
        raise UnsupportedError(
            f"attention over a cache: {len(k)} rows in pages of {page_size}, or with padding on the left, are more "
            "than a table of rows can name, 2**31. Make pages of a multiple of 16 rows, without padding."
        )
    position = torch.arange(table.shape[1] * page_size, device=table.device).expand(len(table), -1)
    if leftpad is not None:
        position = position + leftpad[:, None]
    page = table.gather(1, (position // page_size).clamp(0, table.shape[1] - 1)).long()
    row = torch.where((page >= 0) & (page < pages), page * apart + position % page_size, -1)
    return k[:, None], v[:, None], row.int()


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
    if watching.is_recorded() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
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


def check_table(function: str, table: object, k_cache: torch.Tensor) -> None:
    """:raises InvalidInputError: it is no table of a cache in pages."""
    check_numbers(f"{function}: table", table, "(batch, max_pages)")
    if table.device != k_cache.device:
        raise InvalidInputError(
            f"{function}: the table is on {table.device}, the cache on {k_cache.device}. Move it there."
        )


def check_pages(
    function: str, table: torch.Tensor, lengths: torch.Tensor, k_cache: torch.Tensor,
    batch_index: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Where the user asks for it, wait for the device and raise if a sequence is said to have what is no page."""
    if not env.check_lengths():
        return
    pages, page_size = k_cache.shape[:2]
    if batch_index is not None:
        table = table[batch_index.clamp(0, len(table) - 1)]
    there = torch.arange(table.shape[1], device=table.device) * page_size < lengths[:, None]
    _check_numbers_of_pages(function, table, there, pages)


def _check_numbers_of_pages(function: str, page: torch.Tensor, there: torch.Tensor, pages: int) -> None:
    if env.check_lengths() and (wrong := there & ((page < 0) | (page >= pages))).any():
        raise InvalidInputError(
            f"{function}: the table names {sorted(set(page[wrong].tolist()))}, which are no pages of a cache of "
            f"{pages}, where sequences have positions."
        )


def check_rotary(function: str, rotary: object, k_cache: torch.Tensor, capacity: int) -> None:
    """:raises InvalidInputError: it is not (cos, sin) for each position of a sequence."""
    pair = isinstance(rotary, (tuple, list)) and len(rotary) == 2
    if not (pair and all(isinstance(table, torch.Tensor) for table in rotary)):
        raise InvalidInputError(f"{function}: rotary must be (cos, sin), two tensors (given {type(rotary).__name__}).")
    cos, sin = rotary
    most = k_cache.shape[3] // 2
    if (
        cos.dim() != 2 or cos.shape != sin.shape or cos.shape[0] < capacity or cos.shape[1] > most
        or not (cos.is_floating_point() and sin.is_floating_point()) or not cos.device == sin.device == k_cache.device
    ):  # fmt: skip
        raise InvalidInputError(
            f"{function}: cos and sin must be floating-point (positions, rotary_dim / 2) on {k_cache.device}, with "
            f"{capacity} positions or more, as the cache has, and rotary_dim / 2 up to {most} (given "
            f"{tuple(cos.shape)} and {tuple(sin.shape)}, {cos.dtype} and {sin.dtype}, {cos.device} and {sin.device})."
        )


def _check_caches(
    k_cache: torch.Tensor, v_cache: torch.Tensor, table: torch.Tensor | None, batch: int, batch_index: object
) -> None:
    rows = k_cache if table is None else table
    if (
        k_cache.dim() != 4 or v_cache.shape[:3] != k_cache.shape[:3] or (batch_index is None and len(rows) != batch)
        or (len(rows) == 0 and batch)
    ):  # fmt: skip
        layout = f"({batch}, capacity, heads_k, head_dim), as q has sequences,"
        if table is not None:
            layout = f"(pages, page_size, heads_k, head_dim), beside a table ({batch}, max_pages), as q has sequences,"
        given = [tuple(tensor.shape) for tensor in (k_cache, v_cache, table) if tensor is not None]
        raise InvalidInputError(
            f"attention over a cache: k_cache and v_cache must be {layout} and alike but for head_dim (given "
            f"{', '.join(map(str, given[:2]))}{f', table {given[2]}' if table is not None else ''})."
        )


def _check_new(k_cache: object, v_cache: object, k: object, v: object, packed: bool) -> None:
    tensors = {"k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    for name, tensor in tensors.items():
        layout = "total, heads, head_dim" if packed and name in ("k", "v") else "batch, positions, heads, head_dim"
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != len(layout.split(", ")):
            given = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise InvalidInputError(f"append: {name} must be a tensor ({layout}) (given {given}).")
    if not (
        k_cache.shape[:3] == v_cache.shape[:3] and k.shape[:-1] == v.shape[:-1]
        and k.shape[-2:] == k_cache.shape[2:] and v.shape[-2:] == v_cache.shape[2:]
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


def check_integers(what: str, tensor: object, batch: int, device: torch.device) -> None:
    """:raises InvalidInputError: it is no int32 tensor on that device with a number for each sequence."""
    if (
        not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.int32 or tuple(tensor.shape) != (batch,)
        or tensor.device != device
    ):  # fmt: skip
        given = type(tensor).__name__
        if isinstance(tensor, torch.Tensor):
            given = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        raise InvalidInputError(
            f"{what} must be an int32 tensor ({batch},), a number for each sequence, on {device} (given {given})."
        )
