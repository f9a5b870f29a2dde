"""The Triton backend: portable kernels for every NVIDIA GPU from compute capability 8.0 on, forward and backward.

With ``TRITON_INTERPRET=1`` set before Triton is first imported, the same kernels run on the CPU in Triton's
interpreter: slowly, for tests.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import math
import os
import shutil
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from flashcore import env
from flashcore.backends.triton.configs import MAX_HEAD_DIM, TritonConfig, choose
from flashcore.problem import AttentionProblem

if TYPE_CHECKING:
    import torch

    from flashcore.backends import Run

FEATURES: frozenset[str] = frozenset()
NATIVE_GRAD = False
HAS_BACKWARD = True

USER_TABLE = "triton_tiles.json"  # in the cache directory
MIN_TRITON = "3.4"  # tensor descriptors made on the host


def unavailable() -> str | None:
    """Why this machine cannot run the backend; None if it can."""
    return _missing() or (None if interpreted() else _no_gpu() or _no_compiler())


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _missing() -> str | None:
    """Looks without importing: that takes a good part of a second, and plans that use another backend need not wait."""
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed: pip install 'triton>={MIN_TRITON}'"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a nightly build goes by another name
        return None
    if tuple(int(part) for part in version.split(".")[:2]) < tuple(
        int(part) for part in MIN_TRITON.split(".")
    ):
        return f"Triton {version} is too old: pip install 'triton>={MIN_TRITON}'"
    return None


@functools.cache
def _no_gpu() -> str | None:
    import torch

    if not torch.cuda.is_available() or torch.version.hip:
        return "no CUDA device is available"
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if max(capabilities) < (8, 0):
        return (
            f"needs compute capability 8.0 (found {', '.join(f'{a}.{b}' for a, b in sorted(capabilities))})"
        )
    return None


@functools.cache
def _no_compiler() -> str | None:
    """What Triton lacks to build the C code by which it starts kernels, looked for where Triton does."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler to start kernels: apt-get install gcc, or set CC"
    scheme = "posix_prefix" if sysconfig.get_default_scheme() == "posix_local" else None
    include = Path((sysconfig.get_paths(scheme) if scheme else sysconfig.get_paths())["include"])
    if not (include / "Python.h").exists():
        return f"Triton needs Python's headers to start kernels, and {include} has none: apt-get install python3-dev"
    return None


def rejects(problem: AttentionProblem) -> str | None:
    """The one feature of the problem that the kernels lack; None if they have all."""
    if problem.device != "cuda" and not interpreted():
        return f"device {problem.device} is not a GPU"
    if problem.arch is not None and problem.arch < (8, 0):
        return f"compute capability {problem.arch[0]}.{problem.arch[1]} < 8.0"
    if problem.dtype == "float64":
        return "dtype float64 is none of bfloat16, float16 and float32"
    if problem.head_dim_v != problem.head_dim:
        return f"head_dim_v {problem.head_dim_v} differs from head_dim {problem.head_dim}"
    if problem.head_dim > MAX_HEAD_DIM:
        return f"head_dim {problem.head_dim} > {MAX_HEAD_DIM}"
    if problem.batch * problem.heads_q * math.ceil(max(problem.seqlen_q, problem.seqlen_k) / 16) >= 2**31:
        return "more than 2^31 tiles of 16 rows"
    return None


@functools.lru_cache(maxsize=1024)
def configure(problem: AttentionProblem) -> TritonConfig:
    """The tiles for a problem that is not rejected; ``why`` holds the reasons of their table rows."""
    return choose(problem, _shared_memory(problem.arch), env.cache_dir() / USER_TABLE)


@functools.cache
def _shared_memory(arch: tuple[int, int] | None) -> int | None:
    """Bytes of shared memory that a program may have on the devices of this kind here; None if they cannot tell."""
    import torch

    if arch is None or not torch.cuda.is_available():
        return None
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    sizes = [getattr(d, "shared_memory_per_block_optin", None) for d in devices if (d.major, d.minor) == arch]
    return min((size for size in sizes if size), default=None)


def forward(
    problem: AttentionProblem, config: TritonConfig, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, Sq, Hq, D) and LSE (B, Hq, Sq); see :class:`flashcore.backends.Backend`."""
    return prepare(problem, config)(q, k, v)


def prepare(problem: AttentionProblem, config: TritonConfig) -> Run:
    """`forward` as a callable (q, k, v) -> (out, lse)."""
    from flashcore.backends.triton import attention

    run = attention.prepare_forward(problem, config)
    # Kernels read what is in memory; of a negated view, such as ``z.conj().imag``, that has another sign.
    return lambda q, k, v: run(q.resolve_neg(), k.resolve_neg(), v.resolve_neg())


def backward(
    problem: AttentionProblem,
    config: TritonConfig,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients (dq, dk, dv), bit-identical over repeats; see :class:`flashcore.backends.Backend`.

    ``out`` and ``lse`` may come from any backend's forward; a config that is not this backend's own is not used.
    """
    from flashcore.backends.triton import attention

    if not isinstance(config, TritonConfig):
        config = configure(problem)
    q, k, v, dout = (tensor.resolve_neg() for tensor in (q, k, v, dout))
    return attention.backward(problem, config, q, k, v, out, lse, dout)
