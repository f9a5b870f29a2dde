"""Where a sequence's tokens lie, and what one rank's queries see of another's keys. Integers alone, no tensors but in
`shard` and `join`.

A sequence is cut into chunks of one length: one per rank, or in the zigzag layout two, the r-th from the start and the
r-th from the end, so that a causal mask leaves every rank the same work. A rank's tokens are its chunks, in order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from flashcore.errors import InvalidInputError
from flashcore.mask import Mask

LAYOUTS = ("contiguous", "zigzag")


@dataclass(frozen=True)
class Layout:
    """How a sequence is spread over `ranks`."""

    name: str  # of LAYOUTS
    ranks: int

    def __post_init__(self) -> None:
        if self.name not in LAYOUTS:
            raise InvalidInputError(f"layout={self.name!r} does not exist (supported: {', '.join(LAYOUTS)}).")

    def chunks(self, rank: int) -> tuple[int, ...]:
        """The indices of a rank's chunks in the sequence."""
        return (rank,) if self.name == "contiguous" else (rank, 2 * self.ranks - 1 - rank)

    @property
    def parts(self) -> int:
        """How many chunks the sequence has."""
        return self.ranks * len(self.chunks(0))

    def check(self, name: str, seqlen: int) -> None:
        """Raise InvalidInputError if a sequence of this many tokens cannot be cut."""
        if seqlen % self.parts:
            raise InvalidInputError(
                f"distributed: {name} has {seqlen} tokens, which {self.ranks} ranks cannot share in the {self.name} "
                f"layout (supported: multiples of {self.parts}). Pad the sequence."
            )

    def shard(self, tensor: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
        """A rank's tokens of the whole sequence, contiguous."""
        chunks = tensor.tensor_split(self.parts, dim)
        return torch.cat([chunks[i] for i in self.chunks(rank)], dim).contiguous()  # not channels-last

    def join(self, tensors: list[torch.Tensor], dim: int) -> torch.Tensor:
        """The whole sequence of what all ranks have, by rank."""
        chunks = {}
        for rank, tensor in enumerate(tensors):
            mine = self.chunks(rank)
            chunks |= zip(mine, tensor.tensor_split(len(mine), dim), strict=True)
        return torch.cat([chunks[i] for i in sorted(chunks)], dim).contiguous()


@dataclass(frozen=True)
class Share:
    """A rank's tokens, `length` of them."""

    layout: Layout
    rank: int
    length: int

    def cuts(self, block: int | None) -> list[tuple[int, int, int]]:
        """(first token, its position in the sequence, how many) of the chunks, cut further into blocks if asked to."""
        chunks = self.layout.chunks(self.rank)
        size = self.length // len(chunks)
        step = block or max(size, 1)
        return [(n * size + i, chunk * size + i, step) for n, chunk in enumerate(chunks) for i in range(0, size, step)]


def whole(length: int) -> Share:
    """All tokens of a sequence, in its order."""
    return Share(Layout("contiguous", 1), 0, length)


@dataclass(frozen=True)
class Band:
    """The queries ``rows`` of one rank see of the keys ``keys`` of another those from ``i + low`` to ``i + high``.

    Positions are the ranks' own; None: no bound there. Every query sees a key, and every key is seen.
    """

    rows: tuple[int, int]  # half open, as `keys` is
    keys: tuple[int, int]
    low: int | None
    high: int | None

    @property
    def mask(self) -> Mask:
        """The same for these rows and keys alone, aligned to the bottom right."""
        offset = self.keys[1] - self.rows[1]
        left = None if self.low is None else offset - self.low
        return Mask(left, None if self.high is None else self.high - offset)

    def then(self, other: Band) -> Band | None:
        """Both as one, if they are neighbours that a single mask describes."""
        if self.rows == other.rows and self.keys[1] == other.keys[0] and self.high is None and other.low is None:
            return replace(other, keys=(self.keys[0], other.keys[1]), low=self.low)
        alike = (self.low, self.high, self.keys[0]) == (other.low, other.high, other.keys[0])
        if not alike or self.rows[1] != other.rows[0]:
            return None
        ends_by_itself = self.high is not None and self.keys[1] == self.rows[1] + self.high
        if self.keys[1] == other.keys[1] or ends_by_itself:
            return replace(other, rows=(self.rows[0], other.rows[1]))
        return None


def band(mask: Mask, shift: int, rows: tuple[int, int], keys: tuple[int, int]) -> Band | None:
    """What the queries `rows` see of `keys` where query ``i`` would see key ``i + shift`` on the diagonal.

    None if they see nothing.
    """
    low = None if mask.left is None else shift - mask.left
    high = None if mask.right is None else shift + mask.right
    (start, stop), (begin, end) = rows, keys
    if high is not None:
        start = max(start, begin - high)
    if low is not None:
        stop = min(stop, end - low)
    if start >= stop or begin >= end:
        return None
    if low is not None:
        begin = max(begin, start + low)
    if high is not None:
        end = min(end, stop + high)
    hides_left, hides_right = low is not None and stop - 1 + low > begin, high is not None and start + high < end - 1
    return Band((start, stop), (begin, end), low if hides_left else None, high if hides_right else None)


@lru_cache(maxsize=4096)
def bands(mask: Mask, offset: int, queries: Share, keys: Share, block: int | None = None) -> tuple[Band, ...]:
    """What some of a sequence's queries see of some of its keys, queries first.

    :param mask: of the whole sequences.
    :param offset: how many keys there are more than queries in these.
    :param block: no band is longer than this on either side; None: they are as long as they can be.
    """
    found: list[Band] = []
    for row, row_at, rows in queries.cuts(block):
        line: list[Band] = []
        for key, key_at, seen in keys.cuts(block):
            # Query i lies at i - row + row_at in the sequence, key j at j - key + key_at.
            one = band(mask, row_at - row + offset - key_at + key, (row, row + rows), (key, key + seen))
            if one is not None:
                _append(line, one, joins=block is None)
        for one in line:
            _append(found, one, joins=block is None)
    return tuple(found)


def _append(found: list[Band], one: Band, joins: bool) -> None:
    both = found[-1].then(one) if found and joins else None
    if both is None:
        found.append(one)
    else:
        found[-1] = both


def span(found: tuple[Band, ...]) -> tuple[int, int]:
    """The half-open range of keys outside of which the bands need none."""
    return min((b.keys[0] for b in found), default=0), max((b.keys[1] for b in found), default=0)
