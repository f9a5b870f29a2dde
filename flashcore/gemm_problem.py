"""What product is to be computed, every dimension named. Validation of ``matmul``'s inputs happens here only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from flashcore.errors import InvalidInputError
from flashcore.problem import DEVICES, DTYPES, _gpu, _short, gpu_of, stand_in

HALF_TYPES = ("bfloat16", "float16")
ACTIVATIONS = ("gelu", "silu", "swiglu")


@dataclass(frozen=True)
class GemmProblem:
    """``activation(a @ b + bias)`` for one set of shapes and memory layouts. Hashable: plans are memoised by it.

    a is (batch, m, k) and b (batch, k, n), or (batch, k, 2 n) for SwiGLU: the gate's columns, then their factors'.
    """

    operation: ClassVar[str] = "matmul"

    dtype: str  # "bfloat16", "float16", "float32" or "float64": of a, b and bias
    out_dtype: str  # dtype, or "float32" for the half types
    device: str  # "cuda" or "cpu"
    arch: tuple[int, int] | None  # compute capability, such as (9, 0); None on the CPU
    sm_count: int  # streaming multiprocessors; 0 on the CPU
    batch: int
    m: int
    n: int  # columns of the output
    k: int
    a_mn_major: bool = False  # a's memory runs along m instead of k
    b_mn_major: bool = False  # b's memory runs along n instead of k
    a_shared: bool = False  # one matrix a for all batches
    b_shared: bool = False
    bias: bool = False
    activation: str | None = None  # of ACTIVATIONS

    @classmethod
    def from_tensors(
        cls,
        a: torch.Tensor,
        b: torch.Tensor,
        *,
        out_dtype: torch.dtype | None = None,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
    ) -> GemmProblem:
        """Check the arguments of ``flashcore.matmul`` and name their dimensions.

        :raises InvalidInputError: naming the argument, the rule it breaks and what to do.
        """
        check_arguments(a, b, out_dtype=out_dtype, bias=bias, activation=activation)
        columns = b.shape[-1]
        dtype = DTYPES[a.dtype]
        arch, sm_count = _gpu(a.device) if a.device.type == "cuda" else (None, 0)
        batch = next((t.shape[0] for t in (a, b) if t.dim() == 3), 1)
        return cls(
            dtype=dtype,
            out_dtype=DTYPES[out_dtype or a.dtype],
            device=a.device.type,
            arch=arch,
            sm_count=sm_count,
            batch=batch,
            m=a.shape[-2],
            n=columns // 2 if activation == "swiglu" else columns,
            k=a.shape[-1],
            a_mn_major=a.stride(-1) != 1 and a.stride(-2) == 1,
            b_mn_major=b.stride(-1) == 1 or b.stride(-2) != 1,
            a_shared=batch > 1 and (a.dim() == 2 or a.stride(0) == 0),
            b_shared=batch > 1 and (b.dim() == 2 or b.stride(0) == 0),
            bias=bias is not None,
            activation=activation,
        )

    @classmethod
    def hypothetical(
        cls,
        m: int,
        n: int,
        k: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        arch: tuple[int, int] | None = None,
        out_dtype: torch.dtype | None = None,
        bias: bool = False,
        activation: str | None = None,
        weight: bool = False,
    ) -> GemmProblem:
        """The problem of an (m, k) and a (k, n) matrix that need not exist, checked as real ones are.

        On this machine's device, or on a GPU of compute capability ``arch``; with ``weight`` b is the transpose of a
        linear layer's (n, k) weight.

        :raises InvalidInputError: as :meth:`from_tensors`, or a matrix of such a shape could not exist.
        """
        stand_in("matmul: the output", (m, n), torch.float32, arch)
        problem = cls.from_tensors(
            stand_in("matmul: a", (m, k), dtype, arch),
            stand_in("matmul: b", (k, n), dtype, arch),
            out_dtype=out_dtype,
            bias=stand_in("matmul: bias", (n,), dtype, arch) if bias else None,
            activation=activation,
        )  # an expanded element's strides do not say which way memory runs
        return replace(problem, b_mn_major=not weight, **({} if arch is None else gpu_of(arch)))

    @property
    def b_columns(self) -> int:
        """Columns of b: two for one of the output where a gate and its factor make one."""
        return 2 * self.n if self.activation == "swiglu" else self.n

    @property
    def features(self) -> frozenset[str]:
        """What a provider must name in its FEATURES to get this problem: nothing."""
        return frozenset()

    @property
    def of_any_scale(self) -> GemmProblem:
        """The problem itself: a product has no scale."""
        return self

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to multiply."""
        return 0 in (self.batch, self.m, self.n, self.k)

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.b_columns * self.k

    def __str__(self) -> str:
        where = self.device if self.arch is None else f"sm_{self.arch[0]}{self.arch[1]} ({self.sm_count} SMs)"
        batch = f"{self.batch} x " if self.batch != 1 else ""
        majors = f"a along {'m' if self.a_mn_major else 'k'}, b along {'n' if self.b_mn_major else 'k'}"
        extras = (" + bias" if self.bias else "") + (f", {self.activation}" if self.activation else "")
        return (
            f"{self.dtype} -> {self.out_dtype} on {where}, {batch}({self.m}, {self.k}) @ ({self.k}, {self.b_columns})"
            f"{extras}, memory of {majors}"
        )


