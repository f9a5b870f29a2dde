"""Running a suite: correctness first, then the timing of everybody who was right, then one row each."""

from __future__ import annotations

import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from flashcore.bench import backward, check, gemm, record, timing
from flashcore.bench.cases import Case, GemmCase, Suite
from flashcore.bench.machine import Sensors
from flashcore.bench.peers import PEERS, Peer
from flashcore.bench.timing import Effort

OnCase = Callable[[str], None]  # told the name of each case before it is measured

_TURNS = (
    "implementations in turns, {rounds} rounds of {round_ms:g} ms each after {lead_in_ms:g} ms untimed, a GPU resting "
    "{rest_ms:g} ms before each case; ms_* over all samples, std_pct over the rounds' medians"
)
METHODS = {
    "events": f"CUDA events around each call, L2 flushed before it; {_TURNS}",
    "graph": f"CUDA graph of many calls replayed, L2 as they leave it, time of a replay over its calls; {_TURNS}",
    "host": f"host time to enqueue an eager call, mean of {timing.HOST_CALLS}, not waiting for the device; {_TURNS}",
    "wall": f"wall time of each call on the CPU; {_TURNS}",
    "accuracy": "error against float64, not timed",
    "startup": "compile: NVRTC's seconds per kernel with an empty cache, one at a time; start: wall seconds of a fresh "
    "process from its start to its first result, kernels on disk, median of {repeats}, processes in turns",
}
NO_KERNEL = ("No available kernel", "No viable backend")  # how PyTorch's errors begin when a forced backend declines
STARTUP_REPEATS = 3
DEFAULT_EFFORT = Effort()


def run(
    suite: Suite,
    cases: Sequence[Case] | None = None,
    peers: Sequence[str] | None = None,
    effort: Effort = DEFAULT_EFFORT,
    commit: str | None = None,
    on_case: OnCase = lambda name: None,
) -> dict:
    """Measure ``cases`` (all of the suite's) for ``peers`` (the suite's choice) and return the record."""
    if suite.mode == "startup":
        rows, skipped = startup(on_case)
        method = {"mode": "startup", "about": METHODS["startup"].format(repeats=STARTUP_REPEATS)}
        return _record(suite, method, rows, skipped, commit)
    if suite.mode == "e2e":
        from flashcore.bench import e2e

        chosen = suite.cases if cases is None else cases
        return _record(suite, *e2e.run(chosen, peers or suite.peers, on_case), commit)

    operation = OPERATIONS.get(suite.op, OPERATIONS["attention"])
    if suite.sustained:
        effort = replace(timing.SUSTAINED, rounds=effort.rounds)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mode = "wall" if device == "cpu" and suite.mode == "events" else suite.mode
    method = {
        "mode": mode,
        "about": METHODS[mode].format(**asdict(effort)),
        "inputs": operation.inputs,
    }
    if device == "cpu" and mode in ("graph", "host"):
        return _record(suite, method, [], [{"reason": f"suite {suite.name} needs a CUDA GPU"}], commit)

    usable, skipped = usable_peers(peers or suite.peers, operation)
    sensors = Sensors()
    rows = []
    with torch.no_grad():
        for case in suite.cases if cases is None else cases:
            on_case(case.name)
            measured, left_out = run_case(
                case, usable, mode, suite.op, effort, device, sensors, operation
            )
            rows += measured
            skipped += left_out
            _free_memory(device)
    if mode != "accuracy" and (after := sensors.read()):
        method |= {"sm_mhz_after": after.sm_mhz, "power_w_after": after.power_w}
    return _record(suite, method, rows, skipped, commit)


def _record(suite: Suite, method: dict, rows: list, skipped: list, commit: str | None) -> dict:
    return {"suite": suite.name, "meta": record.meta(suite.name, method, commit), "rows": rows, "skipped": skipped}


def usable_peers(names: Sequence[str], operation: Operation) -> tuple[list[Peer], list[dict]]:
    """The named peers that can run on this machine, and why the others cannot."""
    usable, skipped = [], []
    for name in names:
        given = PEERS[name].operation
        reason = PEERS[name].unavailable() if given == operation.name else f"it computes {given}"
        if reason is None:
            usable.append(PEERS[name])
        else:
            skipped.append({"impl": name, "reason": reason})
    return usable, skipped


