"""Ulysses: every rank gets all tokens of some heads, computes an ordinary attention, and gives the tokens back.

Four exchanges of all with all: of q, k and v before, of the output after; autograd does them the other way round for
the gradients. Where there are fewer key heads than ranks, a key head goes to several.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from flashcore import api
from flashcore.distributed.layout import Layout
from flashcore.problem import AttentionProblem


def lacks(heads_q: int, heads_k: int, ranks: int) -> str | None:
    """Why heads cannot be shared by so many ranks; None if they can."""
    if heads_q % ranks:
        return f"heads_q={heads_q} is not a multiple of {ranks} ranks"
    if heads_k % ranks and ranks % heads_k:
        return f"heads_k={heads_k} is neither a multiple nor a divisor of {ranks} ranks"
    return None


def received(problem: AttentionProblem, rows: dict[str, int], ranks: int) -> int:
    """Bytes that each rank receives in the forward pass, of whose q and k it has so many rows."""
    of_queries, of_keys = rows["q"] * problem.heads_q, rows["k"] * max(problem.heads_k, ranks)
    batch = 1 if problem.packed else problem.batch
    elements = (of_queries + of_keys) * (problem.head_dim + problem.head_dim_v) * batch
    return elements * getattr(torch, problem.dtype).itemsize * (ranks - 1) // ranks


def attention(group: dist.ProcessGroup, layout: Layout, rank: int, q, k, v, sink, return_lse: bool, **options):
    """(out, lse) of this rank's tokens; None for an LSE that nobody asked for."""
    packed = q.dim() == 3
    if packed:  # what is exchanged has a batch
        q, k, v = (t.unsqueeze(0) for t in (q, k, v))
    copies = max(1, layout.ranks // k.shape[2])
    k, v = (t if copies == 1 else t.repeat_interleave(copies, dim=2) for t in (k, v))
    q, k, v = (ToHeads.apply(group, layout, t) for t in (q, k, v))
    sink = None if sink is None else sink.chunk(layout.ranks)[rank]
    if packed:
        q, k, v = (t.squeeze(0) for t in (q, k, v))
    results = api.attention(q, k, v, sink=sink, return_lse=return_lse, **options)
    if not return_lse:
        return _home(group, layout, results, packed), None
    out, lse = results
    lse = _home(group, layout, lse.transpose(-2, -1)[..., None], packed)  # (B, S, H, 1)
    return _home(group, layout, out, packed), lse[..., 0].transpose(-2, -1).contiguous()


def _home(group: dist.ProcessGroup, layout: Layout, result: torch.Tensor, packed: bool) -> torch.Tensor:
    """This rank's tokens of a result."""
    if packed:
        return ToTokens.apply(group, layout, result.unsqueeze(0)).squeeze(0)
    return ToTokens.apply(group, layout, result)


def to_heads(group: dist.ProcessGroup, layout: Layout, tensor: torch.Tensor) -> torch.Tensor:
    """(B, tokens of this rank, H, D) -> (B, all tokens in their order, this rank's heads, D)."""
    received = _exchange(group, torch.stack(tensor.chunk(layout.ranks, dim=2)))
    return layout.join(list(received.unbind(0)), dim=1)


def to_tokens(group: dist.ProcessGroup, layout: Layout, tensor: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_heads`."""
    shares = [layout.shard(tensor, rank, dim=1) for rank in range(layout.ranks)]
    return torch.cat(list(_exchange(group, torch.stack(shares)).unbind(0)), dim=2).contiguous()


def _exchange(group: dist.ProcessGroup, sent: torch.Tensor) -> torch.Tensor:
    """By rank, what it sent here, of what is sent to each."""
    sent = sent.contiguous()  # stacked from what looks like channels-last it is not
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received


class ToHeads(torch.autograd.Function):
    """`to_heads`, whose gradient is `to_tokens`."""

    @staticmethod
    def forward(ctx, group, layout, tensor):
        ctx.options = group, layout
        return to_heads(group, layout, tensor)

    @staticmethod
    def backward(ctx, gradient):
        return None, None, ToTokens.apply(*ctx.options, gradient)


class ToTokens(torch.autograd.Function):
    """`to_tokens`, whose gradient is `to_heads`."""

    @staticmethod
    def forward(ctx, group, layout, tensor):
        ctx.options = group, layout
        return to_tokens(group, layout, tensor)

    @staticmethod
    def backward(ctx, gradient):
        return None, None, ToHeads.apply(*ctx.options, gradient)
