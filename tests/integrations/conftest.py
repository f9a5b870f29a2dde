"""What the integrations' tests share."""

import pytest

from flashcore.backends import reference


@pytest.fixture
def kernel(add_backend):
    """The problems that reach FlashCore's kernel: a first backend that can do everything."""
    seen = []

    def forward(problem, config, *tensors):
        seen.append(problem)
        return reference.forward(problem, config, *tensors)

    add_backend("fake", forward=forward)
    return seen
