"""Problems without a single product: no batch, no query or no key. Every plan sends them here, on any device."""

from __future__ import annotations

import torch

from flashcore.problem import AttentionProblem

FEATURES = frozenset({"window", "score", "sink", "head_dim_v", "dlse", "partial", "packed", "paged"})
NATIVE_GRAD = False


def unavailable() -> str | None:
    return None


def rejects(problem: AttentionProblem) -> str | None:
    return None if problem.is_empty else "there are a batch, queries and keys"


def configure(problem: AttentionProblem) -> None:
    return None


def forward(
    problem: AttentionProblem, config: None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *extras: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    lse = q.new_full(problem.lse_shape, -torch.inf, dtype=torch.float32)
    if problem.score.sink is not None and not problem.packed:  # no sequence owns a row there
        lse = torch.logaddexp(lse, extras[-1].float()[:, None])
    return q.new_zeros(problem.out_shape), lse


def backward(
    problem: AttentionProblem, config: None, q, k, v, out, lse, dout, dlse, *extras
) -> tuple[torch.Tensor, ...]:
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
