"""What is computed and who can: operations, and their providers in order of preference.

A provider of an operation is a module of this package with the functions of :class:`Provider` at module level; it is
imported when a plan first considers it. Adding one takes the module and its name in the operation's `providers`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

# What a problem may ask for beyond the plain case (its `features`), in words; the last, the call of a backward pass.
FEATURES: dict[str, str] = {
    "window": "a sliding window",
    "score": "a score function",
    "sink": "sinks",
    "head_dim_v": "a head_dim of v that differs from q's",
    "dlse": "a gradient of the LSE",
    # The output and the LSE are merged with those of other keys, so they are better not rounded: who can returns them,
    # and gradients, in float32 (float64 for float64). The backward pass gets the output and the LSE of all keys.
    "partial": "a part of the keys, with the LSE of all in the backward pass",
    "paged": "keys in pages",  # whose queries are packed, too
    "packed": "packed sequences",
}

Run = Callable[..., Any]  # what an operation's `run` says


class Provider(Protocol):
    """What every provider's module has. Shapes are those of the operation's problem."""

    # Of FEATURES: a problem that has another one is refused. A forward that has "dlse" is one whose LSE autograd sees.
    FEATURES: frozenset[str]

    def unavailable(self) -> str | None:
        """Why this provider cannot run on this machine at all; None if it can. Cached."""

    def rejects(self, problem: Any) -> str | None:
        """What else of this problem the provider lacks, such as ``head_dim 520 > 256``; None if it can compute it."""

    def defers(self, problem: Any) -> tuple[str, str] | None:
        """Optional: another provider that is faster at this problem, which is not rejected, and why; None: go ahead.

        It gets the problem if it can compute it and the caller named nobody.
        """

    def configure(self, problem: Any) -> Any:
        """The frozen config for this problem, with a ``why`` and a readable ``str()``; None if there is no choice."""

    def prepare(self, problem: Any, config: Any) -> Run:
        """The operation's `run`, with all done that needs neither tensors nor the scale.

        Of a scale it may use whether it is at least ``LEAST_SCALE``; of a smaller one, all.
        """

    def copied(self, problem: Any, config: Any, *tensors) -> tuple[tuple[str, str], ...]:
        """Optional: the operands that each call copies before it computes, and why."""


@dataclass(eq=False)
class Operation:
    """One computation: how it is called, and who can do it.

    A provider that has no ``prepare`` has the operation's `function`, which takes problem, config and all that `run`
    takes but the scale: that is the problem's. Only such a one can serve two operations.
    """

    name: str  # as messages have it
    function: str
    run: str  # the arguments and results of a prepared provider
    providers: dict[str, str]  # by preference: name -> module of this package, or module:object
    empty: str | None = None  # the module for problems with nothing to multiply
    gradient: Operation | None = None  # for a provider that autograd does not see through (its NATIVE_GRAD)

    def load(self, name: str) -> Provider:
        """The provider called `name`."""
        module, _, inner = self.providers.get(name, name).partition(":")
        path = f"{__name__}.{module}"
        found = sys.modules.get(path) or importlib.import_module(path)
        return getattr(found, inner) if inner else found

    def refusal(self, name: str, problem: Any, also: frozenset[str] = frozenset()) -> str | None:
        """What of this problem, or of `also`, the provider called `name` lacks; None if it can compute it."""
        provider = self.load(name)
        missing = (problem.features | also) - provider.FEATURES
        return next((words for name, words in FEATURES.items() if name in missing), None) or provider.rejects(problem)

    def prepare(self, name: str, problem: Any, config: Any) -> Run:
        """How to run problems that differ from this one in the size of a positive scale alone."""
        provider = self.load(name)
        if hasattr(provider, "prepare"):
            return provider.prepare(problem, config)
        at = self.run.split("(")[1].split(")")[0].split(", ").index("scale")
        return partial(_of_scale, getattr(provider, self.function), problem, config, at)


def _of_scale(function: Callable, problem: Any, config: Any, at: int, *arguments, out: Any = None):
    results = function(problem.scaled(arguments[at]), config, *arguments[:at], *arguments[at + 1 :])
    return results if out is None else (out.copy_(results[0]), *results[1:])


# In all of these: a scale of None is the default one, and extras are the tensors that the problem names in `tensors`,
# in that order: where packed and paged sequences lie, then what the score looks up, then sinks.

# dq, dk and dv are shaped like q, k and v. `out` and `lse` may be any provider's. `dout` may have any strides, 0
# included; dlse is None, or, for a provider with that feature, the gradient of the LSE: (B, Hq, Sq) of any strides, 0
# for a query that sees no key.
ATTENTION_BACKWARD = Operation(
    "attention_backward",
    "backward",
    "(q, k, v, out, lse, dout, dlse, scale, *extras) -> (dq, dk, dv)",
    {
        "hopper": "hopper.backward",
        "triton": "triton.backward",
        "torch-flash": "torch_flash",
        "sdpa-recompute": "recompute:sdpa",
        "reference-recompute": "recompute:reference",
        "reference": "reference_backward",
    },
    empty="empty",
)

# `out` is contiguous (B, Sq, Hq, Dv) in q's dtype, `lse` contiguous float32 (B, Hq, Sq): the natural logarithm, -inf
# for a query that sees no key; its output row is 0. Of packed sequences they are (total, Hq, Dv) and (Hq, total), and
# rows of no sequence like those that see no key. The LSE may be None unless the problem needs it (where autograd sees
# through the provider: unless the caller wants it). Where the caller brings `out`, which on a GPU is aligned to 16
# bytes, a prepared provider writes there.
ATTENTION = Operation(
    "attention",
    "forward",
    "(q, k, v, scale, *extras, out=None) -> (out, lse)",
    {"hopper": "hopper", "triton": "triton", "sdpa": "sdpa", "reference": "reference"},
    empty="empty",
    gradient=ATTENTION_BACKWARD,
)

MATMUL = Operation("matmul", "multiply", "(a, b, bias) -> out", {"hopper": "hopper.gemm", "torch": "torch_matmul"})

OPERATIONS = {operation.name: operation for operation in (ATTENTION, ATTENTION_BACKWARD, MATMUL)}
