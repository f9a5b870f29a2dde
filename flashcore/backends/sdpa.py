"""PyTorch's own ``scaled_dot_product_attention``: the fallback on any device, differentiable as it stands.

SDPA's ``is_causal`` is aligned to the top left, ours to the bottom right; they agree when both lengths do. Otherwise:

- More queries than keys: the first queries see nothing and give zeros; the rest is a square causal problem.
- More keys than queries, or a window: an explicit mask, built for a chunk of queries at a time so that it stays small.

SDPA returns no LSE, but its fused kernels do, and are asked for it where they have it right. On a CPU they need help:
NaN and infinite scores give zeros where keys are few or the dtype is half, those of keys that an explicit mask hides
reach the output, and rows that overlap are read wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch._C._nn import (
    scaled_dot_product_attention,  # PyTorch's own, whatever F's name stands for at the moment
)

from flashcore.backends import reference
from flashcore.problem import LONGEST, AttentionProblem
from flashcore.watching import is_transformed

FEATURES = frozenset({"window", "head_dim_v", "partial"})
NATIVE_GRAD = True

# Mask entries held at once when lengths differ: 2**24 are 16 MiB as bool, 32 MiB when SDPA widens them to half.
CHUNK_MASK = 2**24

# With fewer keys than a CPU's widest vector holds, PyTorch's kernel loses NaN scores and answers 0.
FEW_KEYS = 16


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
    if problem.return_lse and (feature := _lacks_lse(problem)) is not None:
        return f"return_lse=True with {feature}: PyTorch gives the LSE by its fused kernels alone"
    if problem.device == "cuda" and max(problem.seqlen_q, problem.seqlen_k) > LONGEST:
        return f"seqlen {max(problem.seqlen_q, problem.seqlen_k)} > {LONGEST}"
    return None


def _lacks_lse(problem: AttentionProblem) -> str | None:
    """The feature for which no kernel of PyTorch's gives the LSE, or not a right one; None if one does."""
    if problem.device == "cpu":
        return None if _few_keys(problem) else unfused(problem)
    if torch.version.hip:
        return "an AMD GPU"
    if _needs_mask(problem):
        return "a mask that is not its own"
    if _flash_takes(problem):
        return None if problem.head_dim % 8 == 0 else f"head_dim {problem.head_dim}, not a multiple of 8"
    return unfused(problem)


def unfused(problem: AttentionProblem) -> str | None:
    """The feature for which PyTorch would hold every score at once; None if one of its fused kernels takes it."""
    if problem.device == "cpu":
        same = problem.head_dim == problem.head_dim_v
        return None if same else f"head_dim_v {problem.head_dim_v} != head_dim {problem.head_dim}"
    if _flash_takes(problem):
        return None
    if problem.dtype == "float64":
        return "dtype float64"
    step = 4 if problem.dtype == "float32" else 8  # its memory-efficient kernel reads 16 bytes at a time
    for name, size in {"head_dim": problem.head_dim, "head_dim_v": problem.head_dim_v}.items():
        if size % step:
            return f"{name} {size}, not a multiple of {step}"
    return None


def _flash_takes(problem: AttentionProblem) -> bool:
    """Whether it is one for PyTorch's flash kernel on a GPU."""
    half = problem.dtype in ("bfloat16", "float16")
    fits = problem.head_dim == problem.head_dim_v <= 256
    return (problem.arch or (0, 0)) >= (8, 0) and half and fits and not _needs_mask(problem)


def configure(problem: AttentionProblem) -> SdpaConfig:
    """Choose how grouped heads reach SDPA.

    Where none of its fused kernels takes them, ``enable_gqa=True`` would silently mean the math path, which holds every
    score at once.
    """
    if _few_keys(problem):
        return SdpaConfig(False, f"fewer than {FEW_KEYS} keys: operation by operation, as PyTorch's kernel loses NaN")
    if problem.group_size == 1:
        return SdpaConfig(False, "as many key heads as query heads")
    if _fused_kernel_takes_groups(problem):
        return SdpaConfig(False, "SDPA's flash kernel reads grouped heads where they are")
    return SdpaConfig(True, "K and V are repeated: with grouped heads SDPA would take its unfused path")


