"""Attention over one sequence that lies on several devices, each with a share of its tokens.

>>> from flashcore import distributed
>>> q, k, v = (distributed.shard(t, layout="zigzag") for t in (q, k, v))  # (batch, seqlen / ranks, heads, head_dim)
>>> out = distributed.attention(q, k, v, causal=True, layout="zigzag")
>>> print(distributed.explain(q, k, v, causal=True, layout="zigzag"))

Every rank of a group makes the same call, once ``torch.distributed`` is initialised: with NCCL for tensors on GPUs,
each rank with its own as the current one, with Gloo on a CPU. ``docs/distributed.md`` compares methods and layouts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, overload
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from flashcore import calls, score
from flashcore import plan as planning
from flashcore.distributed import ring, ulysses
from flashcore.distributed.layout import Layout, span
from flashcore.errors import FlashCoreError, InvalidInputError, UnsupportedError
from flashcore.plan import Plan
from flashcore.problem import AttentionProblem
from flashcore.sequences import Packed
from flashcore.watching import answers_itself, is_transformed, is_watched

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["DistributedPlan", "attention", "explain", "gather", "positions", "shard"]

METHODS = ("auto", "ring", "ulysses")

# What the ranks of a group have agreed on. On GPUs a kind of call is compared once, as that waits for them.
_agreed: WeakKeyDictionary[ProcessGroup, set[str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class DistributedPlan:
    """What one rank does for a call. ``print`` it, or read the fields."""

    method: str  # "ring" or "ulysses"
    why: str
    layout: str  # "contiguous" or "zigzag"
    ranks: int
    rank: int
    steps: int  # in how many of the ring's steps this rank computes something; 1 for Ulysses
    received: int  # bytes that the busiest rank receives in the forward pass
    plan: Plan | None  # of the largest part that this rank computes at once; None if it computes none

    def __str__(self) -> str:
        lines = [
            ("method", f"{self.method}: {self.why}"),
            ("layout", f"{self.layout}, rank {self.rank} of {self.ranks}, computes in {self.steps} steps"),
            ("received", f"{self.received / 2**20:.6g} MiB by the busiest rank in the forward pass"),
        ]
        return "\n".join([*(f"{label:<9} {text}" for label, text in lines), str(self.plan or "nothing to compute")])


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
    method: str = "auto",
    layout: str = "contiguous",
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    sink: torch.Tensor | None = None,
    queries: Packed | None = None,
    keys: Packed | None = None,
    return_lse: Literal[False] = False,
    ordered: int | None = None,
    backend: str = "auto",
) -> torch.Tensor: ...
@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
    method: str = "auto",
    layout: str = "contiguous",
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    sink: torch.Tensor | None = None,
    queries: Packed | None = None,
    keys: Packed | None = None,
    return_lse: bool,
    ordered: int | None = None,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
    method: str = "auto",
    layout: str = "contiguous",
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    sink: torch.Tensor | None = None,
    queries: Packed | None = None,
    keys: Packed | None = None,
    return_lse: bool = False,
    ordered: int | None = None,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """What :func:`flashcore.attention` computes, of sequences that are spread over the ranks of a group.

    All ranks call it with the same shapes and options, and get the same bits each time. Under ``torch.compile`` it runs
    between two graphs. The gradient of the sinks is this rank's part, as those of a layer's weights are: reduce it with
    them.

    :param q: this rank's queries, (batch, seqlen_q / ranks, heads_q, head_dim); dtypes and devices are those of
        :func:`flashcore.attention`. :func:`shard` cuts them out of a whole sequence.
    :param k: this rank's keys, (batch, seqlen_k / ranks, heads_k, head_dim).
    :param v: this rank's values, (batch, seqlen_k / ranks, heads_k, head_dim_v).
    :param group: the ranks that share the sequence; all of them when None, unless there is a `mesh`.
    :param mesh: the same as a device mesh of one dimension, such as ``mesh["context"]``.
    :param method: ``"ring"`` (keys and values pass from rank to rank while blocks are computed), ``"ulysses"`` (each
        rank gets all tokens of some heads, and computes what one device would), or ``"auto"``: what receives fewer
        bytes, if the heads can be shared.
    :param layout: ``"contiguous"``, the rank's tokens follow each other, or ``"zigzag"``, the r-th of 2 * ranks chunks
        from the start and the r-th from the end: the same work for all under a causal mask.
    :param causal: as in :func:`flashcore.attention`, of the whole sequences; so are `window`, `scale` and `sink`.
    :param queries: where the sequences of a packed q lie in the rows of all ranks together, as in
        :func:`flashcore.attention`; q is then this rank's (total_q / ranks, heads_q, head_dim). Ulysses alone takes
        packed sequences.
    :param keys: the same of k and v.
    :param ordered: compute blocks of this many tokens, each alone, and add them in the order of the sequence: the same
        bits for all numbers of ranks of which it divides the chunks. It holds all keys and values, takes twice the work
        in the backward pass, and is the ring's.
    :param backend: of each part, as in :func:`flashcore.attention`.
    :returns: out, (batch, seqlen_q / ranks, heads_q, head_dim_v) in q's dtype, and with `return_lse` also lse, float32
        (batch, heads_q, seqlen_q / ranks).

    :raises InvalidInputError: arguments that no backend could accept, that differ between ranks, or that do not fit the
        group. On GPUs ranks compare a kind of call when they meet it first; a later difference ends in the group's
        timeout.
    :raises UnsupportedError: no backend, or not the requested one, can do it; or a tensor is a DTensor or fake, or is
        transformed by torch.func.
    """
    out, lse = _attention(
        q, k, v, sink, queries, keys, group, mesh, method, layout, causal, window, scale, return_lse, ordered, backend
    )
    return (out, lse) if return_lse else out


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
    method: str = "auto",
    layout: str = "contiguous",
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    sink: torch.Tensor | None = None,
    queries: Packed | None = None,
    keys: Packed | None = None,
    return_lse: bool = False,
    ordered: int | None = None,
    backend: str = "auto",
) -> DistributedPlan:
    """What :func:`attention` would do on this rank with these arguments: print it. Sends and launches nothing."""
    group, where = _placed(group, mesh, layout)
    _check_plain(q=q, k=k, v=v, sink=sink)
    q, k, v = calls.autocast(q, k, v)
    problem = _problem(q, k, v, sink, queries, keys, causal, window, scale, return_lse)
    method, why, received = _choose(problem, method, where, ordered)
    rank = group.rank()
    if method == "ulysses":
        share = {"heads_q": problem.heads_q // where.ranks, "heads_k": max(1, problem.heads_k // where.ranks)}
        q_rows, k_rows = (rows * where.ranks for rows in _rows(problem).values())
        lengths = {"seqlen_q": q_rows, "seqlen_k": k_rows}
        if problem.packed:
            lengths = {
                "queries": replace(problem.queries, total=q_rows), "keys": replace(problem.keys, total=k_rows),
            }  # fmt: skip
        steps, plan = 1, planning.plan(replace(problem, **share, **lengths), backend)
    else:
        call = _ring(group, where, problem, backend, ordered)
        found = [parts for source in range(where.ranks) if (parts := call.bands(rank, source))]
        steps, largest = len(found), max((part for parts in found for part in parts), key=ring.area, default=None)
        plan = None if largest is None else ring.plan_of(largest, call.problem, backend, call.forced)
    return DistributedPlan(method, why, layout, where.ranks, rank, steps, received, plan)


def shard(
    tensor: torch.Tensor,
    *,
    group: ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
    layout: str = "contiguous",
    dim: int = 1,
) -> torch.Tensor:
    """This rank's tokens of a whole sequence, which lies along `dim`: a contiguous copy that autograd sees through.

    :raises InvalidInputError: the ranks cannot share so many tokens evenly.
    """
    group, where = _placed(group, mesh, layout)
    where.check("the sequence", tensor.shape[dim])
    return where.shard(tensor, group.rank(), dim)


def gather(
    tensor: torch.Tensor,
    *,
    group: ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
    layout: str = "contiguous",
    dim: int = 1,
) -> torch.Tensor:
    """The whole sequence, in its order, of whose tokens each rank has its share along `dim`. It has no gradient."""
    group, where = _placed(group, mesh, layout)
    where.check("the sequence", tensor.shape[dim] * where.ranks)
    return ring.gather(group, where, tensor.detach(), dim)


def positions(
    seqlen: int,
    *,
    group: ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
    layout: str = "contiguous",
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Where this rank's tokens lie in a sequence of `seqlen`, for rotary embeddings: int64 (seqlen / ranks,)."""
    return shard(torch.arange(seqlen, device=device), group=group, mesh=mesh, layout=layout, dim=0)


