"""Which keys a query sees: between two diagonals. All else about masks follows from `begin` and `end`.

The one owner of masks on the Python side. Device code spells `begin` and `end` in ``device/attention/mask.cuh``, Triton
in ``backends/triton/tiles.py``; tests hold the three against each other.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mask:
    """Query ``i`` sees the keys ``i + offset - left`` to ``i + offset + right``, both included; None: no bound there,
    else 0 or more.

    Aligned to the bottom right, as in flash-attn: ``offset = seqlen_k - seqlen_q``, so that the last query of a causal
    mask sees every key. Full is ``Mask()``, causal ``Mask(right=0)``, a causal window of n keys ``Mask(n - 1, 0)``.
    """

    left: int | None = None
    right: int | None = None

    def of(self, seqlen_q: int, seqlen_k: int) -> Visible:
        """The mask of a sequence with these lengths."""
        return Visible(self, seqlen_q, seqlen_k)

    def __str__(self) -> str:
        if self == FULL:
            return "full"
        if self == CAUSAL:
            return "causal"
        return f"window ({self.left}, {self.right})"


@dataclass(frozen=True)
class Visible:
    """The visibility of ``seqlen_k`` keys to ``seqlen_q`` queries."""

    mask: Mask
    seqlen_q: int
    seqlen_k: int

    @property
    def offset(self) -> int:
        """How far the diagonal ``i = j`` is shifted to the right."""
        return self.seqlen_k - self.seqlen_q

    # Neither of these two ever falls from one query to the next. They take ints, or integer tensors or arrays.
    def begin(self, i):
        """The first key that query `i` sees, if it sees any."""
        left = self.mask.left
        return 0 * i if left is None else self._key(i + self.offset - left)

    def end(self, i):
        """One past the last key that query `i` sees, if it sees any."""
        right = self.mask.right
        return 0 * i + self.seqlen_k if right is None else self._key(i + self.offset + right + 1)

    # And these two never fall from one key to the next.
    def first_query(self, j: int) -> int:
        """The first query that sees key `j`, if one sees it."""
        return 0 if self.mask.right is None else max(0, j - self.offset - self.mask.right)

    def last_query(self, j: int) -> int:
        """The last query that sees key `j`, if one sees it; negative where none does."""
        last = self.seqlen_q - 1
        return last if self.mask.left is None else min(last, j - self.offset + self.mask.left)

    def _key(self, j):
        return min(max(j, 0), self.seqlen_k) if isinstance(j, int) else j.clip(0, self.seqlen_k)

    def keep(self, i, j):
        """Whether query ``i`` sees key ``j``. Takes ints, or integer tensors or arrays that broadcast together."""
        inside = (i >= 0) & (i < self.seqlen_q) & (j >= 0) & (j < self.seqlen_k)
        if self.mask.left is not None:
            inside = inside & (j >= i + self.offset - self.mask.left)
        if self.mask.right is not None:
            inside = inside & (j <= i + self.offset + self.mask.right)
        return inside

    @property
    def bounded_left(self) -> bool:
        """Whether the left bound hides a key from some query: from the last one, if from any."""
        return self.seqlen_q > 0 and self.begin(self.seqlen_q - 1) > 0

    @property
    def bounded_right(self) -> bool:
        """Whether the right bound hides a key from some query: from the first one, if from any."""
        return self.seqlen_q > 0 and self.end(0) < self.seqlen_k

    @property
    def empty_rows(self) -> int:
        """How many queries, counted from the first, see no key at all: a window is never off the end of the keys."""
        if self.seqlen_k == 0:
            return self.seqlen_q
        return 0 if self.mask.right is None else min(max(0, -self.offset - self.mask.right), self.seqlen_q)

    def kv_range(self, start: int, stop: int) -> tuple[int, int]:
        """The half-open range of keys outside of which none of the queries ``[start, stop)`` sees any."""
        stop = min(stop, self.seqlen_q)
        if start >= stop:
            return 0, 0
        begin, end = self.begin(start), self.end(stop - 1)
        return (begin, end) if begin < end else (0, 0)

    def unmasked_range(self, start: int, stop: int) -> tuple[int, int]:
        """The half-open range of keys that every one of the queries ``[start, stop)`` sees.

        A kv tile inside it needs no mask. Queries past the end are nobody's and do not count.
        """
        stop = min(stop, self.seqlen_q)
        if start >= stop:
            return 0, 0
        begin, end = self.begin(stop - 1), self.end(start)
        return (begin, end) if begin < end else (0, 0)

    def pairs(self) -> int:
        """How many (query, key) pairs are visible."""
        return sum(max(0, self.end(i) - self.begin(i)) for i in range(self.seqlen_q))


FULL = Mask()
CAUSAL = Mask(right=0)
