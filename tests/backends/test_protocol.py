"""Each backend has what the protocol names, and keeps its promises about failure."""

import pytest
import torch

from flashcore import backends
from tests.cases import BY_NAME

NAMES = (*backends.ATTENTION.providers, "empty")


@pytest.mark.parametrize("name", NAMES)
def test_has_what_the_protocol_names(name):
    backend = backends.ATTENTION.load(name)
    assert isinstance(backend.NATIVE_GRAD, bool)
    assert frozenset(backends.FEATURES) >= backend.FEATURES
    check(backends.ATTENTION, backend)


@pytest.mark.parametrize(
    ("operation", "name"),
    [(operation, name) for operation in backends.OPERATIONS.values() for name in operation.providers],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_every_provider_of_every_operation(operation, name):
    check(operation, operation.load(name))


def check(operation, provider):
    assert frozenset(backends.FEATURES) >= provider.FEATURES
    for function in ("unavailable", "rejects", "configure"):
        assert callable(getattr(provider, function))
    assert callable(getattr(provider, "prepare", None) or getattr(provider, operation.function))
    reason = provider.unavailable()
    assert reason is None or reason


@pytest.mark.parametrize("name", NAMES)
def test_unavailable_is_a_reason_or_none(name):
    reason = backends.ATTENTION.load(name).unavailable()
    assert reason is None or (isinstance(reason, str) and reason)
    if name in ("sdpa", "reference", "empty"):
        assert reason is None
    if name == "hopper" and not torch.cuda.is_available():
        assert reason is not None


@pytest.mark.parametrize("name", backends.ATTENTION.providers)
def test_rejects_answers_for_problems_of_any_machine(name):
    """Also for a CPU problem on a machine with a GPU, and the other way round."""
    reason = backends.ATTENTION.load(name).rejects(BY_NAME["float64_causal_empty_rows"].problem("cpu"))
    assert reason is None or (isinstance(reason, str) and reason)


def test_empty_takes_nothing_else():
    empty = backends.ATTENTION.load("empty")
    assert empty.rejects(BY_NAME["causal_129"].problem()) is not None
    assert empty.rejects(BY_NAME["no_keys"].problem()) is None
