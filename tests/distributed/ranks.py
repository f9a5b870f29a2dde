"""What the ranks of a world do: every check of this module, in the groups that it is for, one verdict each."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import flashcore
from flashcore import distributed
from flashcore.errors import FlashCoreError, InvalidInputError, UnsupportedError

WORLD = 8
GROUPS = {1: (0,), 2: (0, 1), 3: (2, 3, 4), 4: (4, 5, 6, 7), 8: tuple(range(8))}  # by size; some do not begin at rank 0
TIMEOUT = datetime.timedelta(seconds=60)

# Whole sequences, of which each rank of 8 has 4 tokens: a divisor of all sizes' shares in both layouts.
TOKENS = 48
BATCH, HEADS_Q, HEADS_K, HEAD_DIM = 3, 6, 2, 8

FOLDER: Path  # where checks leave what others are compared with

Check = Callable[..., None]
CHECKS: dict[str, tuple[Check, tuple[int, ...]]] = {}  # name -> what to do in a group, and in groups of which sizes


def check(*sizes: int, **parameters):
    """Register a check for groups of these sizes, from 2 on by default; once for each of a parameter's named values."""

    def register(function: Check) -> Check:
        variants = {function.__name__: {}}
        for parameter, values in parameters.items():
            variants = {
                f"{name}-{value}": {**given, parameter: values[value]}
                for name, given in variants.items()
                for value in values
            }
        for name, given in variants.items():
            before = CHECKS[name][1] if name in CHECKS else ()
            CHECKS[name] = partial(function, **given), (*before, *(sizes or (2, 3, 4, 8)))
        return function

    return register


def work(rank: int, folder: str) -> None:
    """One rank's life; its verdicts are written to the folder: {"group size/check": "" or what went wrong}."""
    global FOLDER
    FOLDER = Path(folder)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD, timeout=TIMEOUT
    )
    groups = {size: dist.new_group(ranks, timeout=TIMEOUT) for size, ranks in GROUPS.items()}
    verdicts = {}
    for size, ranks in GROUPS.items():
        for name, (function, sizes) in CHECKS.items():
            if rank in ranks and size in sizes:
                try:
                    torch.manual_seed(0)
                    function(groups[size])
                    verdicts[f"{size}/{name}"] = ""
                except (Exception, pytest.fail.Exception):
                    verdicts[f"{size}/{name}"] = traceback.format_exc()
    (Path(folder) / f"verdicts-{rank}.json").write_text(json.dumps(verdicts))
    dist.barrier()
    dist.destroy_process_group()


# ---- right ----------------------------------------------------------------------------------------------------------


def inputs(
    tokens_q=TOKENS, tokens_k=TOKENS, heads_q=HEADS_Q, heads_k=HEADS_K, head_dim_v=HEAD_DIM, dtype=torch.float64
):
    """q, k, v and the output's gradient, the same on all ranks."""
    shapes = ((tokens_q, heads_q, HEAD_DIM), (tokens_k, heads_k, HEAD_DIM), (tokens_k, heads_k, head_dim_v))
    q, k, v = (torch.randn(BATCH, *shape, dtype=dtype) for shape in shapes)
    return q, k, v, torch.randn(BATCH, tokens_q, heads_q, head_dim_v, dtype=dtype)


def on_one_device(q, k, v, dout, sink=None, dlse=None, **options):
    """(out, lse, dq, dk, dv[, dsink]) by the reference, where the LSE has the gradient dlse if there is one."""
    tensors = [t.detach().clone().requires_grad_() for t in (q, k, v, *([] if sink is None else [sink]))]
    out, lse = flashcore.attention(
        *tensors[:3], sink=None if sink is None else tensors[3], return_lse=True, backend="reference", **options
    )
    results, grads = ((out,), (dout,)) if dlse is None else ((out, lse), (dout, dlse))
    return out.detach(), lse.detach(), *torch.autograd.grad(results, tensors, grads)


def on_ranks(group, q, k, v, dout, sink=None, dlse=None, layout="contiguous", **options):
    """The same, each whole again."""
    where = {"group": group, "layout": layout}
    tensors = [distributed.shard(t, **where).requires_grad_() for t in (q, k, v)]
    tensors += [] if sink is None else [sink.clone().requires_grad_()]
    out, lse = distributed.attention(
        *tensors[:3], sink=None if sink is None else tensors[3], return_lse=True, **where, **options
    )
    assert out.is_contiguous()
    assert lse.dtype is torch.float32
    results, grads = (out,), (distributed.shard(dout, **where),)
    if dlse is not None:
        results, grads = (out, lse), (*grads, distributed.shard(dlse, dim=2, **where))
    dq, dk, dv, *dsink = torch.autograd.grad(results, tensors, grads)
    for grad in dsink:
        dist.all_reduce(grad, group=group)
    lse = distributed.gather(lse, dim=2, **where)
    out, dq, dk, dv = (distributed.gather(t, **where) for t in (out, dq, dk, dv))
    return out, lse, dq, dk, dv, *dsink


LAYOUTS = {name: name for name in ("contiguous", "zigzag")}
FEATURES = {
    "full": {},
    "causal": {"causal": True},
    "scale": {"causal": True, "scale": -0.7},
    "window": {"window": (5, 2)},
    "causal_window": {"causal": True, "window": (9, None)},
    "wide_window": {"causal": True, "window": (30, None)},
    "future": {"window": (None, 7)},
    "sink": {"causal": True, "sink": True},
    "sink_of_nothing": {"causal": True, "sink": True, "tokens_q": 2 * TOKENS},
    "more_keys": {"causal": True, "tokens_k": 2 * TOKENS},
    "more_queries": {"causal": True, "tokens_q": 2 * TOKENS},
    "one_key_head": {"causal": True, "heads_k": 1},
    "head_dim_v": {"causal": True, "head_dim_v": 5},
    "autocast": {"causal": True, "autocast": True},
    "dlse": {"causal": True, "sink": True, "tokens_q": 2 * TOKENS, "dlse": True},
}
SHAPES = ("tokens_q", "tokens_k", "heads_q", "heads_k", "head_dim_v")


def some(*names: str) -> dict[str, dict]:
    return {name: FEATURES[name] for name in names}


def compare(group, feature: dict, **how) -> None:
    options = {name: value for name, value in feature.items() if name not in (*SHAPES, "sink", "autocast", "dlse")}
    shapes = {name: feature[name] for name in SHAPES if name in feature}
    shapes = {**how.pop("shapes", {}), **shapes}
    tensors = inputs(**shapes)
    sink = torch.randn(tensors[0].shape[2], dtype=torch.float64) if "sink" in feature else None
    dlse = torch.randn(BATCH, tensors[0].shape[2], tensors[0].shape[1]) if "dlse" in feature else None
    with torch.autocast("cpu", torch.bfloat16) if "autocast" in feature else contextlib.nullcontext():
        results = on_ranks(group, *tensors, sink, dlse, **options, **how)  # autocast leaves float64 alone
    expected = on_one_device(*tensors, sink, dlse, **options)
    names = ("out", "lse", "dq", "dk", "dv", "dsink")
    for name, result, right in zip(names[: len(expected)], results, expected, strict=True):
        torch.testing.assert_close(
            result, right, rtol=0, atol=1e-5 if name == "lse" else 1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )


@check(2, 3, 4, feature=FEATURES, layout=LAYOUTS)
@check(8, feature=some("causal", "causal_window", "sink", "one_key_head"), layout=LAYOUTS)
def ring(group, feature, layout):
    compare(group, feature, method="ring", layout=layout)


@check(2, 3, feature=some("window", "dlse"), layout=LAYOUTS)
def ordered(group, feature, layout):
    compare(group, feature, method="ring", layout=layout, ordered=1 if group.size() == 3 else 3)


@check(2, 4, feature=some("window", "more_keys", "head_dim_v", "one_key_head"), layout=LAYOUTS, heads_k={"24": 24})
@check(feature=some("causal", "dlse"), layout=LAYOUTS, heads_k={"8": 8, "2": 2})
def ulysses(group, feature, layout, heads_k):
    if group.size() == 3:
        heads_k = {8: 3, 2: 1}[heads_k]
    compare(group, feature, method="ulysses", layout=layout, shapes={"heads_q": 24, "heads_k": heads_k})


