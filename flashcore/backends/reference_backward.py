"""The specification of the gradients: from the output and the LSE, in plain torch, as kernels compute them.

Only parts of the keys need it (`partial` in ``backends.FEATURES``); autograd differentiates the reference otherwise.
"""

from __future__ import annotations

import torch

from flashcore.backends import reference
from flashcore.problem import AttentionProblem

FEATURES = frozenset({"window", "head_dim_v", "dlse", "partial"})


def unavailable() -> str | None:
    return None


def rejects(problem: AttentionProblem) -> str | None:
    return None


def configure(problem: AttentionProblem) -> None:
    return None


def backward(
    problem: AttentionProblem, config: None, q, k, v, out, lse, dout, dlse
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    exact = torch.float64 if q.dtype is torch.float64 else torch.float32
    grouped = problem.heads_k, problem.group_size
    chunk = max(1, reference.CHUNK_SCORES // (problem.batch * problem.heads_q * problem.seqlen_k))
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        qs, outs, douts = (t.to(exact).unflatten(2, grouped) for t in (q, out, dout))
        keys, values = k.to(exact), v.to(exact)
        lses = lse.to(exact).unflatten(1, grouped)[..., None]
        deltas = torch.einsum("bikgd,bikgd->bkgi", outs, douts)[..., None]
        if dlse is not None:
            deltas = deltas - dlse.to(exact).unflatten(1, grouped)[..., None]
        dq, dk, dv = torch.empty_like(qs), torch.zeros_like(keys), torch.zeros_like(values)
        j = torch.arange(problem.seqlen_k, device=q.device)
        for start in range(0, problem.seqlen_q, chunk):
            rows = slice(start, start + chunk)
            i = torch.arange(start, start + qs[:, rows].shape[1], device=q.device)[:, None]
            hidden = ~problem.visible.keep(i, j) | lses[..., rows, :].isneginf()
            scores = torch.einsum("bikgd,bjkd->bkgij", qs[:, rows], keys) * problem.scale
            probabilities = (scores - lses[..., rows, :]).exp().masked_fill(hidden, 0.0)
            dv += torch.einsum("bkgij,bikgd->bjkd", probabilities, douts[:, rows])
            dprobabilities = torch.einsum("bikgd,bjkd->bkgij", douts[:, rows], values)
            dscores = probabilities * (dprobabilities - deltas[..., rows, :]) * problem.scale
            dq[:, rows] = torch.einsum("bkgij,bjkd->bikgd", dscores, keys)
            dk += torch.einsum("bkgij,bikgd->bjkd", dscores, qs[:, rows])
    dtype = exact if problem.partial else q.dtype
    return dq.flatten(2, 3).to(dtype), dk.to(dtype), dv.to(dtype)
