"""FlashCore behind other names: PyTorch's SDPA and its registry, Hugging Face Transformers, vLLM.

Each is imported when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = ["sdpa", "torch_registry", "transformers", "vllm"]

if TYPE_CHECKING:
    from flashcore.integrations import sdpa, torch_registry, transformers, vllm


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")