# ---- how a call goes -------------------------------------------------------------------------------------------------


@torch.compiler.disable
def _attention(
    q, k, v, sink, queries, keys, group, mesh, method, layout, causal, window, scale, return_lse, ordered, backend
):
    group, where = _placed(group, mesh, layout)
    _check_plain(q=q, k=k, v=v, sink=sink)
    q, k, v = calls.autocast(q, k, v)
    try:
        problem = _problem(q, k, v, sink, queries, keys, causal, window, scale, return_lse)
        method, _, _ = _choose(problem, method, where, ordered)
        _check_device(q, group)
    except FlashCoreError as error:
        _agree(group, q, f"{type(error).__name__}: {error}", failed=True)
        raise
    shapes = f"q {problem.q_shape}, k {problem.k_shape}, v {problem.v_shape}, {problem.dtype}, scale {problem.scale!r}"
    options = f"{problem.mask}, layout {layout}, method {method}, ordered {ordered}, return_lse {return_lse}"
    flags = f"sink {sink is not None}, packed {problem.packed}, needs_grad {problem.needs_grad}"
    _agree(group, q, f"{shapes}, {options}, {flags}")
    if method == "ulysses":
        options = {"causal": causal, "window": window, "scale": scale, "backend": backend}
        options |= {"queries": queries, "keys": keys} if problem.packed else {}
        return ulysses.attention(group, where, group.rank(), q, k, v, sink, return_lse, **options)
    out, lse = ring.RingAttention.apply(_ring(group, where, problem, backend, ordered), scale, q, k, v, sink)
    return out, lse.float()


