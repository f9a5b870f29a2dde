"""What two ranks do with a GPU each: every check of this module, one verdict each."""

from __future__ import annotations

import datetime
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import flashcore
from flashcore import distributed
from flashcore.integrations import sdpa
from tests.distributed.ranks import raises

RANKS = 2
SHAPE = {"batch": 2, "tokens": 2048, "heads_q": 16, "heads_k": 4, "head_dim": 128}
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (500, None)},
    "both_sides": {"window": (300, 200)},
    "sink": {"causal": True, "sink": True},
}

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def work(rank: int, folder: str) -> None:
    """One rank's life; it writes {check: "" or what went wrong}."""
    os.environ["NCCL_NVLS_ENABLE"] = "0"  # multicast over NVLink asks for more than containers may do
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS,
        timeout=datetime.timedelta(seconds=120),
    )  # fmt: skip
    verdicts = {}
    for name, function in CHECKS.items():
        torch.manual_seed(0)
        try:
            function()
            verdicts[name] = ""
        except Exception:
            verdicts[name] = traceback.format_exc()
        (Path(folder) / f"verdicts-{rank}.json").write_text(json.dumps(verdicts))  # a hang leaves those before it
    dist.destroy_process_group()


def inputs(dtype=torch.bfloat16) -> list[torch.Tensor]:
    """q, k, v and the output's gradient, whole, the same on both ranks."""
    heads = (SHAPE["heads_q"], SHAPE["heads_k"], SHAPE["heads_k"], SHAPE["heads_q"])
    shapes = ((SHAPE["batch"], SHAPE["tokens"], of, SHAPE["head_dim"]) for of in heads)
    return [torch.randn(shape).to("cuda", dtype) for shape in shapes]


def results(attend, q, k, v, dout, sink=None) -> tuple[torch.Tensor, ...]:
    """(out, lse, dq, dk, dv[, dsink]) of a function of q, k, v and the sinks."""
    tensors = [t.detach().clone().requires_grad_() for t in (q, k, v, *([] if sink is None else [sink]))]
    out, lse = attend(*tensors[:3], sink=None if sink is None else tensors[3])
    return out.detach(), lse.detach(), *torch.autograd.grad(out, tensors, dout)


def on_one(tensors, sink=None, **options):
    return results(lambda *t, sink: flashcore.attention(*t, sink=sink, return_lse=True, **options), *tensors, sink)


def on_both(tensors, sink=None, layout="zigzag", **options):
    q, k, v, dout = (distributed.shard(t, layout=layout) for t in tensors)
    options |= {"layout": layout, "return_lse": True}
    out, lse, dq, dk, dv, *dsink = results(
        lambda *t, sink: distributed.attention(*t, sink=sink, **options), q, k, v, dout, sink
    )
    for grad in dsink:
        dist.all_reduce(grad)
    whole = [distributed.gather(t, layout=layout) for t in (out, dq, dk, dv)]
    return whole[0], distributed.gather(lse, dim=2, layout=layout), *whole[1:], *dsink


def assert_near(found, one_device, truth) -> None:
    """At most twice as far from float64 as one device's result is, in the norm, and a little."""
    names = ("out", "lse", "dq", "dk", "dv", "dsink")[: len(truth)]
    for name, a, b, right in zip(names, found, one_device, truth, strict=True):
        error, allowed = ((t.double() - right).norm() / right.norm() for t in (a, b))
        little = 5e-3 if name == "dsink" else 1e-5  # all of a head's rounding comes together in one number
        assert error <= 2 * allowed + little, f"{name}: error {error:.3g}, one device {allowed:.3g}"


