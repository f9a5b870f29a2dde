"""Who can compute attention, in order of preference.

A backend is a module ``flashcore.backends.<name>`` with the functions of :class:`Backend` at module level; it is
imported when a plan first considers it. Adding one takes the module and its name in :data:`BACKENDS`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from flashcore.problem import AttentionProblem

BACKENDS: tuple[str, ...] = ("hopper", "triton", "sdpa", "reference")

# (q, k, v, scale, *extras) -> (out, lse). A scale of None is the default one; extras are the tensors that the problem's
# score brings, in the order of its names.
Run = Callable[..., "tuple[torch.Tensor, torch.Tensor | None]"]

# What a problem may ask for beyond the plain case (AttentionProblem.features), in words.
FEATURES: dict[str, str] = {
    "window": "a sliding window",
    "score": "a score function",
    "sink": "sinks",
    "head_dim_v": "a head_dim of v that differs from q's",
}


class Backend(Protocol):
    """What every backend module provides. Shapes are those of :class:`~flashcore.problem.AttentionProblem`."""

    FEATURES: frozenset[str]  # of FEATURES: those that the forward has; a problem with another one is refused
    NATIVE_GRAD: bool  # forward is made of torch operations, so autograd differentiates it as it stands
    HAS_BACKWARD: bool  # the module has a `backward` of its own, with all its FEATURES

    def unavailable(self) -> str | None:
        """Why this backend cannot run on this machine at all; None if it can. Cached."""

    def rejects(self, problem: AttentionProblem) -> str | None:
        """The one feature of this problem that the backend lacks, such as ``head_dim 520 > 256``; None if it can."""

    def defers(self, problem: AttentionProblem) -> tuple[str, str] | None:
        """Optional: another backend that is faster at this problem, which is not rejected, and why; None: go ahead.

        It gets the problem if it can compute it and the caller named no backend.
        """

    def configure(self, problem: AttentionProblem) -> Any:
        """The frozen config for this problem, with a ``why`` and a readable ``str()``; None if there is no choice."""

    def forward(
        self, problem: AttentionProblem, config: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *extras
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute ``out``, contiguous (B, Sq, Hq, Dv) in q's dtype, and ``lse``, contiguous float32 (B, Hq, Sq).

        The LSE is the natural logarithm, -inf for a query that sees no key; its output row is 0. It may be None
        unless ``problem.needs_lse`` (with NATIVE_GRAD: unless ``problem.return_lse``).
        """

    def prepare(self, problem: AttentionProblem, config: Any) -> Run:
        """Optional: ``forward`` as a :data:`Run`, with all done that needs neither tensors nor the scale.

        Of the problem's scale it may use whether it is at least ``LEAST_SCALE``; of others, all.
        """

    def backward(
        self,
        problem: AttentionProblem,
        config: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        dout: torch.Tensor,
        dlse: torch.Tensor | None,
        *extras: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Optional, see HAS_BACKWARD: compute ``(dq, dk, dv)``, shaped like q, k and v.

        ``dlse`` is None, or the gradient of the LSE, like it in shape.

        ``out`` and ``lse`` may be another backend's, and ``config`` is that one's then. ``dout`` may have any strides,
        0 included.
        """


def load(name: str) -> Backend:
    """Import the backend called `name`."""
    path = f"{__name__}.{name}"
    return sys.modules.get(path) or importlib.import_module(path)


def refusal(name: str, problem: AttentionProblem) -> str | None:
    """The one feature of this problem that the backend called `name` lacks; None if it can compute it."""
    backend = load(name)
    missing = problem.features - backend.FEATURES
    return next((FEATURES[name] for name in FEATURES if name in missing), None) or backend.rejects(problem)


def prepare(name: str, problem: AttentionProblem, config: Any) -> Run:
    """How to run problems that differ from this one in the size of a positive scale alone."""
    backend = load(name)
    if hasattr(backend, "prepare"):
        return backend.prepare(problem, config)
    return partial(_forward, backend.forward, problem, config)


def _forward(forward: Callable, problem: AttentionProblem, config: Any, q, k, v, scale: float | None, *extras):
    return forward(problem.scaled(scale), config, q, k, v, *extras)
