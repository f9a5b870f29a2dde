"""The Triton backend: portable kernels for every NVIDIA GPU from compute capability 8.0 on, forward and backward.

The tests of this package run the same kernels on the CPU in Triton's interpreter, which they mend first: as it is, it
computes garbage with bfloat16. So nobody else gets it (`INTERPRETER_IS_MENDED`), whatever ``TRITON_INTERPRET`` says.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import math
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from flashcore import env
from flashcore.backends import sdpa
from flashcore.backends.triton.configs import MAX_HEAD_DIM, TritonConfig, choose
from flashcore.problem import LONGEST, AttentionProblem

if TYPE_CHECKING:
    import torch

    from flashcore.backends import Run

FEATURES = frozenset({"window", "score", "sink", "head_dim_v", "partial", "packed", "paged"})
NATIVE_GRAD = False

USER_TABLE = "triton_tiles.json"  # in the cache directory
# The first and the last release whose internals are as launch.py and compile.py use them. 3.4 is the first with tensor
# descriptors that are made on the host.
SUPPORTED_TRITON = (3, 4), (3, 8)
INTERPRETER_IS_MENDED = False  # set by tests
_INTERPRETED = "Triton runs in its interpreter here, which computes garbage with bfloat16: unset TRITON_INTERPRET"
MEASURED = frozenset({(9, 0)})  # the compute capabilities with records in benchmarks/results
_MOST_ROWS = 256  # of a tile
_FEW_ROWS = 16  # up to which reading the keys takes the time, not multiplying them


def unavailable() -> str | None:
    """Why this machine cannot run the backend; None if it can."""
    if reason := _missing():
        return reason
    if not interpreted():
        return _no_gpu() or _no_compiler()
    if INTERPRETER_IS_MENDED:
        return None
    return _INTERPRETED


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which is decided when they are defined."""
    if kernels := sys.modules.get(f"{__name__}.attention_fwd"):
        return _is_interpreted(kernels.attention_fwd)
    if (language := sys.modules.get("triton.language")) and _is_interpreted(language.cdiv):
        return True
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")  # what Triton takes


def _is_interpreted(function: object) -> bool:
    return type(function).__name__ == "InterpretedFunction"


@functools.cache
def _missing() -> str | None:
    """Looks without importing: that takes a good part of a second, and plans that use another backend need not wait."""
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed: pip install '{_requirement()}'"
    for distribution in ("triton", "pytorch-triton"):  # the latter comes with nightly builds of PyTorch
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        return _unsupported(version)
    return None


def _unsupported(version: str) -> str | None:
    first, last = SUPPORTED_TRITON
    release = tuple(map(int, re.match(r"(\d+)\.(\d+)", version).groups()))
    if first <= release <= last:
        return None
    age = "old" if release < first else "new"
    return f"Triton {version} is too {age}: this version of FlashCore needs '{_requirement()}'"


def _requirement() -> str:
    """What of Triton is supported, as pip writes it."""
    (major, minor), (last, newest) = SUPPORTED_TRITON
    return f"triton>={major}.{minor},<{last}.{newest + 1}"


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
    if problem.arch is None and not (problem.device == "cpu" and INTERPRETER_IS_MENDED and interpreted()):
        asked = f"; {_INTERPRETED}" if problem.device == "cpu" and interpreted() else ""
        return f"device {problem.device} is not an NVIDIA GPU{asked}"
    if problem.arch is not None and problem.arch < (8, 0):
        return f"compute capability {problem.arch[0]}.{problem.arch[1]} < 8.0"
    if problem.dtype == "float64":
        return "dtype float64 is none of bfloat16, float16 and float32"
    for name, head_dim in (("head_dim", problem.head_dim), ("head_dim_v", problem.head_dim_v)):
        if head_dim > MAX_HEAD_DIM:
            return f"{name} {head_dim} > {MAX_HEAD_DIM}"
    if max(problem.seqlen_q, problem.seqlen_k) > LONGEST:
        return f"seqlen {max(problem.seqlen_q, problem.seqlen_k)} > {LONGEST}"
    if problem.packed and max(problem.queries.total, problem.keys.total) + problem.batch * _MOST_ROWS > LONGEST:
        return f"more than {LONGEST} packed rows, with one tile for each sequence"
    if "window" in problem.features and problem.seqlen_q + problem.seqlen_k > LONGEST:
        return f"a window over {problem.seqlen_q} queries and {problem.seqlen_k} keys, together more than {LONGEST}"
    if problem.batch * problem.heads_q * math.ceil(max(problem.seqlen_q, problem.seqlen_k) / 16) >= 2**31:
        return "more than 2^31 tiles of 16 rows"
    return None


def defers(problem: AttentionProblem) -> tuple[str, str] | None:
    """Who is to be preferred for a problem that is not rejected, and why; None: nobody.

    PyTorch's fused kernels are, where float32 is multiplied much, and on GPUs for which there is no record that says
    otherwise. Where they do not take the problem PyTorch would hold every score; what a window hides they compute.
    """
    if problem.arch is None or problem.visible.bounded_left or sdpa.unfused(problem) is not None:
        return None
    if problem.arch not in MEASURED:
        return "sdpa", f"is known to be good, and triton has not been measured on sm_{problem.arch[0]}{problem.arch[1]}"
    rows = problem.seqlen_q * problem.group_size
    if problem.dtype == "float32" and rows > _FEW_ROWS:
        return "sdpa", f"multiplies float32 on tensor cores, and triton does not: {rows} rows for each key head"
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
    problem: AttentionProblem, config: TritonConfig, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    *extras: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Output (B, Sq, Hq, Dv) and LSE (B, Hq, Sq); see :class:`flashcore.backends.Backend`."""
    return prepare(problem, config)(q, k, v, problem.scale, *extras)


def prepare(problem: AttentionProblem, config: TritonConfig) -> Run:
    """`forward` as a callable (q, k, v, scale, *extras, out=None) -> (out, lse)."""
    from flashcore.backends.triton import attention

    run, default = attention.prepare_forward(problem.of_any_scale, config), problem.head_dim**-0.5
    # Kernels read what is in memory; of a negated view, such as ``z.conj().imag``, that has another sign.
    return lambda q, k, v, scale, *extras, out=None: run(
        q.resolve_neg(), k.resolve_neg(), v.resolve_neg(), default if scale is None else scale,
        *(tensor.resolve_neg() for tensor in extras), out=out,
    )  # fmt: skip
