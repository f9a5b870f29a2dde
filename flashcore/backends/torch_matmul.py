"""Products by PyTorch's operations: any device, any dtype; the fallback, and what transforms see through."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from flashcore.backends import Run
from flashcore.gemm_problem import GemmProblem

FEATURES: frozenset[str] = frozenset()


def unavailable() -> str | None:
    return None


def rejects(problem: GemmProblem) -> str | None:
    return None


def configure(problem: GemmProblem) -> None:
    return None


def prepare(problem: GemmProblem, config: None) -> Run:
    return partial(multiply, problem)


def multiply(problem: GemmProblem, a, b, bias, *, seen_through: bool = False) -> torch.Tensor:
    """The product; where transforms see through it, by operations that have derivatives."""
    with torch.autocast(problem.device, enabled=False):
        wide = {} if problem.out_dtype == problem.dtype else {"out_dtype": torch.float32}
        if wide and (seen_through or problem.device != "cuda" or "dtype" not in torch.ops.aten.addmm.overloads()):
            wide, a, b = {}, a.float(), b.float()
        if bias is not None and problem.out_dtype != problem.dtype:
            bias = bias.float()
        sums = _sums(a, b, bias, wide)
    return activate(problem.activation, sums).contiguous()


def _sums(a, b, bias, wide: dict[str, torch.dtype]) -> torch.Tensor:
    """``a @ b + bias`` in one product of PyTorch's; `wide` holds its out_dtype if the operands' is another."""
    if a.dim() == 3 and b.dim() == 2:
        return _sums(a.flatten(0, 1), b, bias, wide).unflatten(0, a.shape[:2])
    if a.dim() == 2 and b.dim() == 3:
        a = a.expand(b.shape[0], -1, -1)
    if a.dim() == 2:
        return torch.mm(a, b, **wide) if bias is None else torch.addmm(bias, a, b, **wide)
    return torch.bmm(a, b, **wide) if bias is None else torch.baddbmm(bias, a, b, **wide)


def activate(activation: str | None, sums: torch.Tensor) -> torch.Tensor:
    if activation == "gelu":
        return F.gelu(sums, approximate="tanh")
    if activation == "silu":
        return F.silu(sums)
    if activation == "swiglu":
        gate, factor = sums.chunk(2, dim=-1)
        return F.silu(gate) * factor
    return sums
