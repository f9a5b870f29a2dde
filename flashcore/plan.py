"""Who computes a problem and how: provider, config, backward pass, and why. Nothing is launched here."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from flashcore import backends
from flashcore.backends import OPERATIONS, Operation, Run
from flashcore.errors import FlashCoreWarning, InvalidInputError, UnsupportedError

__all__ = ["Plan", "override", "plan"]

AUTOGRAD = "autograd"  # names the backward pass of what autograd sees through


@dataclass(frozen=True)
class Plan:
    """What a call with this problem does. ``print`` it, or read the fields."""

    operation: str  # "attention", "attention_backward" or "matmul"
    problem: Any  # an AttentionProblem or a GemmProblem
    backend: str  # a name of the operation's providers, "empty" when there is nothing to multiply, or "autograd"
    config: Any  # the backend's frozen config, or None where it has no choice
    why: str  # of the backend
    rejected: tuple[tuple[str, str], ...] = ()  # (backend, the one feature it lacks), in order of preference
    backward: Plan | None = None  # of the gradients; None where none is needed
    copied: tuple[tuple[str, str], ...] = ()  # (operand that each call copies first, what makes it unreadable)

    @functools.cached_property
    def run(self) -> Run:
        """The backend, prepared: what the operation's `run` says. It serves all positive scales."""
        return OPERATIONS[self.operation].prepare(self.backend, self.problem, self.config)

    @functools.cached_property
    def backward_with_dlse(self) -> Plan:
        """The backward pass where the LSE has a gradient: `backward` if it takes one, else the first that does.

        Not chosen before: most programs that ask for the LSE want no gradient of it.
        """
        recorded, operation = recorded_backward(self), OPERATIONS[self.operation].gradient
        if "dlse" in operation.load(recorded.backend).FEATURES:
            return recorded
        return _choose(operation, self.problem, "auto", False, also=frozenset({"dlse"}))

    def __str__(self) -> str:
        lines = [("problem", str(self.problem)), *self._choice("backend", "config")]
        if self.backward is not None:
            lines += self.backward._choice("backward", "")
            lines += [("", f"not {name}: {reason}") for name, reason in self.backward.rejected]
        elif OPERATIONS[self.operation].gradient is not None:
            lines.append(("backward", "none: no input requires a gradient"))
        lines += [("copied", f"{name}: {reason}") for name, reason in self.copied]
        lines += [("rejected", f"{name}: {reason}") for name, reason in self.rejected]
        return "\n".join(f"{label:<9} {text}" for label, text in lines)

    def _choice(self, label: str, config_label: str) -> list[tuple[str, str]]:
        config = [] if self.config is None else [(config_label, f"{self.config}: {self.config.why}")]
        return [(label, f"{self.backend}: {self.why}"), *config]


@dataclass(frozen=True)
class Override:
    """Choices for one operation forced by :func:`override`; None leaves one free."""

    operation: str
    backend: str | None
    config: Any
    backward: str | None
    outer: Override | None  # of the blocks around


active_override: ContextVar[Override | None] = ContextVar("flashcore_override", default=None)


@contextlib.contextmanager
def override(
    *, backend: str | None = None, config: Any = None, backward: str | None = None, operation: str = "attention"
) -> Iterator[None]:
    """Force parts of every plan of an operation made inside the ``with`` block. For tests, tuning and bug reports.

    `backend` stands in for ``backend="auto"``. `config` replaces the chosen backend's own config, unchecked. `backward`
    is the name of a provider of gradients, such as ``"triton"``, ``"torch-flash"`` or ``"sdpa-recompute"``, for
    backends that autograd cannot see through. `operation` is ``"attention"`` or ``"matmul"``.
    """
    if operation not in ("attention", "matmul"):
        raise InvalidInputError(f"override: operation={operation!r} does not exist (supported: attention, matmul).")
    outer = active_override.get()
    token = active_override.set(Override(operation, backend, config, backward, outer))
    try:
        yield
    finally:
        active_override.reset(token)


def plan(problem: Any, backend: str = "auto", *, anywhere: bool = False) -> Plan:
    """Choose backend, config and backward pass. Memoised.

    :param problem: an AttentionProblem or a GemmProblem.
    :param anywhere: not for this machine, but for one where every backend's libraries and GPUs are there.
    :raises InvalidInputError: `backend` is no backend's name.
    :raises UnsupportedError: none, or not the requested one, can do it; the message says why for each.
    """
    chosen = prepared_plan(problem, backend, anywhere=anywhere)
    if chosen.problem == problem:
        return chosen
    backward = chosen.backward and replace(chosen.backward, problem=problem)
    return replace(chosen, problem=problem, backward=backward)


def prepared_plan(problem: Any, backend: str = "auto", *, anywhere: bool = False) -> Plan:
    """The same, whose `run` serves all problems that differ from this one in the size of a positive scale alone."""
    forced = _forced(problem.operation)
    try:
        return _plan(problem.operation, problem.of_any_scale, backend, forced, anywhere)
    except UnsupportedError:
        return _plan(problem.operation, problem, backend, forced, anywhere)  # whose message names this problem


