"""Where the rows of sequences lie in their tensors: `length(b)` rows of sequence b, row i of it in row `at(b, i)`.

A problem holds of it what a kernel is planned by (:class:`Dense`, :class:`PackedSpec`, :class:`PagedSpec`) beside the
number of sequences and the length of the longest. Lengths of packed and paged sequences are no part of it: they lie on
the device and are never read back, so that a plan, or a captured graph, serves whatever they become.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import ClassVar

import torch

from flashcore.errors import InvalidInputError


@dataclass(frozen=True)
class Dense:
    """Sequences of one length, one after the other: (batch, seqlen, heads, head_dim)."""

    tensors: ClassVar[tuple[str, ...]] = ()  # names of those that a call brings

    def shape(self, batch: int, longest: int) -> tuple[int, ...]:
        """Of a tensor's dimensions before the heads."""
        return batch, longest


@dataclass(frozen=True)
class PackedSpec:
    """Sequences of any lengths in one tensor of `total` rows: (total, heads, head_dim)."""

    total: int
    used: bool = False  # whether a second tensor says how many of its rows a sequence uses

    @property
    def tensors(self) -> tuple[str, ...]:
        return ("offsets", "used") if self.used else ("offsets",)

    def shape(self, batch: int, longest: int) -> tuple[int, ...]:
        return (self.total,)

    def bind(self, longest: int, offsets: torch.Tensor, used: torch.Tensor | None = None) -> Packed:
        """The sequences that these tensors say, none longer than `longest`."""
        return Packed(offsets, longest, used)


@dataclass(frozen=True)
class PagedSpec:
    """Sequences of any lengths in pages, which a table names: (pages, page_size, heads, head_dim)."""

    tensors: ClassVar[tuple[str, ...]] = ("table", "lengths")

    pages: int
    page_size: int

    @property
    def total(self) -> int:
        """How many rows the pages have."""
        return self.pages * self.page_size

    def shape(self, batch: int, longest: int) -> tuple[int, ...]:
        return self.pages, self.page_size

    def bind(self, longest: int, table: torch.Tensor, lengths: torch.Tensor) -> Paged:
        """The sequences that these tensors say, none longer than `longest`."""
        return Paged(table, lengths, longest)


DENSE = Dense()


@dataclass(frozen=True, eq=False)
class Packed:
    """Sequences of any lengths, one after the other in one tensor: for ``attention(..., queries=..., keys=...)``.

    Sequence ``b`` has the rows from ``offsets[b]`` to ``offsets[b + 1] - 1``; none is a length, too. What the tensors
    hold is read when a kernel runs: they may be changed in place between calls and between replays of a CUDA graph.
    Nobody checks it: offsets that fall or go beyond the end of the tensor mean nothing, and a sequence that is longer
    than `longest` is cut off there. Rows that belong to no sequence are not read; their output and gradient is 0.

    :param offsets: int32 (batch + 1,), contiguous, on q's device: flash-attn's ``cu_seqlens``.
    :param longest: how many rows a sequence has at most. More is right too, and takes longer.
    :param used: int32 (batch,): a sequence is only the first ``used[b]`` of its rows; None: all. flash-attn's
        ``seqused``.
    :raises InvalidInputError: they are not that.
    """

    offsets: torch.Tensor
    longest: int
    used: torch.Tensor | None = None

    def __post_init__(self) -> None:
        check_numbers("Packed: offsets", self.offsets, "(batch + 1,)")
        if self.offsets.shape[0] == 0:
            raise InvalidInputError("Packed: offsets must be (batch + 1,): at least one number, 0 (given (0,)).")
        object.__setattr__(self, "longest", _checked_longest("Packed", self.longest))
        if self.used is not None:
            check_numbers("Packed: used", self.used, "(batch,)")
            if self.used.shape[0] != self.batch or self.used.device != self.offsets.device:
                raise InvalidInputError(
                    f"Packed: used must be ({self.batch},), as offsets have {self.batch} sequences, and beside them on "
                    f"{self.offsets.device} (given {tuple(self.used.shape)} on {self.used.device})."
                )

    @property
    def batch(self) -> int:
        """How many sequences there are."""
        return self.offsets.shape[0] - 1

    @property
    def kind(self) -> tuple:
        """What decides how a call is run."""
        return self.batch, self.longest, self.used is not None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.offsets,) if self.used is None else (self.offsets, self.used)

    def of(self, total: int) -> PackedSpec:
        """Of the sequences in a tensor of `total` rows."""
        return PackedSpec(total, self.used is not None)

    def bound(self, total: int) -> int:
        """How long a sequence is at most, in such a tensor."""
        return self.longest

    def length(self, b: int) -> torch.Tensor:
        """How many rows sequence `b` has."""
        length = (self.offsets[b + 1] - self.offsets[b]).clamp(0, self.longest)
        return length if self.used is None else self.used[b].clamp(0).minimum(length)

    def at(self, b: int, i: torch.Tensor) -> torch.Tensor:
        """Where rows `i` of sequence `b` are."""
        return self.offsets[b] + i