def run_case(
    case: Case | GemmCase,
    peers: Sequence[Peer],
    mode: str,
    op: str,
    effort: Effort,
    device: str,
    sensors: Sensors,
    operation: Operation,
) -> tuple[list[dict], list[dict]]:
    """Check every peer on a case, then time in turns those that were right. Returns rows and who was left out."""
    tensors = operation.make_inputs(case, device)
    truth = operation.truth(case, *tensors)
    pytorch = operation.pytorch_answer(case, device, *tensors)
    pytorch_errors = truth.errors(pytorch)

    rows: dict[str, dict] = {}
    bursts: dict[str, timing.Burst] = {}
    readings: dict[str, list] = {peer.name: [] for peer in peers}
    skipped = []
    for peer in peers:
        if reason := peer.rejects(case):
            skipped.append({"impl": peer.name, "case": case.name, "reason": reason})
            continue
        row = rows[peer.name] = {"op": op, "impl": peer.name, **case.fields()}
        try:
            call = operation.prepare(peer, case, *tensors)
            with peer.context():
                out = operation.result(peer, case, call())
            if peer.name == operation.ours:
                row |= operation.plan(case, *tensors)
            errors, wrong = operation.judge(case, truth, out, pytorch, pytorch_errors)
            if errors:
                row |= errors.columns()
            if wrong:
                row |= {"failed": wrong}
            elif mode != "accuracy":
                bursts[peer.name] = _burst(mode, call, peer, partial(sensors.watch, readings[peer.name]))
        except Exception as error:  # a peer that breaks must not end the run of the others
            if str(error).startswith(NO_KERNEL):
                del rows[peer.name]
                skipped.append({"impl": peer.name, "case": case.name, "reason": "PyTorch has no such kernel for it"})
            else:
                row |= {"failed": _one_line(error)}
    del pytorch, truth
    if device == "cuda" and mode in ("events", "graph"):
        torch.cuda.synchronize()
        time.sleep(effort.rest_ms / 1e3)
    try:
        rounds = timing.interleave(bursts, effort)
    except Exception as error:  # nobody knows whose fault it was: no number of this case is to be trusted
        for name in bursts:
            rows[name] |= {"failed": f"while timing this case: {_one_line(error)}"}
        bursts = {}
    for name in bursts:
        rows[name] |= timing.summarize(rounds[name])
        if mode != "host":
            rows[name] |= case.speed(rows[name]["ms_p50"])
        if readings[name]:
            rows[name]["sm_mhz"] = statistics.median(reading.sm_mhz for reading in readings[name])
    return list(rows.values()), skipped


def _pytorch_answer(case: Case, device: str, q, k, v) -> torch.Tensor:
    """PyTorch's result in the same dtype: FlashAttention-2 where it runs, else what SDPA dispatches to."""
    if case.causal and (keyless := case.seqlen_q - case.seqlen_k) > 0:
        # PyTorch aligns such a mask elsewhere. Rows without a key are 0, and behind them the mask is a square one.
        seen = _pytorch_answer(replace(case, seqlen_q=case.seqlen_k), device, q[:, keyless:], k, v)
        return torch.cat((seen.new_zeros(case.batch, keyless, *seen.shape[2:]), seen), dim=1)
    candidates = (PEERS["fa2"], PEERS["sdpa"]) if device == "cuda" else (PEERS["sdpa"],)
    for peer in candidates[:-1]:
        if peer.rejects(case) is None:
            try:
                with peer.context():
                    return peer.result(case, peer.prepare(case, q, k, v)())
            except RuntimeError:  # no such kernel for this case
                continue
    return candidates[-1].result(case, candidates[-1].prepare(case, q, k, v)())


def _plan(case: Case, q, k, v) -> dict:
    """What FlashCore's plan chose: a row must say which backend its number belongs to."""
    import flashcore

    plan = flashcore.explain(q, k, v, causal=case.causal)
    return {"backend": plan.backend} | ({"config": str(plan.config)} if plan.config is not None else {})


@dataclass(frozen=True)
class Operation:
    """What the harness must know of an operation besides how to time it. Functions get a case and its tensors."""

    name: str  # what its peers compute
    inputs: str  # in words
    ours: str  # the implementation whose plan is recorded
    make_inputs: Callable[..., tuple[torch.Tensor, ...]]
    truth: Callable[..., check.Truth | gemm.Truth | backward.Truth]
    pytorch_answer: Callable[..., torch.Tensor | backward.Gradients]
    plan: Callable[..., dict]
    prepare: Callable[..., Callable[[], object]] = lambda peer, case, *tensors: peer.prepare(case, *tensors)
    result: Callable = lambda peer, case, returned: peer.result(case, returned)  # what pytorch_answer's is compared to
    judge: Callable[..., tuple] = check.judge