def _fused_kernel_takes_groups(problem: AttentionProblem) -> bool:
    if problem.device == "cpu":
        newer = torch.__version__ >= (2, 9)  # https://github.com/pytorch/pytorch/pull/157893
        return newer and unfused(problem) is None
    return _flash_takes(problem)


def forward(
    problem: AttentionProblem, config: SdpaConfig, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    transformed = is_transformed(q, k, v)
    if _few_keys(problem) or (problem.return_lse and transformed):  # nobody has rules for kernels that give the LSE
        return reference.forward(problem, None, q, k, v)
    if problem.device == "cpu" and _needs_mask(problem) and not (transformed or k.isfinite().all()):
        return reference.forward(problem, None, q, k, v)  # PyTorch adds masks: of hidden keys NaN would stay
    if config.expand_heads:
        k, v = (t.repeat_interleave(problem.group_size, dim=2) for t in (k, v))
    scale = problem.scale
    if scale <= 0:  # fused kernels mask with -inf before they scale: NaN or +inf unless the scale is positive
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    dtype = q.dtype
    q, k, v = (readable(t).transpose(1, 2) for t in (q, k, v))  # (B, H, S, D), as SDPA wants them
    grouped = problem.group_size > 1 and not config.expand_heads
    attend = partial(_kernel(problem, transformed), scale=scale, enable_gqa=grouped)
    with torch.autocast(q.device.type, enabled=False):
        if not _hides(problem):
            out, lse = attend(q, k, v)
        else:
            empty = problem.visible.empty_rows
            if _needs_mask(problem):
                out, lse = _with_a_mask(problem, attend, q[:, :, empty:], k, v)
            else:
                out, lse = attend(q[:, :, empty:], k, v, is_causal=True)
            if empty:
                out = F.pad(out, (0, 0, empty, 0))
                lse = None if lse is None else F.pad(lse, (empty, 0), value=-torch.inf)
    if not problem.partial:
        out, lse = out.to(dtype), None if lse is None else lse.float()
    return out.transpose(1, 2).contiguous(), None if lse is None else lse.contiguous()


def _few_keys(problem: AttentionProblem) -> bool:
    return problem.device == "cpu" and problem.seqlen_k < FEW_KEYS


def _needs_mask(problem: AttentionProblem) -> bool:
    return _hides(problem) and not (problem.causal and problem.seqlen_q >= problem.seqlen_k)


def _hides(problem: AttentionProblem) -> bool:
    """Whether the mask hides a key from some query."""
    return problem.visible.bounded_left or problem.visible.bounded_right


def _with_a_mask(problem: AttentionProblem, attend: Attend, q, k, v) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The queries that see a key, with an explicit mask, on (B, H, S, D) views."""
    visible, empty = problem.visible, problem.visible.empty_rows
    chunk = max(1, CHUNK_MASK // problem.seqlen_k)
    outs, lses = [], []
    for start in range(empty, problem.seqlen_q, chunk):
        stop = min(start + chunk, problem.seqlen_q)
        begin, end = visible.kv_range(start, stop)
        i = torch.arange(start, stop, device=q.device)[:, None]
        j = torch.arange(begin, end, device=q.device)[None, :]
        rows, keys = slice(start - empty, stop - empty), slice(begin, end)
        out, lse = attend(q[:, :, rows], k[:, :, keys], v[:, :, keys], attn_mask=visible.keep(i, j))
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=2), None if lses[0] is None else torch.cat(lses, dim=2)


# ---- PyTorch's functions, each as (q, k, v, attn_mask, is_causal, scale, enable_gqa) -> (out, lse or None) ---------

Attend = Callable[..., "tuple[torch.Tensor, torch.Tensor | None]"]


def _kernel(problem: AttentionProblem, transformed: bool) -> Attend:
    """Which of them computes this problem."""
    with_lse = problem.return_lse and _lacks_lse(problem) is None
    half = problem.dtype in ("bfloat16", "float16")
    if problem.device == "cpu":
        if with_lse:
            return _by_cpu_kernel_with_lse
        return _by_cpu_kernel_for_half if half and not transformed and unfused(problem) is None else _by_sdpa
    if with_lse:
        return _by_flash_kernel if _flash_takes(problem) else _by_efficient_kernel
    return _by_sdpa


def _by_sdpa(q, k, v, **options):
    return scaled_dot_product_attention(q, k, v, **options), None


def _by_cpu_kernel_for_half(q, k, v, **options):
    """What SDPA takes on a CPU, but NaN where a score is +inf: the kernel's exponential of inf - inf is 0 in half."""
    out, lse = _cpu_kernel(q, k, v, **options)
    return out.masked_fill((lse.isnan() | lse.isposinf())[..., None], torch.nan), None


def _by_cpu_kernel_with_lse(q, k, v, attn_mask=None, **options):
    """The same in float32, since the LSE that the kernel gives in half is 6e-5 off, or in float64."""
    exact = torch.float64 if q.dtype is torch.float64 else torch.float32
    q, k, v = q.to(exact), k.to(exact), v.to(exact)
    out, lse = _cpu_kernel(q, k, v, attn_mask=attn_mask, **options)
    if (lse == 0).any():  # so it is for a row whose scores are all -inf, too: that of its first key tells
        first = 0 if attn_mask is None else attn_mask.int().argmax(dim=-1)
        keys = k.detach()[:, :, first].repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = torch.einsum("bhid,bhd->bhi" if attn_mask is None else "bhid,bhid->bhi", q.detach(), keys)
        lse = lse.masked_fill((lse == 0) & scores.isneginf(), -torch.inf)
    return out, lse


def _cpu_kernel(q, k, v, attn_mask=None, is_causal=False, *, scale, enable_gqa):
    bias = None if attn_mask is None else q.new_zeros(attn_mask.shape).masked_fill(~attn_mask, -torch.inf)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, is_causal=is_causal, attn_mask=bias, scale=scale
    )


