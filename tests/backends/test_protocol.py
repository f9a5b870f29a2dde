"""Each backend has what the protocol names, and keeps its promises about failure."""

import pytest
import torch

from flashcore import backends
from tests.cases import BY_NAME

NAMES = (*backends.BACKENDS, "empty")


@pytest.mark.parametrize("name", NAMES)
def test_has_what_the_protocol_names(name):
    backend = backends.load(name)
    assert isinstance(backend.NATIVE_GRAD, bool)
    assert frozenset(backends.FEATURES) >= backend.FEATURES
    assert isinstance(backend.HAS_BACKWARD, bool)
    assert hasattr(backend, "backward") == backend.HAS_BACKWARD
    for function in ("unavailable", "rejects", "configure", "forward"):
        assert callable(getattr(backend, function))


@pytest.mark.parametrize("name", NAMES)
def test_unavailable_is_a_reason_or_none(name):
    reason = backends.load(name).unavailable()
    assert reason is None or (isinstance(reason, str) and reason)
    if name in ("sdpa", "reference", "empty"):
        assert reason is None
    if name == "hopper" and not torch.cuda.is_available():
        assert reason is not None


@pytest.mark.parametrize("name", backends.BACKENDS)
def test_rejects_answers_for_problems_of_any_machine(name):
    """Also for a CPU problem on a machine with a GPU, and the other way round."""
    reason = backends.load(name).rejects(BY_NAME["float64_causal_empty_rows"].problem("cpu"))
    assert reason is None or (isinstance(reason, str) and reason)


def test_empty_takes_nothing_else():
    empty = backends.load("empty")
    assert empty.rejects(BY_NAME["causal_129"].problem()) is not None
    assert empty.rejects(BY_NAME["no_keys"].problem()) is None
