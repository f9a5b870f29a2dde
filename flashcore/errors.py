"""Every exception and warning that FlashCore raises on purpose.

Each one also derives from the built-in exception a caller would expect, so ``except ValueError`` keeps working.
Messages say what was given, what is supported and what to do.
"""

__all__ = [
    "CompileError",
    "EnvironmentProblem",
    "FlashCoreError",
    "FlashCoreWarning",
    "InvalidInputError",
    "UnsupportedError",
]


class FlashCoreError(Exception):
    """Base class of all FlashCore exceptions."""


class InvalidInputError(FlashCoreError, ValueError):
    """The arguments contradict each other or mean nothing: no backend could ever accept them."""


class UnsupportedError(FlashCoreError, NotImplementedError):
    """The arguments are meaningful, but no backend, or not the requested one, can compute them.

    The message lists, per backend, the one feature that is missing.
    """


class CompileError(FlashCoreError, RuntimeError):
    """A kernel did not compile. The message names the config, the kept source file and the compiler's log."""


class EnvironmentProblem(FlashCoreError, RuntimeError):
    """This installation cannot work as it is: a missing library, a CUDA major version mismatch."""


class FlashCoreWarning(UserWarning):
    """A call is slower than it has to be, or looks like a mistake. Each cause warns once."""
