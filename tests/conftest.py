"""Fixtures, and what happens to GPU tests on a machine without a GPU: they are skipped, and one line says so."""

from __future__ import annotations

import os
import sys
import types

import pytest
import torch

import flashcore.api
import flashcore.plan
from flashcore import backends
from flashcore.backends import reference

GPU = torch.cuda.is_available()
NO_GPU = "they need a GPU, and there is none here"

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers are the parallelism; more threads than cores make all of them slow


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(terminalreporter) -> None:
    skipped = sum(NO_GPU in str(report.longrepr) for report in terminalreporter.stats.get("skipped", ()))
    if skipped:
        terminalreporter.write_line(f"{skipped} tests skipped: {NO_GPU}")


@pytest.fixture(autouse=True)
def _no_memory_between_tests():
    """Plans and runs are memoised by problem; a test that changes the backends must not meet another's."""
    yield
    forget_plans()


def forget_plans() -> None:
    flashcore.plan._plan.cache_clear()
    flashcore.api.runs.clear()
    for name in ("flashcore.ops", "flashcore.integrations.torch_registry"):
        if module := sys.modules.get(name):
            module._runs.clear()


@pytest.fixture
def add_backend(monkeypatch):
    """A function that puts a new backend first in line: ``add_backend("fake", rejects=lambda problem: "why")``.

    Unless told otherwise it can do everything, computes by the reference, and autograd cannot see through it.
    """

    def add(name: str, **functions) -> types.ModuleType:
        module = types.ModuleType(f"flashcore.backends.{name}")
        module.FEATURES = frozenset(backends.FEATURES)
        module.NATIVE_GRAD = False
        module.unavailable = lambda: None
        module.rejects = lambda problem: None
        module.configure = lambda problem: None
        module.forward = reference.forward
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        operations = (backends.ATTENTION, *([backends.ATTENTION_BACKWARD] if "backward" in functions else []))
        for operation in operations:
            monkeypatch.setattr(operation, "providers", {name: name, **operation.providers})
        forget_plans()
        return module

    return add
