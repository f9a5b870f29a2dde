"""PyTorch's own ``scaled_dot_product_attention``: the fallback on any device, differentiable as it stands.

SDPA's ``is_causal`` is aligned to the top left, ours to the bottom right; they agree when both lengths do. Otherwise:

- More queries than keys: the first queries see nothing and give zeros; the rest is a square causal problem.
- More keys than queries, or a window: an explicit mask, built for a chunk of queries at a time so that it stays small.

SDPA returns no LSE, so a problem that asks for it is rejected and goes to the next backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch._C._nn import (
    scaled_dot_product_attention,  # PyTorch's own, whatever F's name stands for at the moment
)

from flashcore.problem import LONGEST, AttentionProblem

FEATURES = frozenset({"window", "head_dim_v"})
NATIVE_GRAD = True
HAS_BACKWARD = False

# Mask entries held at once when lengths differ: 2**24 are 16 MiB as bool, 32 MiB when SDPA widens them to half.
CHUNK_MASK = 2**24


@dataclass(frozen=True)
class SdpaConfig:
    """How the problem is put to SDPA."""

    expand_heads: bool  # repeat K and V to heads_q heads instead of passing enable_gqa=True
    why: str

    def __str__(self) -> str:
        return f"SdpaConfig(expand_heads={self.expand_heads})"


def unavailable() -> str | None:
    return None


def rejects(problem: AttentionProblem) -> str | None:
    if problem.return_lse:
        return "return_lse=True (PyTorch's SDPA returns no LSE)"
    if problem.device == "cuda" and max(problem.seqlen_q, problem.seqlen_k) > LONGEST:
        return f"seqlen {max(problem.seqlen_q, problem.seqlen_k)} > {LONGEST}"
    return None


def configure(problem: AttentionProblem) -> SdpaConfig:
    """Choose how grouped heads reach SDPA.

    Where none of its fused kernels takes them, ``enable_gqa=True`` would silently mean the math path, which holds every
    score at once.
    """
    if problem.group_size == 1:
        return SdpaConfig(False, "as many key heads as query heads")
    if _fused_kernel_takes_groups(problem):
        return SdpaConfig(False, "SDPA's flash kernel reads grouped heads where they are")
    return SdpaConfig(True, "K and V are repeated: with grouped heads SDPA would take its unfused path")


def _fused_kernel_takes_groups(problem: AttentionProblem) -> bool:
    if problem.head_dim != problem.head_dim_v:
        return False
    if problem.device == "cpu":
        return torch.__version__ >= (2, 9)  # https://github.com/pytorch/pytorch/pull/157893
    half = problem.dtype in ("bfloat16", "float16")
    return (problem.arch or (0, 0)) >= (8, 0) and half and problem.head_dim <= 256 and not _needs_mask(problem)


def forward(
    problem: AttentionProblem, config: SdpaConfig, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, None]:
    if config.expand_heads:
        k, v = (t.repeat_interleave(problem.group_size, dim=2) for t in (k, v))
    scale = problem.scale
    if scale <= 0:  # fused kernels mask with -inf before they scale: NaN or +inf unless the scale is positive
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    q, k, v = (readable(t).transpose(1, 2) for t in (q, k, v))  # (B, H, S, D), as SDPA wants them
    sdpa = partial(
        scaled_dot_product_attention,
        scale=scale,
        enable_gqa=problem.group_size > 1 and not config.expand_heads,
    )
    with torch.autocast(q.device.type, enabled=False):
        empty = problem.visible.empty_rows
        if not _hides(problem):
            out = sdpa(q, k, v)
        elif _needs_mask(problem):
            out = _with_a_mask(problem, sdpa, q[:, :, empty:], k, v)
            out = F.pad(out, (0, 0, empty, 0)) if empty else out
        else:
            out = sdpa(q[:, :, empty:], k, v, is_causal=True)
            out = F.pad(out, (0, 0, empty, 0)) if empty else out
    return out.transpose(1, 2).contiguous(), None


def _needs_mask(problem: AttentionProblem) -> bool:
    return _hides(problem) and not (problem.causal and problem.seqlen_q >= problem.seqlen_k)


def _hides(problem: AttentionProblem) -> bool:
    """Whether the mask hides a key from some query."""
    return problem.visible.bounded_left or problem.visible.bounded_right


def _with_a_mask(problem: AttentionProblem, sdpa, q, k, v) -> torch.Tensor:
    """The queries that see a key, with an explicit mask, on (B, H, S, D) views."""
    visible, empty = problem.visible, problem.visible.empty_rows
    chunk = max(1, CHUNK_MASK // problem.seqlen_k)
    outs = []
    for start in range(empty, problem.seqlen_q, chunk):
        stop = min(start + chunk, problem.seqlen_q)
        begin, end = visible.kv_range(start, stop)
        i = torch.arange(start, stop, device=q.device)[:, None]
        j = torch.arange(begin, end, device=q.device)[None, :]
        rows, keys = slice(start - empty, stop - empty), slice(begin, end)
        outs.append(sdpa(q[:, :, rows], k[:, :, keys], v[:, :, keys], attn_mask=visible.keep(i, j)))
    return torch.cat(outs, dim=2)


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as PyTorch's fused kernels need it, copied if it is not.

    With a strided last dimension they decline. On CUDA they read 16 bytes at a time and do not check that the base and
    the strides allow it: with torch 2.11 they returned what lies beside the tensor.
    """
    aligned = tensor.stride(-1) == 1
    if tensor.is_cuda:
        step = max(1, 16 // tensor.element_size())
        outer = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
        aligned &= tensor.data_ptr() % 16 == 0 and all(size == 1 or stride % step == 0 for size, stride in outer)
    return tensor if aligned else tensor.clone(memory_format=torch.contiguous_format)
