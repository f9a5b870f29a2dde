"""The Hopper backend: our own CUDA C++ kernels for sm_90 (H100, H200, GH200), compiled at first use."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

from flashcore.backends.hopper.configs import ForwardConfig, choose_forward, choose_packed
from flashcore.backends.hopper.decode_configs import CLUSTERS, DecodeConfig, choose_decode
from flashcore.problem import LONGEST, AttentionProblem

if TYPE_CHECKING:
    import torch

    from flashcore.backends import Run

FEATURES = frozenset({"window", "score", "sink", "head_dim_v", "partial", "packed", "paged"})
NATIVE_GRAD = False

_MOST_PACKED_ROWS = 2**30  # tma.PACKED_ORIGIN, without importing it
# Keys from which on it matters that the clusters of so few heads leave SMs idle (docs/log/0018).
_FEW_HEADS_KEYS = 65536
# Keys that the busiest SM reads in the time that Triton's two kernels cost the host, more or less (docs/log/0017).
_DEFERRED_KEYS = 4096


@functools.cache
def unavailable() -> str | None:
    """Why this machine cannot run the backend; None if it can."""
    import torch

    if not torch.cuda.is_available() or torch.version.hip:
        return "no CUDA device is available"
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if (9, 0) not in capabilities:
        return f"needs compute capability 9.0 (found {', '.join(f'{a}.{b}' for a, b in sorted(capabilities))})"
    return _missing_library()


def _missing_library() -> str | None:
    """What of the compiler and launcher is missing or does not fit PyTorch; None if all is there."""
    import torch

    wanted = torch.version.cuda.split(".")[0]
    try:
        import cuda.bindings
        import cuda.core
    except ImportError as error:
        return f"{error.name or error} is not installed: pip install 'flashcore-attention[cu{wanted}]'"
    bindings = cuda.bindings.__version__.split(".")[0]
    if bindings != wanted:
        return (
            f"cuda-bindings {cuda.bindings.__version__} does not match PyTorch's CUDA {torch.version.cuda}: "
            f"pip install 'cuda-bindings=={wanted}.*'"
        )
    from flashcore.backends.hopper.jit import nvrtc_version

    try:
        nvrtc_version()
    except Exception as error:  # cuda.pathfinder's errors share no public base class
        return f"NVRTC cannot be loaded ({error}): pip install 'flashcore-attention[cu{wanted}]'"
    return None


def rejects(problem: AttentionProblem) -> str | None:
    """The one feature of the problem that the kernels lack; None if they have all."""
    if problem.arch != (9, 0):
        return f"device {problem.device} with compute capability {problem.arch} is not Hopper (9, 0)"
    if problem.dtype not in ("bfloat16", "float16"):
        return f"dtype {problem.dtype} is neither bfloat16 nor float16"
    for name, head_dim in (("head_dim", problem.head_dim), ("head_dim_v", problem.head_dim_v)):
        if head_dim > 256:
            return f"{name} {head_dim} > 256"
        if head_dim % 8:
            return f"{name} {head_dim} is not a multiple of 8"
    if problem.paged and choose_decode(problem) is None:
        return "keys in pages, and more than 8 rows for each key head or a head_dim beyond 128"
    if problem.packed:
        totals = problem.queries.total, problem.keys.total
        if not 0 < min(totals) <= max(totals) <= _MOST_PACKED_ROWS:
            return f"{totals} rows of packed queries and keys: neither is to be 0 or more than {_MOST_PACKED_ROWS}"
    if max(problem.seqlen_q, problem.seqlen_k) > LONGEST:
        return f"seqlen {max(problem.seqlen_q, problem.seqlen_k)} > {LONGEST}"
    if problem.batch * problem.heads_q * math.ceil(problem.seqlen_q / 64) >= 2**31:
        return "more than 2^31 query tiles"
    return None


def defers(problem: AttentionProblem) -> tuple[str, str] | None:
    """Whose kernels are faster at a problem that is not rejected, and why; None: nobody's (docs/log/0017, 0018).

    The decoding kernel shares the keys of a head out among at most 16 CTAs. A tile of the other kernel has 64 rows or
    more of one query head, and reads all keys that they see. Triton's kernels share keys out among all SMs, and have
    tiles of 16 rows, or of the rows of all query heads of a key head together.
    """
    if choose_decode(problem) is not None:
        heads = problem.batch * problem.heads_k
        if heads * CLUSTERS[-1] < problem.sm_count and problem.seqlen_k >= _FEW_HEADS_KEYS:
            return "triton", f"splits the keys of {heads} heads among all {problem.sm_count} SMs"
        return None
    if problem.seqlen_q == 1:
        return "triton", "is made for one query per sequence: heads packed, keys split"
    tiles = problem.batch * problem.heads_q * math.ceil(problem.seqlen_q / 64)
    if math.ceil(tiles / problem.sm_count) * problem.seqlen_k < _DEFERRED_KEYS:
        return None
    rows = problem.seqlen_q * problem.group_size
    if problem.group_size > 1 and rows <= 128:
        return "triton", f"packs the {problem.group_size} heads of a group: {rows} rows for each key head"
    if rows <= 16:
        return "triton", f"has tiles of 16 rows for {rows}, and splits keys where there are few"
    if 4 * tiles <= problem.sm_count:
        return "triton", f"splits the keys: {tiles} tiles of 64 rows for {problem.sm_count} SMs"
    return None


def configure(problem: AttentionProblem) -> ForwardConfig | DecodeConfig:
    """The kernel variant for a problem that is not rejected; its ``why`` is the reason for it."""
    return choose_decode(problem) or (choose_packed if problem.packed else choose_forward)(problem)


def prepare(problem: AttentionProblem, config: ForwardConfig | DecodeConfig) -> Run:
    """A callable (q, k, v, scale, *extras, out=None) -> (out, lse), all done that does not depend on these."""
    from flashcore.backends.hopper.kernels import kernel_of

    return kernel_of(config).launch(problem, config)


def copied(
    problem: AttentionProblem, config: ForwardConfig | DecodeConfig, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    *extras: torch.Tensor,
) -> tuple[tuple[str, str], ...]:  # fmt: skip
    """Which of q, k and v each call copies before it computes, and why."""
    from flashcore.backends.hopper import tma

    reasons = {
        name: tma.obstacle(tensor, broadcast=isinstance(config, DecodeConfig))
        for name, tensor in zip("qkv", (q, k, v), strict=True)
    }
    return tuple((name, reason) for name, reason in reasons.items() if reason is not None)