def _placed(group, mesh, layout: str) -> tuple[ProcessGroup, Layout]:
    """The group that is meant, of which this process is one, and how a sequence lies on it."""
    if not dist.is_available() or not dist.is_initialized():
        raise InvalidInputError("distributed: call torch.distributed.init_process_group(...) first.")
    if mesh is not None:
        if group is not None:
            raise InvalidInputError("distributed: give a group or a mesh, not both.")
        if mesh.ndim != 1:
            raise InvalidInputError(
                f"distributed: mesh has {mesh.ndim} dimensions {mesh.mesh_dim_names} (supported: 1). Pass the one that "
                'the sequence is spread over, such as mesh["context"].'
            )
        group = mesh.get_group()
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        what = "this rank is not part of it" if group == dist.GroupMember.NON_GROUP_MEMBER else "it is no ProcessGroup"
        raise InvalidInputError(f"distributed: group={group!r}: {what}.")
    return group, Layout(layout, group.size())


def _check_plain(**tensors) -> None:
    for name, tensor in tensors.items():
        if is_watched() and is_transformed(tensor):
            raise UnsupportedError(f"distributed: {name} cannot be transformed by torch.func (grad, vjp, vmap, ...).")
        if answers_itself(tensor):
            kind = type(tensor).__name__
            raise UnsupportedError(
                f"distributed: {name} is a {kind} (supported: plain tensors). "
                "Of a DTensor pass to_local(), with its tokens as the layout has them."
            )


def _problem(q, k, v, sink, queries, keys, causal, window, scale, return_lse) -> AttentionProblem:
    """What this rank's tensors ask for, checked, with the mask of the whole sequences. Sinks are no part of it."""
    spec, extras = score.bind(None, sink)
    problem = AttentionProblem.from_tensors(
        q, k, v, causal=causal, window=window, scale=scale, score=spec, extras=extras, queries=queries, keys=keys,
        return_lse=return_lse,
    )  # fmt: skip
    return replace(problem, score=score.PLAIN)


def _check_device(q: torch.Tensor, group: ProcessGroup) -> None:
    transport = dist.get_backend(group)
    if (q.is_cuda and transport == "gloo") or (not q.is_cuda and transport == "nccl"):
        raise InvalidInputError(f"distributed: the group's backend {transport} does not send tensors on {q.device}.")
    if q.is_cuda and q.device.index != torch.cuda.current_device():
        raise InvalidInputError(
            f"distributed: q is on {q.device}, but the current device is cuda:{torch.cuda.current_device()}. "
            "Call torch.cuda.set_device first."
        )


