"""Attention over a ring of ranks: every rank keeps its queries, and the keys and values of all others pass by.

In step t rank r computes with the keys and values of rank r - t. They come from there directly, and only those that one
of r's queries sees: the next ones are on their way while a step computes, and what a mask hides is neither sent nor
computed. In the backward pass the gradients of a visitor's keys and values go home in float32 in the same manner, and
are added there in the order of the steps. Nothing here waits for a GPU.

Each step gives an output and an LSE (a ``partial`` problem). They are merged in float32, in float64 where the inputs
are: the output stays a weighted mean, and is rounded once, at the end. Sinks join the merge as one more part.

With a block length (`Ring.block`) the order is fixed: blocks of the sequence are computed each alone and added in the
order of the sequence, so that the bits depend on that length and not on the number of ranks. All keys and values are
gathered for it, and for the backward pass all queries, whose blocks are computed twice, once for either side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.distributed as dist

from flashcore import gradients
from flashcore import plan as planning
from flashcore.api import refuse_second_derivative
from flashcore.calls import on_its_device
from flashcore.distributed.layout import Band, Layout, Share, bands, span, whole
from flashcore.plan import Plan
from flashcore.problem import AttentionProblem

Tensor = torch.Tensor


@dataclass(frozen=True)
class Ring:
    """One kind of call on one rank."""

    group: dist.ProcessGroup
    layout: Layout
    rank: int
    problem: AttentionProblem  # with one rank's lengths, and the mask of the whole sequences
    backend: str
    forced: planning.Override | None  # as the forward pass finds it: the backward pass may run in another thread
    block: int | None

    @property
    def sees(self) -> tuple[Share, Share, int]:
        """(the shares of this rank's queries and keys, how many more keys than queries the sequences have)."""
        ranks, lengths = self.layout.ranks, (self.problem.seqlen_q, self.problem.seqlen_k)
        queries, keys = (Share(self.layout, self.rank, length) for length in lengths)
        return queries, keys, (lengths[1] - lengths[0]) * ranks

    def bands(self, rank: int, source: int) -> tuple[Band, ...]:
        """What `rank`'s queries see of `source`'s keys."""
        queries, keys, offset = self.sees
        if self.problem.is_empty:
            return ()
        return bands(self.problem.mask, offset, replace(queries, rank=rank), replace(keys, rank=source))

    def peer(self, distance: int) -> int:
        """The rank so many places further on."""
        return (self.rank + distance) % self.layout.ranks

    def visits(self, k: Tensor, v: Tensor) -> Iterator[tuple[int, tuple[Band, ...], int, Tensor, Tensor]]:
        """(step, what this rank sees, first key, keys, values) for one rank after the other, this one first."""
        here, first = [k, v], 0
        for step in range(self.layout.ranks):
            found = self.bands(self.rank, self.peer(-step))
            coming = self._pass_on(step + 1, k, v) if step + 1 < self.layout.ranks else None
            yield step, found, first, *here
            if coming is not None:
                here, first = coming.wait(), span(self.bands(self.rank, self.peer(-step - 1)))[0]

    def _pass_on(self, step: int, k: Tensor, v: Tensor) -> Exchange:
        """What the rank `step` places further on sees goes there; what this one sees comes from the other side."""
        begin, end = span(self.bands(self.peer(step), self.rank))
        first, last = span(self.bands(self.rank, self.peer(-step)))
        received = [t.new_empty((t.shape[0], last - first, *t.shape[2:])) for t in (k, v)]
        sent = [t[:, begin:end].contiguous() for t in (k, v)]
        return Exchange(self.group, self.peer(step), sent, self.peer(-step), received)

    def return_home(self, step: int, dk: Tensor, dv: Tensor) -> tuple[Exchange, int, int]:
        """The gradients of a visitor's keys and values go back; those of this rank's come from the other side.

        Returns what is on its way, and the keys of this rank that it is for.
        """
        begin, end = span(self.bands(self.peer(step), self.rank))
        received = [t.new_empty((t.shape[0], end - begin, *t.shape[2:])) for t in (dk, dv)]
        return Exchange(self.group, self.peer(-step), [dk, dv], self.peer(step), received), begin, end

    def gather(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """The whole sequence of what every rank has a share of."""
        return gather(self.group, self.layout, tensor, dim)

    def cut(self, tensor: Tensor, start: int, stop: int, dim: int = 1) -> Tensor:
        """Some rows or keys. In blocks they are copied, so that strides and addresses do not depend on the ranks."""
        part = tensor.narrow(dim, start, stop - start)
        return part.clone(memory_format=torch.contiguous_format) if self.block else part


class Exchange:
    """Tensors on their way to one rank of a group and from another; empty ones are not sent."""

    def __init__(self, group: dist.ProcessGroup, to: int, sent: list[Tensor], source: int, received: list[Tensor]):
        self._sent, self._received = sent, received  # kept until they have been read and written
        operations = [
            dist.P2POp(operation, tensor, dist.get_global_rank(group, rank), group)
            for operation, rank, tensors in ((dist.isend, to, sent), (dist.irecv, source, received))
            for tensor in tensors
            if tensor.numel()
        ]
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> list[Tensor]:
        """What was received. On a GPU its stream waits, not the host."""
        for work in self._works:
            work.wait()
        return self._received


def gather(group: dist.ProcessGroup, layout: Layout, tensor: Tensor, dim: int) -> Tensor:
    """The whole sequence of what every rank of the group has a share of."""
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(layout.ranks)]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return layout.join(parts, dim)


@lru_cache(maxsize=4096)
def plan_of(part: Band, problem: AttentionProblem, backend: str, forced: planning.Override | None) -> Plan:
    """Who computes a part. `forced` is what `planning` sees anyway: plans differ by it."""
    lengths = {"seqlen_q": part.rows[1] - part.rows[0], "seqlen_k": part.keys[1] - part.keys[0]}
    return planning.prepared_plan(replace(problem, **lengths, mask=part.mask), backend)


def area(part: Band) -> int:
    return (part.rows[1] - part.rows[0]) * (part.keys[1] - part.keys[0])


def exact(tensor: Tensor) -> torch.dtype:
    """The dtype that parts are merged and gradients are summed in."""
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Make (out, lse) that of its own keys and the other's, in place: out (B, S, H, D), lse (B, H, S).

    One pass over the output. A part that sees nothing has an LSE of -inf, and changes nothing.
    """
    weight = torch.sigmoid(other_lse - lse).masked_fill(other_lse.isneginf(), 0.0)
    out.lerp_(other.to(out.dtype), weight.transpose(1, 2)[..., None])
    lse.copy_(torch.logaddexp(lse, other_lse))


# ---- the passes, of (B, S, H, D) tensors with one rank's tokens ------------------------------------------------------


def forward(ring: Ring, q, k, v, sink: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    """(out, lse) of this rank's queries, unrounded."""
    out = q.new_zeros(ring.problem.out_shape, dtype=exact(q))
    lse = q.new_full(ring.problem.lse_shape, -torch.inf, dtype=exact(q))
    if ring.block:
        k, v = ring.gather(k), ring.gather(v)
        queries, _, offset = ring.sees
        steps = [(0, bands(ring.problem.mask, offset, queries, whole(k.shape[1]), ring.block), 0, k, v)]
    else:
        steps = ring.visits(k.contiguous(), v.contiguous())
    for _, found, first, keys, values in steps:
        for part in found:
            begin, end = part.keys[0] - first, part.keys[1] - first
            run = on_its_device(q, plan_of(part, ring.problem, ring.backend, ring.forced).run)
            one = run(ring.cut(q, *part.rows), ring.cut(keys, begin, end), ring.cut(values, begin, end), scale)
            _merge_rows(ring, out, lse, part.rows, *one)
    if sink is not None:
        tokens = ring.problem.seqlen_q
        length = ring.block or max(tokens, 1)
        for start in range(0, tokens, length):
            rows = start, start + length
            _merge_rows(ring, out, lse, rows, out.new_zeros(1), sink.to(lse.dtype)[:, None])
    return out, lse


def _merge_rows(ring: Ring, out: Tensor, lse: Tensor, rows: tuple[int, int], other: Tensor, other_lse: Tensor) -> None:
    """`merge` into some rows of (out, lse)."""
    of_rows = ring.cut(out, *rows), ring.cut(lse, *rows, dim=2)
    merge(*of_rows, other, other_lse)
    if ring.block:  # they are copies
        out[:, slice(*rows)], lse[:, :, slice(*rows)] = of_rows


def backward(ring: Ring, q, k, v, out, lse, dout, dlse, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of this rank's tokens, unrounded; `out` and `lse` are those of all keys, dlse may be None."""
    dq, dk, dv = (t.new_zeros(t.shape, dtype=exact(t)) for t in (q, k, v))
    if ring.block:
        queries, keys, offset = ring.sees
        every_k, every_v = ring.gather(k), ring.gather(v)
        for part in bands(ring.problem.mask, offset, queries, whole(every_k.shape[1]), ring.block):
            one, _, _ = _gradients(ring, part, 0, q, every_k, every_v, out, lse, dout, dlse, scale)
            dq[:, slice(*part.rows)] += one
        every_q, every_out, every_dout = map(ring.gather, (q, out, dout))
        stats = ring.gather(lse, dim=2), dlse if dlse is None else ring.gather(dlse, dim=2)
        for part in bands(ring.problem.mask, offset, whole(every_q.shape[1]), keys, ring.block):
            _, *both = _gradients(ring, part, 0, every_q, k, v, every_out, stats[0], every_dout, stats[1], scale)
            for total, one in zip((dk, dv), both, strict=True):
                total[:, slice(*part.keys)] += one
        return dq, dk, dv

    returning = None
    for step, found, first, keys, values in ring.visits(k.contiguous(), v.contiguous()):
        visitors = [dk, dv] if step == 0 else [t.new_zeros(t.shape, dtype=exact(t)) for t in (keys, values)]
        for part in found:
            one, *both = _gradients(ring, part, first, q, keys, values, out, lse, dout, dlse, scale)
            dq[:, slice(*part.rows)] += one
            for total, one in zip(visitors, both, strict=True):
                total[:, part.keys[0] - first : part.keys[1] - first] += one
        _add(returning, dk, dv)
        returning = ring.return_home(step, *visitors) if step else None
    _add(returning, dk, dv)
    return dq, dk, dv


def _gradients(ring: Ring, part: Band, first: int, q, keys, values, out, lse, dout, dlse, scale) -> tuple[Tensor, ...]:
    """What a part adds to dq of its rows, dk and dv of its keys. `keys` are those of its rank from `first` on."""
    plan = plan_of(part, ring.problem, ring.backend, ring.forced)
    of_rows = (ring.cut(t, *part.rows) for t in (q, out, dout))
    of_keys = (ring.cut(t, part.keys[0] - first, part.keys[1] - first) for t in (keys, values))
    (q, out, dout), (k, v), lse = of_rows, of_keys, ring.cut(lse, *part.rows, dim=2)
    chosen = plan.backward
    if dlse is not None:
        chosen, dlse = plan.backward_with_dlse, ring.cut(dlse, *part.rows, dim=2)
    return on_its_device(q, chosen.run)(q, k, v, out.contiguous(), lse.contiguous(), dout, dlse, scale)


def _add(returning: tuple[Exchange, int, int] | None, dk: Tensor, dv: Tensor) -> None:
    """Add the gradients that come home to those that are there."""
    if returning is not None:
        exchange, begin, end = returning
        for total, one in zip((dk, dv), exchange.wait(), strict=True):
            total[:, begin:end] += one


class RingAttention(torch.autograd.Function):
    """(out, lse) of this rank's queries."""

    @staticmethod
    def forward(ring: Ring, scale, q, k, v, sink):
        out, lse = forward(ring, q, k, v, sink, scale)
        return out.to(q.dtype), lse

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.ring, ctx.scale, *tensors = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)  # whether the loss depends on the LSE makes a difference

    @staticmethod
    def backward(ctx, dout, dlse):
        if torch.is_grad_enabled():
            refuse_second_derivative()
        q, k, v, sink, out, lse = ctx.saved_tensors
        dout, dlse = gradients.of_results(out, lse, dout, dlse)
        grads = backward(ctx.ring, q, k, v, out, lse, dout, dlse, ctx.scale)
        dsink = gradients.of_sinks(sink, out, lse, dout, dlse) if ctx.needs_input_grad[5] else None
        return None, None, *(grad.to(q.dtype) for grad in grads), dsink