@dataclass(frozen=True, eq=False)
class Paged:
    """Keys and values of any lengths in pages of a cache: for ``attention(..., keys=...)`` with packed queries.

    K's and V's caches are (pages, page_size, heads, head_dim), each with any strides; a page has 1 row or a multiple of
    16. Row ``i`` of sequence ``b`` is row ``i % page_size`` of page ``table[b, i // page_size]``; a page may belong to
    many sequences. What the tensors hold is read when a kernel runs: they may be changed in place between calls and
    between replays of a CUDA graph. Nobody checks it: numbers that are no pages mean nothing, and a sequence that is
    longer than `longest`, or than its row of the table, is cut off there. Entries of the table past a sequence's
    length are not followed, and rows that belong to no sequence are not read.

    :param table: int32 (batch, max_pages) on q's device, of which each row is contiguous: vLLM's ``block_table``.
    :param lengths: int32 (batch,), contiguous, beside it: how many keys each sequence has.
    :param longest: how many keys a sequence has at most. More is right too, and takes longer.
    :raises InvalidInputError: they are not that.
    """

    table: torch.Tensor
    lengths: torch.Tensor
    longest: int

    def __post_init__(self) -> None:
        check_numbers("Paged: table", self.table, "(batch, max_pages)")
        if self.table.shape[1] == 0:
            raise InvalidInputError("Paged: table must be (batch, max_pages): one page or more (given none).")
        check_numbers("Paged: lengths", self.lengths, "(batch,)")
        if self.lengths.shape[0] != self.batch or self.lengths.device != self.table.device:
            raise InvalidInputError(
                f"Paged: lengths must be ({self.batch},), as the table has {self.batch} sequences, and beside it on "
                f"{self.table.device} (given {tuple(self.lengths.shape)} on {self.lengths.device})."
            )
        object.__setattr__(self, "longest", _checked_longest("Paged", self.longest))

    @property
    def batch(self) -> int:
        """How many sequences there are."""
        return self.table.shape[0]

    @property
    def kind(self) -> tuple:
        """What decides how a call is run."""
        return "paged", *self.table.shape, self.longest

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.table, self.lengths

    def of(self, pages: int, page_size: int) -> PagedSpec:
        """Of the sequences in so many pages."""
        return PagedSpec(pages, page_size)

    def bound(self, pages: int, page_size: int) -> int:
        """How long a sequence is at most, in so many pages: no longer than all that its row of the table names."""
        return min(self.longest, self.table.shape[1] * page_size) if pages else 0

    def length(self, b: int) -> torch.Tensor:
        """How many rows sequence `b` has."""
        return self.lengths[b].clamp(0, self.longest)

    def at(self, b: int, i: torch.Tensor, page_size: int) -> torch.Tensor:
        """Where rows `i` of sequence `b` are, in all pages one after the other."""
        return self.table[b, i // page_size].long() * page_size + i % page_size


def _checked_longest(owner: str, longest: object) -> int:
    if isinstance(longest, bool) or not isinstance(longest, (numbers.Integral, torch.SymInt)) or longest < 0:
        given = type(longest).__name__ if isinstance(longest, torch.Tensor) else repr(longest)
        raise InvalidInputError(
            f"{owner}: longest must be an int from 0 on, known to the host (given {given}). It may be larger than the "
            "longest sequence."
        )
    return longest if isinstance(longest, (int, torch.SymInt)) else int(longest)  # NumPy's


def check_numbers(what: str, tensor: object, shape: str) -> None:
    """A tensor that kernels read: its rows are contiguous."""
    if not isinstance(tensor, torch.Tensor):
        raise InvalidInputError(f"{what} must be a torch.Tensor (given {type(tensor).__name__}).")
    dims = len(shape.split(", "))
    dense = tensor.dim() == dims and (tensor.stride(-1) == 1 or tensor.shape[-1] <= 1)
    if tensor.dtype != torch.int32 or not dense:
        dtype = str(tensor.dtype).removeprefix("torch.")
        rows = "contiguous" if dims == 1 else "its rows contiguous"
        raise InvalidInputError(
            f"{what} must be int32 {shape}, {rows} (given {dtype} {tuple(tensor.shape)}, strides {tensor.stride()})."
        )
