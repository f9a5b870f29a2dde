"""Gradients by computing the forward again, on record this time, with a provider that autograd sees through."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from flashcore.backends import ATTENTION
from flashcore.problem import AttentionProblem


class Recompute:
    """A provider of attention's gradients by the forward called `name`."""

    def __init__(self, name: str):
        self._name = name

    @property
    def FEATURES(self) -> frozenset[str]:
        return ATTENTION.load(self._name).FEATURES - {"partial"}  # it would find the LSE of the part

    def unavailable(self) -> str | None:
        return ATTENTION.load(self._name).unavailable()

    def rejects(self, problem: AttentionProblem) -> str | None:
        return ATTENTION.load(self._name).rejects(replace(problem, return_lse=False))

    def configure(self, problem: AttentionProblem) -> Any:
        return ATTENTION.load(self._name).configure(problem)

    def backward(self, problem: AttentionProblem, config: Any, q, k, v, out, lse, dout, dlse, *extras):
        with _on_record():
            inputs = [t.detach().requires_grad_() for t in (q, k, v)]
            out, lse = ATTENTION.load(self._name).forward(problem, config, *inputs, *extras)
            if dlse is None:
                return torch.autograd.grad(out, inputs, dout)
            return torch.autograd.grad((out, lse), inputs, (dout, dlse))


sdpa, reference = Recompute("sdpa"), Recompute("reference")


@contextlib.contextmanager
def _on_record() -> Iterator[None]:
    """Autograd on, whoever calls: a dispatch mode (a FLOP counter, opcheck) runs operators with its keys excluded."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield
