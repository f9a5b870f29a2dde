"""The specification: attention in plain torch, on any device, for any shape. Slow, and right.

Everything is computed in float32, for float64 inputs in float64, and rounded once at the end. What the other backends
have to match in the corners:

- A query that sees no key, or whose scores are all -inf, gives a zero row and an LSE of -inf.
- Scores of hidden keys are replaced, not added to, so a NaN or Inf in a hidden key never reaches the output.
- A hidden *value* is multiplied by the probability 0, so a NaN or Inf in it gives NaN, as in PyTorch's own attention.
  Kernels that skip blocks of hidden keys do better for those blocks; nobody may rely on it.
"""

from __future__ import annotations

import torch

from flashcore.problem import AttentionProblem

FEATURES = frozenset({"window", "score", "sink", "head_dim_v", "dlse", "partial"})
NATIVE_GRAD = True

# Scores held at once. 2**26 of them are 256 MiB in float32, a few times over; queries are processed in chunks of that.
CHUNK_SCORES = 2**26


def unavailable() -> str | None:
    return None


def rejects(problem: AttentionProblem) -> str | None:
    return None


def configure(problem: AttentionProblem) -> None:
    return None


def forward(
    problem: AttentionProblem, config: None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *extras: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    chunk = max(1, CHUNK_SCORES // (problem.batch * problem.heads_q * problem.seqlen_k))
    with torch.autocast(q.device.type, enabled=False):
        chunks = [
            _attend(problem, start, q[:, start : start + chunk], k, v, *extras)
            for start in range(0, problem.seqlen_q, chunk)
        ]
        out = torch.cat([out for out, _ in chunks], dim=1)
        lse = torch.cat([lse for _, lse in chunks], dim=2)
    return (out, lse) if problem.partial else (out.to(q.dtype), lse.float())


def _attend(
    problem: AttentionProblem, start: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *extras: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the queries from `start` on, as many as `q` holds: out (B, Sq, Hq, Dv), lse (B, Hq, Sq)."""
    exact = torch.float64 if q.dtype is torch.float64 else torch.float32
    q, k, v = q.to(exact), k.to(exact), v.to(exact)

    # Query head h reads key head h // group_size: split the query heads instead of repeating the keys.
    q = q.unflatten(2, (problem.heads_k, problem.group_size))
    scores = torch.einsum("bikgd,bjkd->bkgij", q, k) * problem.scale
    i = torch.arange(start, start + q.shape[1], device=q.device)[:, None]
    j = torch.arange(problem.seqlen_k, device=q.device)[None, :]
    if problem.score.change is not None:
        heads = torch.arange(problem.heads_q, device=q.device).view(-1, problem.group_size, 1, 1)
        batches = torch.arange(problem.batch, device=q.device).view(-1, 1, 1, 1, 1)
        names = {"score": scores, "batch": batches, "head": heads, "query": i, "key": j,
                 "offset": problem.visible.offset}  # fmt: skip
        captured = tuple(tensor.to(exact) for tensor in extras[: len(problem.score.captured)])
        scores = torch.as_tensor(problem.score.change.value(names, captured)).to(exact).expand_as(scores)
    scores = scores.masked_fill(~problem.visible.keep(i, j), -torch.inf)
    if problem.score.sink is not None:  # one more key, whose value is 0
        sink = extras[-1].to(exact).view(-1, problem.group_size, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
        v = torch.nn.functional.pad(v, (0, 0, 0, 0, 0, 1))

    empty = scores.detach().amax(dim=-1, keepdim=True).isneginf()
    # Filled before and after: the softmax of an empty row is NaN, and so would be its gradient, and that of its LSE.
    scores = scores.masked_fill(empty, 0.0)
    lse = scores.logsumexp(dim=-1).masked_fill(empty[..., 0], -torch.inf)
    probabilities = scores.softmax(dim=-1).masked_fill(empty, 0.0)
    out = torch.einsum("bkgij,bjkd->bikgd", probabilities, v)
    return out.flatten(2, 3), lse.flatten(1, 2)