def _in_turns(peer: Peer, case: Case, q, k, v) -> Callable[[], object]:
    """Calls take turns on copies of K and V that together exceed L2: a model's other layers displace a cache there."""
    copies = min(64, -(-timing.FLUSH_BYTES // case.kv_bytes))
    kv = [(k, v), *((k.clone(), v.clone()) for _ in range(copies - 1))]
    turns = itertools.cycle([peer.prepare(case, q, *one) for one in kv])
    return lambda: next(turns)()


_ATTENTION = Operation(
    "attention",
    "random N(0, 1), (batch, seqlen, heads, head_dim)",
    "flashcore",
    check.make_inputs,
    check.Truth,
    _pytorch_answer,
    _plan,
)

# By a suite's op, where it is not attention's forward; and by what a peer computes.
OPERATIONS = {
    "attention": _ATTENTION,
    "attention_bwd": replace(
        _ATTENTION,
        inputs="random N(0, 1), the output's gradient too, (batch, seqlen, heads, head_dim)",
        make_inputs=backward.make_inputs,
        truth=backward.Truth,
        pytorch_answer=backward.pytorch_answer,
        plan=backward.plan,
        prepare=backward.prepare,
        result=lambda peer, case, returned: returned,
        judge=backward.judge,
    ),
    "attention_decode": replace(
        _ATTENTION, inputs=f"{_ATTENTION.inputs}; K and V in turn from copies that L2 cannot hold", prepare=_in_turns
    ),
    "gemm": Operation(
        "gemm",
        "random a N(0, 1), b N(0, 1 / k)",
        "flashcore-matmul",
        gemm.make_inputs,
        gemm.Truth,
        gemm.pytorch_answer,
        gemm.plan,
    ),
}


def _burst(mode: str, call: Callable[[], object], peer: Peer, watch: Callable[[], None]) -> timing.Burst:
    if mode == "graph":
        return timing.graph_burst(call, watch, peer.context)
    burst = {
        "events": partial(timing.event_burst, watch=watch),
        "host": timing.host_burst,
        "wall": timing.wall_burst,
    }[mode](call)
    return timing.within(peer.context, burst)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _free_memory(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


# --- start-up: in processes of their own

_START = """
import time, torch
q, k, v = (torch.randn(1, 512, 8, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
{attend}
torch.cuda.synchronize()
print(time.time())
"""
_ATTEND = {
    "torch": "",  # what every program that uses torch on a GPU waits for
    "sdpa": "torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)",
    "flashcore": "import flashcore; flashcore.attention(q, k, v, causal=True)",
}


def startup(on_case: OnCase) -> tuple[list[dict], list[dict]]:
    """Rows of compile seconds per declared kernel, and of seconds from the start of a process to its first result."""
    rows, skipped = [], []
    with tempfile.TemporaryDirectory() as cache:
        for part, measure in (("compile", _cold_compile), ("start", _warm_start)):
            try:
                rows += measure(cache, on_case)
            except subprocess.CalledProcessError as error:
                skipped.append({"impl": "flashcore", "case": part, "reason": error.stderr.strip().splitlines()[-1]})
    return rows, skipped


def _cold_compile(cache: str, on_case: OnCase) -> Iterator[dict]:
    """Every declared kernel into an empty cache, one at a time, in a fresh process."""
    on_case("cold compile")
    for kernel in json.loads(_python(["-m", "flashcore", "compile", "--all", "--jobs", "1", "--json"], cache)):
        yield {"op": "compile", "impl": "flashcore", **kernel}


def _warm_start(cache: str, on_case: OnCase) -> Iterator[dict]:
    """Processes that import torch, make tensors and attend once; in turns."""
    seconds: dict[str, list[float]] = {impl: [] for impl in _ATTEND}
    for repeat in range(STARTUP_REPEATS + 1):
        for impl, attend in _ATTEND.items():
            on_case(f"start {impl} {repeat}/{STARTUP_REPEATS}")
            started = time.time()
            seconds[impl].append(float(_python(["-c", _START.format(attend=attend)], cache)) - started)
    for impl, values in seconds.items():
        kept = values[1:]  # the first round warmed the file system
        yield {"op": "start", "impl": impl, "s_p50": statistics.median(kept), "s_min": min(kept), "s_max": max(kept)}


def _python(arguments: list[str], cache: str) -> str:
    """What a fresh interpreter prints, with its kernel cache in ``cache``."""
    paths = [str(record.PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "FLASHCORE_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
