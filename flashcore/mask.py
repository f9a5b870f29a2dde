"""Which keys a query sees, and which range of keys a tile of queries needs: the one place on the Python side.

The device code mirrors :class:`Mask` in ``device/attention``; tests hold the two against each other.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mask:
    """The visibility of ``seqlen_k`` keys to ``seqlen_q`` queries.

    A causal mask is aligned to the bottom right, as in flash-attn: the last query sees every key, and query ``i``
    sees key ``j`` when ``j <= i + offset``. With more queries than keys, the first ``-offset`` queries see nothing.
    """

    causal: bool
    seqlen_q: int
    seqlen_k: int

    @property
    def offset(self) -> int:
        """How far the causal diagonal is shifted to the right."""
        return self.seqlen_k - self.seqlen_q

    @property
    def empty_rows(self) -> int:
        """How many queries, counted from the first, see no key at all."""
        if self.seqlen_k == 0:
            return self.seqlen_q
        return max(0, -self.offset) if self.causal else 0

    def keep(self, i, j):
        """Whether query ``i`` sees key ``j``. Takes ints, or integer tensors or arrays that broadcast together."""
        inside = (i >= 0) & (i < self.seqlen_q) & (j >= 0) & (j < self.seqlen_k)
        return inside & (j <= i + self.offset) if self.causal else inside

    def kv_range(self, start: int, stop: int) -> tuple[int, int]:
        """The half-open range of keys that at least one of the queries ``[start, stop)`` sees. ``(0, 0)`` if none."""
        stop = min(stop, self.seqlen_q)
        if start >= stop:
            return 0, 0
        return 0, self._seen_by(stop - 1)

    def unmasked_range(self, start: int, stop: int) -> tuple[int, int]:
        """The half-open range of keys that every one of the queries ``[start, stop)`` sees.

        A kv tile inside it needs no mask. Queries past the end are nobody's and do not count.
        """
        if start >= min(stop, self.seqlen_q):
            return 0, 0
        return 0, self._seen_by(start)

    def _seen_by(self, i: int) -> int:
        """How many keys query ``i`` sees; they are always the first ones."""
        return min(max(i + self.offset + 1, 0), self.seqlen_k) if self.causal else self.seqlen_k