def _forced(operation: str) -> Override | None:
    """What the innermost block about this operation forces."""
    found = active_override.get()
    while found is not None and found.operation != operation:
        found = found.outer
    return found and replace(found, outer=None)


@functools.lru_cache(maxsize=4096)
def _plan(name: str, problem: Any, requested: str, forced: Override | None, anywhere: bool) -> Plan:
    operation = OPERATIONS[name]
    if forced and forced.backend and requested == "auto":
        requested = forced.backend
    chosen = _choose(operation, problem, requested, anywhere)
    if forced and forced.config is not None and not problem.is_empty:
        if chosen.config is None:
            raise InvalidInputError(
                f"override: backend {chosen.backend} has no config to override (given {forced.config})."
            )
        chosen = replace(chosen, config=forced.config)
    if operation.gradient is None or not problem.needs_grad:
        return chosen
    return replace(chosen, backward=_backward(operation, chosen, forced, anywhere))


def _backward(operation: Operation, forward: Plan, forced: Override | None, anywhere: bool) -> Plan:
    """The backward pass of a forward: autograd's, that of the same provider, or the first that can follow another's."""
    name = operation.gradient.name
    if operation.load(forward.backend).NATIVE_GRAD and not forward.problem.partial:
        return Plan(name, forward.problem, AUTOGRAD, None, f"{forward.backend} is made of torch operations")
    requested = (forced and forced.backward) or "auto"
    chosen = _choose(operation.gradient, forward.problem, requested, anywhere, first=forward.backend)
    if forced and forced.config is not None and chosen.backend == forward.backend:
        chosen = replace(chosen, config=forced.config)  # such as Triton's, which is about both passes
    return chosen


def recorded_backward(forward: Plan) -> Plan:
    """The backward pass that an operator runs, where autograd is not there to see through the forward."""
    if forward.backward.backend != AUTOGRAD:
        return forward.backward
    name = f"{forward.backend}-recompute"
    config = OPERATIONS[forward.backward.operation].load(name).configure(forward.problem)
    return replace(forward.backward, backend=name, config=config)


def _choose(
    operation: Operation,
    problem: Any,
    requested: str,
    anywhere: bool,
    first: str | None = None,
    also: frozenset[str] = frozenset(),
) -> Plan:
    """The provider of a problem, its config, why, and who was rejected on the way."""
    names = tuple(operation.providers)
    if requested != "auto" and requested not in names:
        raise InvalidInputError(
            f"{operation.name}: backend={requested!r} does not exist (supported: {', '.join(('auto', *names))})."
        )
    if problem.is_empty and operation.empty:
        why = "nothing to multiply: a zero-sized batch or sequence"
        return Plan(operation.name, problem, operation.empty, None, why)
    if requested != "auto":
        names = (requested,)
    elif first in names:
        names = (first, *(name for name in names if name != first))
    rejected: list[tuple[str, str]] = []
    for name in names:
        provider = operation.load(name)
        refusal = operation.refusal(name, problem, also)
        reason = refusal or _unavailable(provider, anywhere)
        if reason is None:
            why = "requested" if requested != "auto" else f"the first of {', '.join(names)} that can"
            if requested == "auto":
                name, why = _deferral(operation, problem, name, anywhere) or (name, why)
            return Plan(operation.name, problem, name, operation.load(name).configure(problem), why, tuple(rejected))
        if refusal is None and problem.device == "cuda":
            warn_that_the_gpu_could_do_better(operation.name, name, reason)
        rejected.append((name, reason))
    raise UnsupportedError(_unsupported(operation, problem, requested, rejected))


def _unavailable(provider: backends.Provider, anywhere: bool) -> str | None:
    """Why a provider cannot run here. Asked last: it looks for GPUs, which a problem on the CPU must not do."""
    return None if anywhere else provider.unavailable()


def _deferral(operation: Operation, problem: Any, name: str, anywhere: bool) -> tuple[str, str] | None:
    """The provider to which one that could compute the problem gives it, and why; None if it keeps it.

    It keeps it without a warning where the other cannot have it.
    """
    deferral = getattr(operation.load(name), "defers", lambda problem: None)(problem)
    if deferral is None or deferral[0] not in operation.providers:
        return None
    other, reason = deferral
    if operation.refusal(other, problem) or _unavailable(operation.load(other), anywhere):
        return None
    return other, f"{name} defers to it: {other} {reason}"


@functools.lru_cache
def warn_that_the_gpu_could_do_better(operation: str, name: str, reason: str) -> None:
    """Once per reason: something that is not installed must not make every call slow in silence."""
    message = f"{operation}: backend {name} would run this on this GPU, and faster, but cannot: {reason}"
    warnings.warn(message, FlashCoreWarning, stacklevel=2)


def _unsupported(operation: Operation, problem: Any, requested: str, rejected: list[tuple[str, str]]) -> str:
    who = "no backend can" if requested == "auto" else f"backend={requested!r} cannot"
    reasons = "".join(f"\n  {name}: {reason}" for name, reason in rejected)
    advice = "" if requested == "auto" else '\nUse backend="auto" to let FlashCore choose one that can.'
    return f"{operation.name}: {who} compute this: {problem}.{reasons}{advice}"
