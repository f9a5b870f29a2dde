"""FlashCore: attention kernels for NVIDIA Hopper, and the same call everywhere else.

>>> import torch, flashcore
>>> q, k, v = (torch.randn(2, 1024, 8, 64) for _ in range(3))  # (batch, seqlen, heads, head_dim)
>>> out = flashcore.attention(q, k, v, causal=True)
>>> print(flashcore.explain(q, k, v, causal=True))  # who computes it, how and why

Importing this package imports neither torch nor CUDA; the first use of a name does.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public name -> the module that defines it. A module's own name stands for the module.
_PUBLIC = {
    "append": "kv_cache",
    "attention": "api",
    "alibi": "score",
    "bias": "score",
    "lookup": "score",
    "softcap": "score",
    "explain": "api",
    "explain_matmul": "gemm",
    "linear": "gemm",
    "matmul": "gemm",
    "scaled_dot_product_attention": "integrations.sdpa",
    "AttentionProblem": "problem",
    "GemmProblem": "gemm_problem",
    "Packed": "sequences",
    "Paged": "sequences",
    "Plan": "plan",
    "distributed": "distributed",
    "plan": "plan",
    "compat": "compat",
    "env": "env",
    "errors": "errors",
    "integrations": "integrations",
    "CompileError": "errors",
    "EnvironmentProblem": "errors",
    "FlashCoreError": "errors",
    "FlashCoreWarning": "errors",
    "InvalidInputError": "errors",
    "UnsupportedError": "errors",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from flashcore import compat, distributed, env, errors, integrations, plan
    from flashcore.api import attention, explain
    from flashcore.errors import (
        CompileError,
        EnvironmentProblem,
        FlashCoreError,
        FlashCoreWarning,
        InvalidInputError,
        UnsupportedError,
    )
    from flashcore.gemm import explain_matmul, linear, matmul
    from flashcore.gemm_problem import GemmProblem
    from flashcore.integrations.sdpa import scaled_dot_product_attention
    from flashcore.kv_cache import append
    from flashcore.plan import Plan
    from flashcore.problem import AttentionProblem
    from flashcore.score import alibi, bias, lookup, softcap
    from flashcore.sequences import Packed, Paged


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'flashcore' has no attribute {name!r}")
    module = import_module(f"flashcore.{_PUBLIC[name]}")
    value = module if name == _PUBLIC[name] else getattr(module, name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
