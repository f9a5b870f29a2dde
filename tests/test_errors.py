"""Each exception is also the built-in one that a caller would expect."""

import pytest

from flashcore import errors


@pytest.mark.parametrize(
    ("exception", "builtin"),
    [
        (errors.InvalidInputError, ValueError),
        (errors.UnsupportedError, NotImplementedError),
        (errors.CompileError, RuntimeError),
        (errors.EnvironmentProblem, RuntimeError),
        (errors.FlashCoreWarning, UserWarning),
    ],
)
def test_builtin_base(exception, builtin):
    assert issubclass(exception, builtin)
    assert issubclass(exception, errors.FlashCoreError) or exception is errors.FlashCoreWarning


def test_all_is_complete():
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert defined == set(errors.__all__)
