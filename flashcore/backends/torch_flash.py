"""PyTorch's flash-attention backward, fed with the output and LSE of whichever forward ran."""

from __future__ import annotations

import torch

from flashcore.backends import sdpa
from flashcore.problem import LONGEST, AttentionProblem

FEATURES = frozenset({"partial"})


def unavailable() -> str | None:
    return None


def rejects(problem: AttentionProblem) -> str | None:
    if problem.device != "cuda" or torch.version.hip:
        return "a tensor that is not on an NVIDIA GPU"
    if problem.arch < (8, 0):
        return f"compute capability {problem.arch[0]}.{problem.arch[1]} < 8.0"
    if problem.dtype not in ("bfloat16", "float16"):
        return f"dtype {problem.dtype}"
    if problem.head_dim % 8:
        return f"head_dim {problem.head_dim}, not a multiple of 8"
    limit = 256 if problem.arch in ((8, 0), (9, 0), (10, 0)) else 192
    if problem.head_dim > limit:
        return f"head_dim {problem.head_dim} > {limit}"
    if problem.causal and problem.seqlen_q != problem.seqlen_k:
        return "causal with seqlen_q != seqlen_k"
    if problem.scale <= 0:
        return f"scale {problem.scale:g} <= 0"
    if max(problem.seqlen_q, problem.seqlen_k) > LONGEST:
        return f"seqlen {max(problem.seqlen_q, problem.seqlen_k)} > {LONGEST}"
    return None


def configure(problem: AttentionProblem) -> None:
    return None


def backward(
    problem: AttentionProblem, config: None, q, k, v, out, lse, dout, dlse
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.empty(0, dtype=torch.int64, device=q.device)  # its seed and offset, for dropout: unused
    grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *(sdpa.readable(t).transpose(1, 2) for t in (dout, q, k, v, out)),
        lse,
        None,  # cum_seq_q and cum_seq_k: all sequences have one length
        None,
        problem.seqlen_q,
        problem.seqlen_k,
        0.0,  # dropout_p
        problem.causal,
        generator,
        generator,
        scale=problem.scale,
    )
    dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
    return dq, dk, dv