def compare(name: str, method: str, layout: str) -> None:
    options = dict(OPTIONS[name])
    tensors = inputs()
    sink = torch.randn(SHAPE["heads_q"]).cuda() if options.pop("sink", False) else None
    exact_sink = None if sink is None else sink.double()
    truth = on_one([t.double() for t in tensors], exact_sink, backend="reference", **options)
    found = on_both(tensors, sink, layout=layout, method=method, **options)
    assert_near(found, on_one(tensors, sink, **options), truth)
    again = on_both(tensors, sink, layout=layout, method=method, **options)
    assert all(map(torch.equal, found, again)), "other bits the second time"


for _options in OPTIONS:
    for _method in ("ring", "ulysses"):
        for _layout in ("contiguous", "zigzag"):
            CHECKS[f"{_method}-{_options}-{_layout}"] = lambda o=_options, m=_method, y=_layout: compare(o, m, y)


@check
def ulysses_has_the_bits_of_one_gpu():
    """The shape is one for which backends choose the same tiles for all heads and for half of them."""
    for backend in ("auto", "triton"):
        tensors = inputs()
        found = on_both(tensors, method="ulysses", causal=True, backend=backend)
        assert all(map(torch.equal, found, on_one(tensors, causal=True, backend=backend))), backend


@check
def ordered_has_the_bits_of_one_rank():
    alone = [dist.new_group([rank]) for rank in range(RANKS)][dist.get_rank()]
    tensors = inputs()
    found = on_both(tensors, ordered=256, causal=True)
    call = {"group": alone, "ordered": 256, "causal": True, "return_lse": True}
    right = results(lambda *t, sink: distributed.attention(*t, sink=sink, **call), *tensors)
    assert all(map(torch.equal, found, right))


@check
def a_captured_graph_replays():
    q, k, v, _ = (distributed.shard(t, layout="zigzag") for t in inputs())
    for method in ("ring", "ulysses"):
        options = {"causal": True, "layout": "zigzag", "method": method}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are loaded, the ranks have agreed
            distributed.attention(q, k, v, **options)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = distributed.attention(q, k, v, **options)
        q.mul_(-1)
        graph.replay()
        assert torch.equal(out, distributed.attention(q, k, v, **options)), method


@check
def nothing_waits_for_the_gpu():
    q, k, v, dout = (distributed.shard(t).requires_grad_() for t in inputs())
    for method in ("ring", "ulysses"):
        distributed.attention(q, k, v, causal=True, method=method).backward(dout)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            distributed.attention(q, k, v, causal=True, method=method).backward(dout)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@check
def compiled_layers():
    q, k, v, _ = (distributed.shard(t) for t in inputs())

    def layer(q, k, v):
        return distributed.attention(q * 2, k, v, causal=True) + 1

    torch.testing.assert_close(torch.compile(layer)(q, k, v), layer(q, k, v))


@check
def pytorchs_context_parallel():
    """With FlashCore in SDPA's place its result is still right: it hands DTensors back to PyTorch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    mesh = init_device_mesh("cuda", (RANKS,), mesh_dim_names=("context",))
    q, k, v = (t.transpose(1, 2).contiguous()[:, :4] for t in inputs()[:3])
    right = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with sdpa.replace_torch(), context_parallel(mesh["context"], buffers=[q, k, v, right], buffer_seq_dims=[2] * 4):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(out, right, rtol=2e-2, atol=2e-2)


@check
def refused():
    with raises(flashcore.InvalidInputError, "does not send tensors on cpu"):
        distributed.attention(*[torch.zeros(1, 2, 2, 8)] * 3)
    q = torch.zeros(1, 2, 2, 8, device=f"cuda:{1 - dist.get_rank()}")
    with raises(flashcore.InvalidInputError, "Call torch.cuda.set_device first"):
        distributed.attention(q, q, q)


@check
def different_calls():
    """A kind of call that is new to all ranks is compared before anything is sent."""
    q = torch.zeros(1, 6 + 2 * dist.get_rank(), 2, 8, device="cuda", dtype=torch.bfloat16)
    with raises(flashcore.InvalidInputError, "do not make the same call", "(1, 8, 2, 8)"):
        distributed.attention(q, q, q)