def check_arguments(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    out_dtype: torch.dtype | None,
    bias: torch.Tensor | None,
    activation: str | None,
) -> None:
    """Raise InvalidInputError unless these are arguments of ``flashcore.matmul``. Sizes may be symbols."""
    for name, tensor in {"a": a, "b": b, **({} if bias is None else {"bias": bias})}.items():
        _check_tensor(name, tensor, a)
    _check_shapes(a, b)
    if activation is not None and activation not in ACTIVATIONS:
        raise InvalidInputError(
            f"matmul: activation={activation!r} does not exist (supported: None, {', '.join(ACTIVATIONS)})."
        )
    columns = b.shape[-1]
    if activation == "swiglu" and columns % 2:
        raise InvalidInputError(
            f"matmul: swiglu needs an even number of columns in b, the gate's and as many factors' "
            f"(given b {tuple(b.shape)})."
        )
    if bias is not None and bias.shape != (columns,):
        raise InvalidInputError(
            f"matmul: bias must have one element per column of b (given bias {tuple(bias.shape)}, "
            f"b {tuple(b.shape)})."
        )
    _check_out_dtype(DTYPES[a.dtype], out_dtype)


def _check_tensor(name: str, tensor: torch.Tensor, a: torch.Tensor) -> None:
    """What each argument must be, and what it must share with a."""
    if not isinstance(tensor, torch.Tensor):
        raise InvalidInputError(f"matmul: {name} must be a torch.Tensor (given {type(tensor).__name__}).")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise InvalidInputError(f"matmul: {name} must be a dense tensor. Convert it first.")
    if tensor.dtype not in DTYPES:
        raise InvalidInputError(
            f"matmul: {name} has dtype {_short(tensor.dtype)} (supported: {', '.join(DTYPES.values())}). Cast it first."
        )
    if tensor.device.type not in DEVICES:
        raise InvalidInputError(
            f"matmul: {name} is on {tensor.device} (supported: {', '.join(DEVICES)}). Move it first."
        )
    if tensor.dtype != a.dtype or tensor.device != a.device:
        raise InvalidInputError(
            f"matmul: all tensors must have one dtype and one device (given a {_short(a.dtype)} on {a.device}, "
            f"{name} {_short(tensor.dtype)} on {tensor.device}). Cast or move them."
        )


def _check_shapes(a: torch.Tensor, b: torch.Tensor) -> None:
    given = f"given a {tuple(a.shape)}, b {tuple(b.shape)}"
    for name, tensor in (("a", a), ("b", b)):
        if tensor.dim() not in (2, 3):
            raise InvalidInputError(
                f"matmul: {name} must have 2 dimensions, or 3 with a batch in front ({given}). Reshape it first."
            )
    if a.shape[-1] != b.shape[-2]:
        raise InvalidInputError(
            f"matmul: a has {a.shape[-1]} columns, but b has {b.shape[-2]} rows ({given})."
        )
    if a.dim() == b.dim() == 3 and a.shape[0] != b.shape[0]:
        raise InvalidInputError(
            f"matmul: a and b must have one batch size ({given}). Expand the smaller one: it copies nothing."
        )


def _check_out_dtype(dtype: str, out_dtype: torch.dtype | None) -> None:
    supported = (dtype, "float32") if dtype in HALF_TYPES else (dtype,)
    if out_dtype is not None and DTYPES.get(out_dtype) not in supported:
        given = _short(out_dtype) if isinstance(out_dtype, torch.dtype) else repr(out_dtype)
        raise InvalidInputError(
            f"matmul: out_dtype={given} is not supported for {dtype} inputs (supported: {', '.join(supported)})."
        )