@check(2, 3, layout=LAYOUTS)
def packed(group, layout):
    """Sequences of 5, 0, 30 and 13 tokens, cut wherever a rank's share ends."""
    rows = flashcore.Packed(torch.tensor([0, 5, 5, 35, 48], dtype=torch.int32), 30)
    where = {"group": group, "layout": layout, "dim": 0}
    shapes = ((48, 6, 8), (48, 3, 8), (48, 3, 8)) if group.size() == 3 else ((48, 4, 8), (48, 2, 8), (48, 2, 8))
    whole = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    sink = torch.randn(shapes[0][1], dtype=torch.float64)
    options = {"causal": True, "window": (9, None), "sink": sink, "queries": rows, "keys": rows, "return_lse": True}
    out, lse = flashcore.attention(*whole, backend="reference", **options)
    dout = torch.randn_like(out)
    mine = [distributed.shard(t.detach(), **where).requires_grad_() for t in whole]
    found, found_lse = distributed.attention(*mine, group=group, layout=layout, **options)
    assert distributed.explain(*mine, group=group, layout=layout, **options).method == "ulysses"
    grads = torch.autograd.grad(found, mine, distributed.shard(dout, **where))
    results = (distributed.gather(t, **where) for t in (found, *grads))
    for result, right in zip(results, (out, *torch.autograd.grad(out, whole, dout)), strict=True):
        torch.testing.assert_close(result, right, rtol=0, atol=1e-11)
    found_lse = distributed.gather(found_lse, group=group, layout=layout, dim=1)
    torch.testing.assert_close(found_lse, lse, rtol=0, atol=1e-5)
    with raises(UnsupportedError, "packed sequences need ulysses: the ring"):
        distributed.attention(*mine, group=group, layout=layout, method="ring", **options)
    q, *caches = (t.detach() if i == 0 else t.detach()[None, :16] for i, t in enumerate(mine))
    options["keys"] = flashcore.Paged(torch.zeros(4, 1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32), 16)
    with raises(UnsupportedError, "keys in pages are not there"):
        distributed.attention(q, *caches, group=group, layout=layout, **options)


@check(2, method={"ring": "ring", "ulysses": "ulysses"}, empty={"batch": (0, 2), "tokens": (2, 0)})
def nothing(group, method, empty):
    batch, tokens = empty
    q = torch.zeros(batch, tokens, 24, 8, requires_grad=True)
    out, lse = distributed.attention(q, q, q, group=group, method=method, return_lse=True)
    out.sum().backward()
    assert out.shape == q.shape == q.grad.shape
    assert lse.shape == (batch, 24, tokens)


# ---- the same bits --------------------------------------------------------------------------------------------------


@check(3, method={"ring": "ring", "ulysses": "ulysses"}, dtype={"float32": torch.float32, "bfloat16": torch.bfloat16})
def twice(group, method, dtype):
    tensors = inputs(heads_k=1, dtype=dtype)
    first, second = (on_ranks(group, *tensors, causal=True, layout="zigzag", method=method) for _ in range(2))
    assert all(map(torch.equal, first, second))


@check(1, 2, 4, 8, layout=LAYOUTS, dtype={"float32": torch.float32, "bfloat16": torch.bfloat16})
def ordered_bits(group, layout, dtype):
    """The test compares what groups of all sizes leave here, in both layouts."""
    sink = torch.randn(HEADS_Q)
    results = on_ranks(group, *inputs(dtype=dtype), sink, window=(20, 3), layout=layout, ordered=3)
    if group.rank() == 0:  # the sink's gradient is a sum of the ranks' parts
        torch.save(results[:-1], FOLDER / f"ordered-{group.size()}-{layout}-{dtype}.pt")


@check(2, 4, 8, layout=LAYOUTS, dtype={"float32": torch.float32, "bfloat16": torch.bfloat16})
def ulysses_bits(group, layout, dtype):
    """Those of one device, gradients included, where every key head is one rank's."""
    q, k, v, dout = inputs(heads_q=16, heads_k=8, dtype=dtype)
    results = on_ranks(group, q, k, v, dout, causal=True, method="ulysses", layout=layout)
    tensors = [t.requires_grad_() for t in (q, k, v)]
    out, lse = flashcore.attention(*tensors, causal=True, return_lse=True)
    for name, result, right in zip(
        ("out", "lse", "dq", "dk", "dv"), results, (out, lse, *torch.autograd.grad(out, tensors, dout)), strict=True
    ):
        assert torch.equal(result, right), name


@check(4, 8, layout=LAYOUTS)
def rounded_once(group, layout):
    """However many parts are merged: the bfloat16 output is within half a unit in the last place."""
    q, k, v, dout = inputs(dtype=torch.bfloat16)
    out, *_ = on_ranks(group, q, k, v, dout, method="ring", layout=layout, backend="reference")
    right = on_one_device(*(t.double() for t in (q, k, v, dout)))[0]
    assert ((out.double() - right).abs() <= 2**-8 * right.abs() * 1.001 + 1e-6).all()


