"""Triton's gradients of attention: what the package says of the forward holds for them, too."""

from __future__ import annotations

from flashcore.backends import Run, triton
from flashcore.backends.triton.configs import TritonConfig
from flashcore.problem import AttentionProblem

FEATURES = triton.FEATURES | {"dlse"}


def unavailable() -> str | None:
    return triton.unavailable()


def rejects(problem: AttentionProblem) -> str | None:
    return triton.rejects(problem)


def configure(problem: AttentionProblem) -> TritonConfig:
    return triton.configure(problem)


def prepare(problem: AttentionProblem, config: TritonConfig) -> Run:
    """A callable (q, k, v, out, lse, dout, dlse, scale, *extras) -> (dq, dk, dv), bit-identical over repeats.

    ``out`` and ``lse`` may come from any backend's forward.
    """
    from flashcore.backends.triton import attention

    run, default = attention.prepare_backward(problem.of_any_scale, config), problem.head_dim**-0.5

    def backward(q, k, v, out, lse, dout, dlse, scale, *extras):
        q, k, v, dout, *extras = (tensor.resolve_neg() for tensor in (q, k, v, dout, *extras))
        dlse = dlse if dlse is None else dlse.resolve_neg()
        return run(q, k, v, out, lse, dout, dlse, default if scale is None else scale, *extras)

    return backward