@lru_cache(maxsize=4096)
def _choose(problem: AttentionProblem, method: str, layout: Layout, ordered: int | None) -> tuple[str, str, int]:
    """(method, why, bytes that the busiest rank receives in the forward pass)."""
    if method not in METHODS:
        raise InvalidInputError(f"method={method!r} does not exist (supported: {', '.join(METHODS)}).")
    for name, length in _rows(problem).items():
        layout.check(name, length * layout.ranks)
        chunk = length // len(layout.chunks(0))
        if ordered is not None and (type(ordered) is not int or ordered < 1 or chunk % ordered):
            raise InvalidInputError(
                f"distributed: ordered={ordered!r} must be a number of tokens that divides the chunks of {name}, which "
                f"have {chunk}."
            )
    if ordered is not None and method == "ulysses":
        raise InvalidInputError("distributed: ordered is the ring's. Ulysses has the bits of one device without it.")
    lacking = ulysses.lacks(problem.heads_q, problem.heads_k, layout.ranks)
    if problem.paged:
        raise UnsupportedError("distributed: keys in pages are not there.")
    if problem.packed:
        if method == "ring" or ordered is not None or lacking:
            reason = lacking or "the ring, and ordered, take sequences of one length"
            raise UnsupportedError(f"distributed: packed sequences need ulysses: {reason}.")
        return "ulysses", "the sequences are packed", ulysses.received(problem, _rows(problem), layout.ranks)
    if lacking and method == "ulysses":
        raise InvalidInputError(f"distributed: ulysses: {lacking}. The ring takes any number of ranks.")
    by_ring = _received_by_ring(problem, layout, ordered)
    by_ulysses = ulysses.received(problem, _rows(problem), layout.ranks)
    if problem.is_empty or ordered is not None:
        return "ring", "nothing to multiply" if problem.is_empty else "blocks in the order of the sequence", by_ring
    if method != "auto":
        return method, "requested", by_ring if method == "ring" else by_ulysses
    if lacking:
        return "ring", lacking, by_ring
    if by_ulysses < by_ring:
        return "ulysses", f"receives {by_ulysses} bytes, the ring {by_ring}", by_ulysses
    return "ring", f"receives {by_ring} bytes, ulysses {by_ulysses}", by_ring


def _rows(problem: AttentionProblem) -> dict[str, int]:
    """How many tokens, or rows of packed ones, this rank has of q and of k."""
    if problem.packed:
        return {"q": problem.queries.total, "k": problem.keys.total}
    return {"q": problem.seqlen_q, "k": problem.seqlen_k}


def _received_by_ring(problem: AttentionProblem, layout: Layout, ordered: int | None) -> int:
    """Bytes, by the busiest rank, in the forward pass."""
    keys = (layout.ranks - 1) * problem.seqlen_k
    if ordered is None:
        call, ranks = _ring(None, layout, problem, "auto", None), range(layout.ranks)
        spans = [[span(call.bands(rank, source)) for source in ranks if source != rank] for rank in ranks]
        keys = max(sum(end - begin for begin, end in of_rank) for of_rank in spans)
    elements = keys * problem.batch * problem.heads_k * (problem.head_dim + problem.head_dim_v)
    return elements * getattr(torch, problem.dtype).itemsize


def _ring(group, layout: Layout, problem: AttentionProblem, backend: str, ordered: int | None) -> ring.Ring:
    partial = replace(problem, partial=True, return_lse=True)
    forced = planning.active_override.get()
    rank = 0 if group is None else group.rank()
    return ring.Ring(group, layout, rank, partial, backend, forced, None if problem.is_empty else ordered)


def _agree(group: ProcessGroup, q: object, kind: str, failed: bool = False) -> None:
    """Compare a call with those of the other ranks, before anything of it is sent.

    :param kind: the call in words, or what is wrong with it, where it `failed`.
    :raises InvalidInputError: they make another, or found that theirs is wrong.
    """
    known = _agreed.setdefault(group, set())
    if getattr(q, "is_cuda", False) and (known if failed else kind in known):
        return
    kinds: list[str] = [""] * group.size()
    dist.all_gather_object(kinds, kind, group=group)
    if len(set(kinds)) > 1:
        listed = "".join(f"\n  rank {rank}: {one}" for rank, one in enumerate(kinds))
        raise InvalidInputError(f"distributed: the ranks of the group do not make the same call.{listed}")
    known.add(kind)