# ---- among others ---------------------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """Causal self-attention between two linear maps, of this rank's tokens."""

    def __init__(self, heads=4, **where):
        super().__init__()
        self.heads, self.where = heads, where
        self.q, self.k, self.v = (torch.nn.Linear(32, 32) for _ in range(3))
        self.out = torch.nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = (linear(x).unflatten(2, (-1, 8)) for linear in (self.q, self.k, self.v))
        if self.where:
            y = distributed.attention(q, k, v, causal=True, **self.where)
        else:
            y = flashcore.attention(q, k, v, causal=True, backend="reference")
        return self.out(y.flatten(2))


def layers(**where) -> tuple[Layer, Layer]:
    """The same layer twice: of the whole sequence, and of this rank's tokens."""
    alone, together = Layer(), Layer(**where)
    together.load_state_dict(alone.state_dict())
    return alone, together


@check(2, method={"ring": "ring", "ulysses": "ulysses"}, how={"checkpoint": "checkpoint", "compile": "compile"})
def layer(group, method, how):
    """Weights' gradients are sums over ranks, as the loss is."""
    where = {"group": group, "method": method, "layout": "zigzag"}
    alone, together = layers(**where)
    x = torch.randn(2, TOKENS, 32)
    alone(x).square().sum().backward()
    share = distributed.shard(x, group=group, layout="zigzag").requires_grad_()
    if how == "checkpoint":
        out = checkpoint(together, share, use_reentrant=False)
    else:
        out = torch.compile(together, backend="aot_eager")(share)
    out.square().sum().backward()
    for (name, parameter), right in zip(together.named_parameters(), alone.parameters(), strict=True):
        dist.all_reduce(parameter.grad, group=group)
        torch.testing.assert_close(parameter.grad, right.grad, rtol=1e-4, atol=1e-3, msg=lambda s, n=name: f"{n}: {s}")


