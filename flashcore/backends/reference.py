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

from flashcore.mask import Visible
from flashcore.problem import LONGEST, AttentionProblem
from flashcore.sequences import Packed, Paged

FEATURES = frozenset({"window", "score", "sink", "head_dim_v", "dlse", "partial", "packed", "paged"})
NATIVE_GRAD = True

# Scores held at once. 2**26 of them are 256 MiB in float32, a few times over; queries are processed in chunks of that.
CHUNK_SCORES = 2**26


def unavailable() -> str | None:
    return None


def rejects(problem: AttentionProblem) -> str | None:
    if problem.device == "cuda" and max(problem.seqlen_q, problem.seqlen_k) > LONGEST:  # PyTorch's products, too
        return f"seqlen {max(problem.seqlen_q, problem.seqlen_k)} > {LONGEST}"
    return None


def configure(problem: AttentionProblem) -> None:
    return None


def forward(
    problem: AttentionProblem, config: None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *extras: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        if problem.packed:
            out, lse = _each_sequence(problem, q, k, v, *extras)
        else:
            out, lse = _attention(problem, problem.visible, range(problem.batch), q, k, v, *extras)
    return (out, lse) if problem.partial else (out.to(q.dtype), lse.float())


def _each_sequence(
    problem: AttentionProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *extras: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed sequences, whose keys may be paged, one after the other: out (total, Hq, Dv), lse (Hq, total)."""
    queries, keys, extras = problem.split(extras)
    rows_q, rows_k = _rows(queries, q), _rows(keys, k)
    sequences = zip(_taken(q, rows_q), _taken(k, rows_k), _taken(v, rows_k), strict=True)
    each = [
        _attention(problem, problem.mask.of(queries.length(b), keys.length(b)), range(b, b + 1), *one, *extras)
        for b, one in enumerate(sequences)
    ]
    outs, lses = torch.cat([out[0] for out, _ in each]), torch.cat([lse[0] for _, lse in each], dim=1)
    out = outs.new_zeros(len(q) + 1, *outs.shape[1:]).index_copy(0, torch.cat(rows_q), outs)
    lse = lses.new_full((len(lses), len(q) + 1), -torch.inf).index_copy(1, torch.cat(rows_q), lses)
    return out[:-1], lse[:, :-1].contiguous()


def _rows(places: Packed | Paged, tensor: torch.Tensor) -> list[torch.Tensor]:
    """In which rows of `tensor` each sequence is. What is beyond its length, or no row of the tensor, is one past the
    tensor's end; none is without a row."""
    total, *page_size = tensor.shape[:-2].numel(), *tensor.shape[1:-2]
    rows = []
    for b in range(places.batch):
        i = torch.arange(max(1, _most(places, b)), device=tensor.device)
        at = places.at(b, i, *page_size)
        rows.append(torch.where((i < places.length(b)) & (at >= 0) & (at < total), at, total))
    return rows


def _most(places: Packed | Paged, b: int) -> int:
    """How many rows sequence `b` has at most. To count them one would have to wait for a GPU."""
    return places.longest if places.tensors[0].is_cuda else int(places.length(b))


def _taken(tensor: torch.Tensor, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each sequence's rows, as a batch of one: zeros past the end."""
    padded = torch.nn.functional.pad(tensor.flatten(0, -3), (0, 0, 0, 0, 0, 1))
    return [one[None] for one in padded.index_select(0, torch.cat(rows)).split(list(map(len, rows)))]


def _attention(
    problem: AttentionProblem, visible: Visible, batches: range, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    *extras: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention of these sequences of a batch, in chunks of queries: out (B, Sq, Hq, Dv), lse (B, Hq, Sq)."""
    chunk = max(1, CHUNK_SCORES // (len(batches) * problem.heads_q * k.shape[1]))
    chunks = [
        _attend(problem, visible, batches, start, q[:, start : start + chunk], k, v, *extras)
        for start in range(0, q.shape[1], chunk)
    ]
    return torch.cat([out for out, _ in chunks], dim=1), torch.cat([lse for _, lse in chunks], dim=2)


def _attend(
    problem: AttentionProblem, visible: Visible, batches: range, start: int, q: torch.Tensor, k: torch.Tensor,
    v: torch.Tensor, *extras: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention of the queries from `start` on, as many as `q` holds: out (B, Sq, Hq, Dv), lse (B, Hq, Sq)."""
    exact = torch.float64 if q.dtype is torch.float64 else torch.float32
    q, k, v = q.to(exact), k.to(exact), v.to(exact)

    # Query head h reads key head h // group_size: split the query heads instead of repeating the keys.
    q = q.unflatten(2, (problem.heads_k, problem.group_size))
    scores = torch.einsum("bikgd,bjkd->bkgij", q, k) * problem.scale
    i = torch.arange(start, start + q.shape[1], device=q.device)[:, None]
    j = torch.arange(k.shape[1], device=q.device)[None, :]
    if problem.score.change is not None:
        heads = torch.arange(problem.heads_q, device=q.device).view(-1, problem.group_size, 1, 1)
        batch = torch.arange(batches.start, batches.stop, device=q.device).view(-1, 1, 1, 1, 1)
        names = {"score": scores, "batch": batch, "head": heads, "query": i, "key": j,
                 "offset": visible.offset}  # fmt: skip
        captured = tuple(tensor.to(exact) for tensor in extras[: len(problem.score.captured)])
        scores = torch.as_tensor(problem.score.change.value(names, captured)).to(exact).expand_as(scores)
    scores = scores.masked_fill(~visible.keep(i, j), -torch.inf)
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
