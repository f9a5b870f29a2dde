"""FlashCore behind other names: PyTorch's SDPA, Hugging Face Transformers. Each is imported when it is asked for."""

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = ["sdpa", "transformers"]

if TYPE_CHECKING:
    from flashcore.integrations import sdpa, transformers


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")