@check(8, method={"ring": "ring"})
def fsdp_and_tensor_parallel(group, method):
    """A mesh of three dimensions: weights sharded on the first, heads on the second, tokens on the third."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("data", "heads", "context"))
    alone, together = layers(mesh=mesh["context"], method=method)
    plan = {name: ColwiseParallel() for name in ("q", "k", "v")} | {"out": RowwiseParallel()}
    parallelize_module(together, mesh["heads"], plan)
    fully_shard(together, mesh=mesh["data"])
    x = torch.randn(2, 2, TOKENS, 32)  # of both data ranks
    alone(x.flatten(0, 1)).square().sum().backward()
    mine = distributed.shard(x[mesh["data"].get_local_rank()], mesh=mesh["context"])
    together(mine).square().sum().backward()
    for (name, parameter), right in zip(together.named_parameters(), alone.parameters(), strict=True):
        grad = parameter.grad.full_tensor() * 2  # FSDP takes the mean over its ranks
        dist.all_reduce(grad, group=mesh["context"].get_group())
        torch.testing.assert_close(grad, right.grad, rtol=1e-4, atol=1e-3, msg=lambda s, n=name: f"{n}: {s}")


@check(2)
def helpers(group):
    for layout, mine in {"contiguous": ((0, 1, 2, 3), (4, 5, 6, 7)), "zigzag": ((0, 1, 6, 7), (2, 3, 4, 5))}.items():
        where = {"group": group, "layout": layout}
        positions = distributed.positions(8, **where)
        assert positions.tolist() == list(mine[group.rank()])
        x = torch.randn(3, 8, 2)
        share = distributed.shard(x, **where)
        assert torch.equal(share, x[:, positions])
        assert torch.equal(distributed.gather(share, **where), x)


@check(2)
def explained(group):
    q = k = v = torch.randn(1, 4, 4, 8)
    plan = distributed.explain(q, k, v, group=group, causal=True, method="ring")
    assert (plan.method, plan.steps, plan.received) == ("ring", 1 + group.rank(), 2 * 4 * 4 * 8 * 4)
    assert "partial" in str(plan)
    of_window = distributed.explain(q, k, v, group=group, causal=True, window=(1, 0), method="ring")
    assert of_window.received == 2 * 4 * 8 * 4  # one key
    auto = distributed.explain(q, k, v, group=group)
    assert (auto.method, auto.received) == ("ring", plan.received)
    assert str(auto.plan.problem.q_shape) in str(auto)
    fewer_heads = distributed.explain(q[:, :, :3], k[:, :, :3], v[:, :, :3], group=group)
    assert "heads_q=3 is not a multiple of 2 ranks" in fewer_heads.why


@check(8)
def explained_to_many(group):
    q, k = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    plan = distributed.explain(q, k, k, group=group)
    assert (plan.method, plan.received) == ("ulysses", 4 * 4 * 8 * 8 * 4 * 7 // 8)
    assert plan.plan.problem.q_shape == (1, 32, 1, 8)


# ---- wrong ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def raises(kind: type[Exception], *words: str):
    with pytest.raises(kind) as caught:
        yield
    assert all(word in str(caught.value) for word in words), caught.value


@check(2)
def refused(group):
    q = torch.randn(1, 6, 3, 8)
    outside = dist.GroupMember.NON_GROUP_MEMBER
    for words, options in {
        "method='star' does not exist": {"method": "star"},
        "layout='stripes' does not exist": {"layout": "stripes"},
        "heads_q=3 is not a multiple of 2 ranks": {"method": "ulysses"},
        "ordered=4 must be a number of tokens that divides": {"ordered": 4},
        "ordered=True must be": {"ordered": True},
        "this rank is not part of it": {"group": outside},
        "it is no ProcessGroup": {"group": "world"},
        "window must be (left, right)": {"window": 3},
    }.items():
        with raises(InvalidInputError, words):
            distributed.attention(q, q, q, **{"group": group, **options})
    with raises(InvalidInputError, "q has 10 tokens, which 2 ranks cannot share in the zigzag", "multiples of 4"):
        distributed.attention(q[:, :5], q[:, :5], q[:, :5], group=group, layout="zigzag")
    with raises(InvalidInputError, "the sequence has 5 tokens"):
        distributed.shard(q[:, :5], group=group)
    with raises(InvalidInputError, "ordered is the ring's"):
        distributed.attention(*[torch.randn(1, 6, 2, 8)] * 3, group=group, ordered=3, method="ulysses")
    with raises(UnsupportedError, "transformed by torch.func"):
        torch.func.grad(lambda q: distributed.attention(q, q, q, group=group).sum())(q)


@check(3)
def different_calls(group):
    """Every rank hears of it, also those whose call is like most."""
    q = torch.randn(1, 6, 3, 8)
    with raises(InvalidInputError, "do not make the same call", "rank 1: q (1, 4, 3, 8)", "rank 2: q (1, 6, 3, 8)"):
        distributed.attention(*[q[:, :4] if group.rank() == 1 else q] * 3, group=group)
    with raises(InvalidInputError, "rank 0: ", "causal", "rank 2: "):
        distributed.attention(q, q, q, group=group, causal=group.rank() == 0)
    with raises(InvalidInputError, "q and k must have one head_dim"):
        distributed.attention(q[..., :4] if group.rank() == 2 else q, q, q, group=group)
    assert distributed.attention(q, q, q, group=group).shape == q.shape


@check(2)
def second_derivatives(group):
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(distributed.attention(q, q, q, group=group).sum(), q)
    assert not grad.requires_grad
    with raises(UnsupportedError, "second derivatives"):
        out = distributed.attention(q, q, q, group=group, method="ring")
        torch.autograd.grad(out.sum(), q, create_graph=True)


@check(8)
def dtensors_and_meshes(group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("data", "context"))
    x = torch.randn(2, 8, 4, 8)
    q = distribute_tensor(x, mesh["context"], [Shard(1)])
    with raises(UnsupportedError, "q is a DTensor", "to_local()"):
        distributed.attention(q, q, q, mesh=mesh["context"])
    local = q.to_local()
    out = distributed.attention(local, local, local, mesh=mesh["context"])
    assert out.shape == (2, 2, 4, 8)
    with raises(InvalidInputError, "2 dimensions ('data', 'context')", 'mesh["context"]'):
        distributed.attention(local, local, local, mesh=mesh)
    with raises(InvalidInputError, "a group or a mesh"):
        distributed.attention(local, local, local, mesh=mesh["context"], group=group)
    with raises(FlashCoreError, "q is a DTensor", "flashcore.distributed"):
        flashcore.attention(q, q, q)


# ---- a world that breaks --------------------------------------------------------------------------------------------


BREAKS_AFTER = 3  # seconds


def survive(rank: int, folder: str, fault: str) -> None:
    """One rank of three, the last of which dies or stays away; the others write down what they got and when."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=3,
        timeout=datetime.timedelta(seconds=BREAKS_AFTER),
    )  # fmt: skip
    q = torch.randn(1, 6, 3, 8, requires_grad=True)
    out = distributed.attention(q, q, q)
    if rank == 2:
        if fault == "stays_away":
            time.sleep(3 * BREAKS_AFTER)
        os._exit(0)
    try:
        out.sum().backward()  # the others' gradients never come
        verdict = "nothing happened"
    except RuntimeError as error:
        verdict = f"raised {error}"
    (Path(folder) / f"{rank}.txt").write_text(verdict)
