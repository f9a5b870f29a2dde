"""Where the rows of sequences lie in their tensors: `length(b)` rows of sequence b, row i of it in row `at(b, i)`.

A problem holds of it what a kernel is planned by (:class:`Dense`, :class:`PackedSpec`) beside the number of sequences
and the length of the longest. Lengths of packed sequences are no part of it: they lie on the device and are never read
back, so that a plan, or a captured graph, serves whatever they become.
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
        _check_lengths("offsets", self.offsets, "(batch + 1,)")
        if self.offsets.shape[0] == 0:
            raise InvalidInputError("Packed: offsets must be (batch + 1,): at least one number, 0 (given (0,)).")
        if isinstance(self.longest, bool) or not isinstance(self.longest, numbers.Integral) or self.longest < 0:
            given = type(self.longest).__name__ if isinstance(self.longest, torch.Tensor) else repr(self.longest)
            raise InvalidInputError(
                f"Packed: longest must be an int from 0 on, known to the host (given {given}). It may be larger than "
                "the longest sequence."
            )
        object.__setattr__(self, "longest", int(self.longest))  # NumPy's as well
        if self.used is not None:
            _check_lengths("used", self.used, "(batch,)")
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

    def length(self, b: int) -> torch.Tensor:
        """How many rows sequence `b` has."""
        length = (self.offsets[b + 1] - self.offsets[b]).clamp(0, self.longest)
        return length if self.used is None else self.used[b].clamp(0).minimum(length)

    def at(self, b: int, i: torch.Tensor) -> torch.Tensor:
        """Where rows `i` of sequence `b` are."""
        return self.offsets[b] + i


def _check_lengths(name: str, tensor: torch.Tensor, shape: str) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise InvalidInputError(f"Packed: {name} must be a torch.Tensor (given {type(tensor).__name__}).")
    if tensor.dtype != torch.int32 or tensor.dim() != 1 or not tensor.is_contiguous():
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise InvalidInputError(
            f"Packed: {name} must be int32 {shape}, contiguous (given {dtype} {tuple(tensor.shape)}, strides "
            f"{tensor.stride()})."
        )
