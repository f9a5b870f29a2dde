"""The matrix product as the harness sees it: inputs, the float64 answer, who computes it."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from flashcore.bench.cases import GemmCase
from flashcore.bench.check import FLOPS, Errors, spread_blocks

COLUMNS = 4096  # of b that are float64 at once


def make_inputs(case: GemmCase, device: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random a (m, k) and b (k, columns), N(0, 1) and N(0, 1 / k): the product's elements are of order 1."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def draw(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

    a = draw(case.m, case.k)
    scale = case.k**-0.5
    return a, draw(case.columns, case.k).mul_(scale).t() if case.weight else draw(case.k, case.columns).mul_(scale)


class Truth:
    """The float64 answer for all rows, or for evenly spread blocks of them where all would take too long."""

    def __init__(self, case: GemmCase, a: torch.Tensor, b: torch.Tensor, flops: float = FLOPS) -> None:
        ranges = spread_blocks(case.m, case.flops, flops)
        self.rows = torch.cat([torch.arange(start, stop, device=a.device) for start, stop in ranges])
        some = a[self.rows].double()
        parts = [some @ b[:, start : start + COLUMNS].double() for start in range(0, case.columns, COLUMNS)]
        self.answer = activate(case, torch.cat(parts, dim=1))

    def errors(self, out: torch.Tensor) -> Errors:
        error = out[self.rows].double() - self.answer
        norm = self.answer.norm().item()
        return Errors(error.norm().item() / norm, error.abs().max().item())


def activate(case: GemmCase, sums: torch.Tensor) -> torch.Tensor:
    if case.activation == "swiglu":
        gate, factor = sums.chunk(2, dim=-1)
        return F.silu(gate) * factor
    return sums


def plan(case: GemmCase, a: torch.Tensor, b: torch.Tensor) -> dict:
    from flashcore.gemm import explain_matmul

    chosen = explain_matmul(a, b, out_dtype=getattr(torch, case.out_dtype), activation=case.activation)
    found = {"backend": chosen.backend}
    if chosen.config is not None:
        found |= {"config": str(chosen.config.config), "schedule": str(chosen.config.schedule)}
    return found


def flashcore(case: GemmCase, a: torch.Tensor, b: torch.Tensor):
    from flashcore.gemm import matmul

    return partial(matmul, a, b, out_dtype=getattr(torch, case.out_dtype), activation=case.activation)


def cublas(case: GemmCase, a: torch.Tensor, b: torch.Tensor):
    """``torch.mm``, followed by torch's elementwise operations where the case has an activation."""
    if case.out_dtype == case.dtype:
        product = partial(torch.mm, a, b)
    elif a.is_cuda:
        product = partial(torch.mm, a, b, out_dtype=getattr(torch, case.out_dtype))
    else:  # torch has no such product on the CPU
        product = partial(torch.mm, a.float(), b.float())
    return product if case.activation is None else lambda: activate(case, product())


def pytorch_answer(case: GemmCase, device: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return cublas(case, a, b)()
