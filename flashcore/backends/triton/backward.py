"""Triton's gradients of attention: what the package says of the forward holds for them, too."""

from __future__ import annotations

import torch

from flashcore.backends import triton
from flashcore.backends.triton.configs import TritonConfig
from flashcore.problem import AttentionProblem

FEATURES = triton.FEATURES


def unavailable() -> str | None:
    return triton.unavailable()


def rejects(problem: AttentionProblem) -> str | None:
    return triton.rejects(problem)


def configure(problem: AttentionProblem) -> TritonConfig:
    return triton.configure(problem)


def backward(problem: AttentionProblem, config: TritonConfig, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(dq, dk, dv), bit-identical over repeats."""
    return triton.backward(problem, config, *tensors)