def _by_flash_kernel(q, k, v, is_causal=False, *, scale, enable_gqa):
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=is_causal, scale=scale)
    return out, _signed(lse, out)


def _by_efficient_kernel(q, k, v, is_causal=False, *, scale, enable_gqa):
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, is_causal=is_causal, scale=scale
    )
    return out, _signed(lse[:, :, : q.shape[2]], out)  # it is padded


def _signed(lse: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The LSE with -inf, not +inf, for rows whose scores are all -inf, whose output is 0, and NaN for those of NaN."""
    return lse.masked_fill(lse.isposinf(), -torch.inf).masked_fill(out[..., 0].isnan(), torch.nan)


# ---- memory --------------------------------------------------------------------------------------------------------


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as PyTorch's fused kernels need it, copied if it is not.

    With a strided last dimension they decline. On CUDA they read 16 bytes at a time and do not check that the base and
    the strides allow it: with torch 2.11 they returned what lies beside the tensor. On a CPU they lay the output out in
    the order of q's strides, and write as if its last dimension were the innermost.
    """
    sizes, strides = tensor.shape[:-1], tensor.stride()[:-1]
    outer = [stride for size, stride in zip(sizes, strides, strict=True) if size > 1]
    fits = tensor.stride(-1) == 1
    if tensor.is_cuda:
        step = max(1, 16 // tensor.element_size())
        fits &= tensor.data_ptr() % 16 == 0 and all(stride % step == 0 for stride in outer)
    else:
        fits &= not any(0 < stride < tensor.shape[-1] for stride in outer)
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)
