"""PyTorch's own ``scaled_dot_product_attention``: the fallback on any device, differentiable as it stands.

SDPA's ``is_causal`` is aligned to the top left, ours to the bottom right; they agree when both lengths do. Otherwise:

- More queries than keys: the first queries see nothing and give zeros; the rest is a square causal problem.
- More keys than queries: an explicit mask, built for a chunk of queries at a time so that it stays small.

SDPA returns no LSE, so a problem that asks for it is rejected and goes to the next backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from flashcore.problem import AttentionProblem

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
    return None


def configure(problem: AttentionProblem) -> SdpaConfig:
    """Choose how grouped heads reach SDPA: of its kernels only flash reads them as they are.

    For all others ``enable_gqa=True`` would silently mean the unfused math path, which holds every score at once.
    """
    if problem.group_size == 1:
        return SdpaConfig(False, "as many key heads as query heads")
    flash = (
        problem.device == "cuda"
        and problem.arch >= (8, 0)
        and problem.dtype in ("bfloat16", "float16")
        and problem.head_dim == problem.head_dim_v <= 256
        and not _needs_mask(problem)
    )
    if flash:
        return SdpaConfig(False, "SDPA's flash kernel reads grouped heads as they are")
    return SdpaConfig(
        True, "SDPA's flash kernel, the only one for grouped heads, does not apply: K and V are repeated"
    )


def forward(
    problem: AttentionProblem, config: SdpaConfig, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, None]:
    if config.expand_heads:
        k = k.repeat_interleave(problem.group_size, dim=2)
        v = v.repeat_interleave(problem.group_size, dim=2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # views (B, H, S, D), as SDPA wants them
    sdpa = partial(
        F.scaled_dot_product_attention,
        scale=problem.scale,
        enable_gqa=problem.group_size > 1 and not config.expand_heads,
    )
    with torch.autocast(q.device.type, enabled=False):
        if not problem.causal:
            out = sdpa(q, k, v)
        elif _needs_mask(problem):
            out = _causal_with_more_keys(problem, sdpa, q, k, v)
        else:
            empty = problem.mask.empty_rows
            out = sdpa(q[:, :, empty:], k, v, is_causal=problem.seqlen_k > 1)
            out = F.pad(out, (0, 0, empty, 0))
    return out.transpose(1, 2).contiguous(), None


def _needs_mask(problem: AttentionProblem) -> bool:
    return problem.causal and 1 < problem.seqlen_q < problem.seqlen_k


def _causal_with_more_keys(
    problem: AttentionProblem, sdpa, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
):
    """Bottom-right causal attention with an explicit mask, over (B, H, S, D) views."""
    chunk = max(1, CHUNK_MASK // problem.seqlen_k)
    outs = []
    for start in range(0, problem.seqlen_q, chunk):
        stop = min(start + chunk, problem.seqlen_q)
        _, seen = problem.mask.kv_range(start, stop)
        i = torch.arange(start, stop, device=q.device)[:, None]
        j = torch.arange(seen, device=q.device)[None, :]
        keep = problem.mask.keep(i, j)
        outs.append(sdpa(q[:, :, start:stop], k[:, :, :seen], v[:, :, :seen], attn_mask=keep))
    return torch.cat(outs, dim=2)
