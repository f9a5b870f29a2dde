"""One sequence on two GPUs: FlashCore's methods beside one GPU and PyTorch's ``context_parallel``.

Each case runs in processes of its own, a rank for each GPU. An answer is compared with one GPU's before it is timed.
"""

from __future__ import annotations

import datetime
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

from flashcore.bench import timing
from flashcore.bench.cases import ParallelCase
from flashcore.bench.timing import Effort

RANKS = 2
LAYOUT = "zigzag"
CPU_TOKENS = 4096  # longer sequences take too long there
ABOUT = (
    "two ranks, causal, zigzag; wall time of the slower rank, both idle before and after; implementations in turns, "
    "shuffled (seed {seed}), {rounds} rounds; train is forward and backward; context-parallel with keys and values "
    "repeated for grouped heads, as it takes no others; one-gpu on the first rank alone; rel_err of the output from "
    "FlashCore's on one GPU"
)
Call = Callable[[], torch.Tensor]


def method(effort: Effort) -> dict:
    about = ABOUT.format(seed=effort.seed, rounds=effort.rounds)
    return {"mode": "parallel", "about": about, "seed": effort.seed}


def transport() -> str:
    return "nccl" if torch.cuda.device_count() >= RANKS else "gloo"


def measure(
    cases: Sequence[ParallelCase], names: Sequence[str], effort: Effort, on_case: Callable[[str], None]
) -> Iterator[tuple[str, list[dict], list[dict]]]:
    """Each case's name, rows, and who was left out."""
    for case in cases:
        if transport() == "gloo" and case.shape.seqlen_q > CPU_TOKENS:
            yield case.name, [], [{"case": case.name, "reason": f"{case.shape.seqlen_q} tokens need two CUDA GPUs"}]
            continue
        on_case(case.name)
        with tempfile.TemporaryDirectory() as folder:
            try:
                arguments = folder, transport(), case, tuple(names), effort
                torch.multiprocessing.spawn(_rank, args=arguments, nprocs=RANKS)
                rows = json.loads(Path(folder, "rows.json").read_text())
            except Exception as error:  # a rank died: nobody's time is to be trusted
                reason = " ".join(str(error).split())[-300:]
                rows = [{"op": "parallel", "impl": name, **case.fields(), "failed": reason} for name in names]
        yield case.name, rows, []


def _rank(rank: int, folder: str, transport: str, case: ParallelCase, names: tuple[str, ...], effort: Effort) -> None:
    """What one process does; the first writes the rows."""
    import torch.distributed as dist

    if transport == "nccl":
        os.environ["NCCL_NVLS_ENABLE"] = "0"  # multicast over NVLink asks for more than containers may do
        torch.cuda.set_device(rank)
    timeout = datetime.timedelta(minutes=3)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group(transport, init_method=rendezvous, rank=rank, world_size=RANKS, timeout=timeout)
    device = torch.device("cuda", rank) if transport == "nccl" else torch.device("cpu")
    rows = _run_case(case, names, effort, device)
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def _run_case(case: ParallelCase, names: Sequence[str], effort: Effort, device: torch.device) -> list[dict]:
    import flashcore

    shape = case.shape
    generator = torch.Generator().manual_seed(0)  # the same everywhere
    heads = shape.heads, shape.kv_heads, shape.kv_heads, shape.heads
    sizes = ((shape.batch, shape.seqlen_q, of, shape.head_dim) for of in heads)
    whole = [torch.randn(size, generator=generator).to(device, getattr(torch, shape.dtype)) for size in sizes]
    expected = flashcore.attention(*whole[:3], causal=True)

    rows = {name: {"op": "parallel", "impl": name, **case.fields()} for name in names}
    times: dict[str, list[list[float]]] = {}
    for name in names:
        row = rows[name]
        try:
            with _implementation(name, case, whole, expected) as (call, right):
                error = 0.0 if call is None else ((call() - right).norm() / right.norm()).item()
                row["rel_err"] = _slowest(error)
            if not row["rel_err"] <= shape.apart:
                row["failed"] = f"differs from one GPU by {row['rel_err']:.2g}"
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if "failed" not in row:
            times[name] = []
    for order in timing.orders(times, effort.rounds, effort.seed, case.name):
        for name in order:
            with _implementation(name, case, whole, expected) as (call, _):
                times[name].append(_round(call, effort))
    for name, rounds in times.items():
        rows[name] |= timing.summarize(rounds)
        rows[name]["tflops"] = case.flops / rows[name]["ms_p50"] * 1e-9
    return list(rows.values())


def _round(call: Call | None, effort: Effort) -> list[float]:
    _once(call)
    return [_once(call) for _ in range(effort.samples(_once(call)))]


def _once(call: Call | None) -> float:
    """Milliseconds of the slower rank."""
    _slowest(0.0)
    started = time.perf_counter()
    if call is not None:
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return _slowest(1e3 * (time.perf_counter() - started))


def _slowest(number: float) -> float:
    """The largest of all ranks' numbers; they wait for each other."""
    import torch.distributed as dist

    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    dist.all_reduce(largest := torch.tensor(number, device=device, dtype=torch.float64), dist.ReduceOp.MAX)
    return largest.item()


@contextmanager
def _implementation(
    name: str, case: ParallelCase, whole: list[torch.Tensor], expected: torch.Tensor
) -> Iterator[tuple[Call | None, torch.Tensor]]:
    """(a call, the output that is right) of this rank while it is active; None where it has nothing to do."""
    import torch.distributed as dist

    import flashcore
    from flashcore import distributed

    def call_of(attend: Callable, q, k, v, dout) -> Call:
        inputs = [t.detach().requires_grad_(case.phase == "train") for t in (q, k, v)]

        def call() -> torch.Tensor:
            out = attend(*inputs)
            if case.phase == "train":
                torch.autograd.grad(out, inputs, dout)
            return out.detach()

        return call

    if name == "one-gpu":
        call = call_of(lambda *t: flashcore.attention(*t, causal=True), *whole)
        yield call if dist.get_rank() == 0 else None, expected
    elif name == "context-parallel":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.experimental import context_parallel

        mesh = init_device_mesh(whole[0].device.type, (dist.get_world_size(),))
        copies = whole[0].shape[2] // whole[1].shape[2]
        repeated = [whole[0], *(t.repeat_interleave(copies, dim=2) for t in whole[1:3]), whole[3], expected]
        buffers = [t.transpose(1, 2).clone(memory_format=torch.contiguous_format) for t in repeated]
        with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2] * len(buffers)):  # which shards them
            yield call_of(lambda *t: F.scaled_dot_product_attention(*t, is_causal=True), *buffers[:4]), buffers[4]
    else:
        shares = [distributed.shard(t, layout=LAYOUT) for t in (*whole, expected)]
        options = {"causal": True, "layout": LAYOUT, "method": name}
        yield call_of(lambda *t: distributed.attention(*t, **options), *shares[:4]), shares[4]
