"""Who computes a problem and how: backend, config, backward pass, and why. Nothing is launched here."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from flashcore import backends, gradients
from flashcore.backends import Backend
from flashcore.errors import FlashCoreWarning, InvalidInputError, UnsupportedError
from flashcore.problem import AttentionProblem

__all__ = ["Plan", "override", "plan"]

# The values of Plan.backward that name no backend.
NO_GRAD = "none"
AUTOGRAD = "autograd"
TORCH_FLASH = "torch-flash"
SDPA_RECOMPUTE = "sdpa-recompute"
REFERENCE_RECOMPUTE = "reference-recompute"


@dataclass(frozen=True)
class Plan:
    """What a call with this problem does. ``print`` it, or read the fields."""

    problem: AttentionProblem
    backend: str  # a name of backends.BACKENDS, or "empty" when there is nothing to multiply
    config: Any  # the backend's frozen config, or None where it has no choice
    backward: str  # "none", "autograd", the name of a backend with a backward, "torch-flash" or "...-recompute"
    why: str  # of the backend
    backward_why: str
    rejected: tuple[tuple[str, str], ...]  # (backend, the one feature it lacks), in order of preference

    def __str__(self) -> str:
        lines = [("problem", str(self.problem)), ("backend", f"{self.backend}: {self.why}")]
        if self.config is not None:
            lines.append(("config", f"{self.config}: {self.config.why}"))
        lines.append(("backward", f"{self.backward}: {self.backward_why}"))
        lines += [("rejected", f"{name}: {reason}") for name, reason in self.rejected]
        return "\n".join(f"{label:<9} {text}" for label, text in lines)


@dataclass(frozen=True)
class Override:
    """Choices forced by :func:`override`; None leaves one free."""

    backend: str | None
    config: Any
    backward: str | None


active_override: ContextVar[Override | None] = ContextVar("flashcore_override", default=None)


@contextlib.contextmanager
def override(
    *, backend: str | None = None, config: Any = None, backward: str | None = None
) -> Iterator[None]:
    """Force parts of every plan made inside the ``with`` block. For tests, tuning and bug reports.

    `backend` stands in for ``backend="auto"``. `config` replaces the chosen backend's own config, unchecked. `backward`
    is the name of a backend with a backward of its own, ``"torch-flash"`` or ``"sdpa-recompute"``, for backends that
    autograd cannot see through.
    """
    token = active_override.set(Override(backend, config, backward))
    try:
        yield
    finally:
        active_override.reset(token)


def plan(problem: AttentionProblem, backend: str = "auto", *, anywhere: bool = False) -> Plan:
    """Choose backend, config and backward pass. Memoised.

    :param anywhere: not for this machine, but for one where every backend's libraries and GPUs are there.
    :raises InvalidInputError: `backend` is no backend's name.
    :raises UnsupportedError: none, or not the requested one, can do it; the message says why for each.
    """
    general, choices = problem.of_any_scale, (backend, active_override.get(), anywhere)
    try:
        chosen = _plan(general, *choices)
    except UnsupportedError:
        return _plan(problem, *choices)  # whose message names this problem
    return chosen if general is problem else replace(chosen, problem=problem)


@lru_cache(maxsize=4096)
def _plan(problem: AttentionProblem, backend: str, forced: Override | None, anywhere: bool) -> Plan:
    if forced and forced.backend and backend == "auto":
        backend = forced.backend
    if backend != "auto" and backend not in backends.BACKENDS:
        raise InvalidInputError(
            f"attention: backend={backend!r} does not exist (supported: {', '.join(('auto', *backends.BACKENDS))})."
        )
    if problem.is_empty:
        name, why, rejected = "empty", "nothing to multiply: a zero-sized batch or sequence", ()
    else:
        name, why, rejected = _choose_backend(problem, backend, anywhere)
    module = backends.load(name)
    config = module.configure(problem)
    if forced and forced.config is not None and not problem.is_empty:
        if config is None:
            raise InvalidInputError(
                f"override: backend {name} has no config to override (given {forced.config})."
            )
        config = forced.config
    forced_backward = forced.backward if forced else None
    backward, backward_why = _choose_backward(problem, name, module, forced_backward, anywhere)
    return Plan(problem, name, config, backward, why, backward_why, rejected)


def _choose_backend(
    problem: AttentionProblem, requested: str, anywhere: bool
) -> tuple[str, str, tuple[tuple[str, str], ...]]:
    """The name of the backend, why, and who was rejected on the way."""
    candidates = backends.BACKENDS if requested == "auto" else (requested,)
    rejected: list[tuple[str, str]] = []
    for name in candidates:
        module = backends.load(name)
        refusal = backends.refusal(name, problem)
        reason = refusal or _unavailable(module, anywhere)
        if reason is None:
            if requested != "auto":
                return name, "requested", tuple(rejected)
            alone = name, f"the first of {', '.join(candidates)} that can"
            return *(_deferral(problem, name, anywhere) or alone), tuple(rejected)
        if refusal is None and problem.device == "cuda":
            warn_that_the_gpu_could_do_better("attention", name, reason)
        rejected.append((name, reason))
    raise UnsupportedError(_unsupported(problem, requested, rejected))


def _unavailable(module: Backend, anywhere: bool) -> str | None:
    """Why the backend cannot run here. Asked last: it looks for GPUs, which a problem on the CPU must not do."""
    return None if anywhere else module.unavailable()


def _deferral(problem: AttentionProblem, name: str, anywhere: bool) -> tuple[str, str] | None:
    """The backend to which one that could compute the problem gives it, and why; None if it keeps it.

    It keeps it without a warning where the other cannot have it.
    """
    deferral = getattr(backends.load(name), "defers", lambda problem: None)(problem)
    if deferral is None or deferral[0] not in backends.BACKENDS:
        return None
    other, reason = deferral
    module = backends.load(other)
    if backends.refusal(other, problem) or _unavailable(module, anywhere):
        return None
    return other, f"{name} defers to it: {other} {reason}"


@lru_cache
def warn_that_the_gpu_could_do_better(operation: str, name: str, reason: str) -> None:
    """Once per reason: something that is not installed must not make every call slow in silence."""
    message = f"{operation}: backend {name} would run this on this GPU, and faster, but cannot: {reason}"
    warnings.warn(message, FlashCoreWarning, stacklevel=2)


def _unsupported(problem: AttentionProblem, requested: str, rejected: list[tuple[str, str]]) -> str:
    who = "no backend can" if requested == "auto" else f"backend={requested!r} cannot"
    reasons = "".join(f"\n  {name}: {reason}" for name, reason in rejected)
    advice = "" if requested == "auto" else '\nUse backend="auto" to let FlashCore choose one that can.'
    return f"attention: {who} compute this: {problem}.{reasons}{advice}"


def _others_with_a_backward(problem: AttentionProblem, name: str, anywhere: bool) -> dict[str, str | None]:
    """Backends whose backward can follow another's forward, and why they cannot."""
    others = {other: backends.load(other) for other in backends.BACKENDS if other != name}
    reasons = {
        other: backends.refusal(other, problem) or _unavailable(module, anywhere)
        for other, module in others.items()
        if module.HAS_BACKWARD
    }
    return {other: reason and f"{other} cannot: {reason}" for other, reason in reasons.items()}


def _choose_backward(
    problem: AttentionProblem, name: str, module: Backend, forced: str | None, anywhere: bool
) -> tuple[str, str]:
    """The backward pass and why."""
    if not problem.needs_grad:
        return NO_GRAD, "no input requires a gradient"
    if module.NATIVE_GRAD:
        return AUTOGRAD, f"{name} is made of torch operations"
    no_flash = gradients.torch_flash_rejects(problem)
    possible = {
        name: None if module.HAS_BACKWARD else f"{name} has no backward of its own yet",
        **_others_with_a_backward(problem, name, anywhere),
        TORCH_FLASH: no_flash and f"PyTorch's flash backward does not take {no_flash}",
        SDPA_RECOMPUTE: backends.refusal("sdpa", replace(problem, return_lse=False)),
        REFERENCE_RECOMPUTE: None,
    }
    if forced is not None:
        reason = possible.get(forced, f"it is none of {', '.join(possible)}")
        if reason is not None:
            raise UnsupportedError(f"override: backward={forced!r} cannot be used: {reason}.")
        return forced, "forced by override"
    chosen = next(choice for choice, reason in possible.items() if reason is None)
    reasons = [reason for reason in possible.values() if reason is not None]
    return chosen, "; ".join(reasons) or "the backend's own"
