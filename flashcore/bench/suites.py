"""Running a suite: correctness first, then the timing of everybody who was right, then one row each."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial

import torch

from flashcore.bench import record, startup, timing
from flashcore.bench.cases import Case, GemmCase, Suite
from flashcore.bench.machine import Sensors
from flashcore.bench.operations import OPERATIONS, Operation
from flashcore.bench.peers import PEERS, Peer, versions
from flashcore.bench.startup import Measured, OnCase
from flashcore.bench.timing import Effort

OnRecord = Callable[[dict, list[str]], None]  # told the record so far, and the names of the cases measured for it

_TURNS = (
    "implementations in turns, shuffled each round (seed {seed}), {rounds} rounds of {round_ms:g} ms each after "
    "{lead_in_ms:g} ms untimed, a GPU resting {rest_ms:g} ms before each case; ms_* over all samples, std_pct over the "
    "rounds' medians"
)
METHODS = {
    "events": f"CUDA events around each call, L2 flushed before it; {_TURNS}",
    "graph": f"CUDA graph of many calls replayed, L2 as they leave it, time of a replay over its calls; {_TURNS}",
    "host": f"host time to enqueue an eager call, mean of {timing.HOST_CALLS}, not waiting for the device; {_TURNS}",
    "wall": f"wall time of each call on the CPU; {_TURNS}",
    "accuracy": "error against float64, not timed",
    "startup": "compile: NVRTC's seconds per kernel with an empty cache, one at a time; start: wall seconds of a fresh "
    "process from its start to its first result, kernels on disk, median of {repeats}, processes in turns, shuffled "
    "(seed {seed})",
}
NO_KERNEL = ("No available kernel", "No viable backend")  # how PyTorch's errors begin when a forced backend declines
NOT_BUILT = "This flash attention build does not support"  # and flash-attn's, where its build was made without
DEFAULT_EFFORT = Effort()


def run(
    suite: Suite,
    cases: Sequence[Case] | None = None,
    peers: Sequence[str] | None = None,
    effort: Effort = DEFAULT_EFFORT,
    commit: str | None = None,
    on_case: OnCase = lambda name: None,
    on_record: OnRecord = lambda data, done: None,
) -> dict:
    """Measure ``cases`` (all of the suite's) for ``peers`` (the suite's choice) and return the record.

    ``on_record`` gets the record as it is before the first case and after each one, so that what was measured can be
    kept.
    """
    chosen = suite.cases if cases is None else cases
    method, skipped, measured = _start(suite, chosen, peers or suite.peers, effort, on_case)
    meta = record.meta(suite.name, method, commit)
    if found := versions():  # of all that are installed: runs of some peers are to merge
        meta["peers"] = found
    data = record.with_missing({"suite": suite.name, "meta": meta, "rows": [], "skipped": skipped})
    done: list[str] = []
    on_record(data, done)
    for name, rows, left_out in measured:
        done.append(name)
        parts = {"rows": data["rows"] + rows, "skipped": data["skipped"] + left_out}
        data = record.with_missing({**data, **parts})
        on_record(data, done)
    if done and suite.mode not in ("accuracy", "startup") and (after := Sensors().read()):
        method |= {"sm_mhz_after": after.sm_mhz, "power_w_after": after.power_w}
    return data


def _start(
    suite: Suite, cases: Sequence[Case], peers: Sequence[str], effort: Effort, on_case: OnCase
) -> tuple[dict, list[dict], Iterable[Measured]]:
    """The method of a suite, who is left out of it and why, and its cases as they are measured."""
    if suite.mode == "startup":
        about = METHODS["startup"].format(repeats=startup.REPEATS, seed=effort.seed)
        method = {"mode": "startup", "about": about, "seed": effort.seed}
        return method, [], startup.measure(cases, effort.seed, on_case)
    if suite.mode == "e2e":
        from flashcore.bench import e2e

        if reason := e2e.missing():
            return {"mode": "e2e", "about": ""}, [{"reason": reason}], ()
        usable, skipped = e2e.usable_peers(peers)
        return e2e.method(effort.seed), skipped, e2e.measure(cases, usable, effort.seed, on_case)

    if suite.mode == "parallel":
        from flashcore.bench import parallel

        usable, skipped = usable_peers(peers, "parallel")
        return parallel.method(effort), skipped, parallel.measure(cases, [p.name for p in usable], effort, on_case)

    operation = OPERATIONS.get(suite.op, OPERATIONS["attention"])
    if suite.sustained:
        effort = replace(timing.SUSTAINED, rounds=effort.rounds, seed=effort.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mode = "wall" if device == "cpu" and suite.mode == "events" else suite.mode
    about = METHODS[mode].format(**asdict(effort))
    method = {"mode": mode, "about": about, "inputs": suite.inputs or operation.inputs}
    if mode != "accuracy":
        method["seed"] = effort.seed
    if device == "cpu" and mode in ("graph", "host"):
        return method, [{"reason": f"suite {suite.name} needs a CUDA GPU"}], ()
    usable, skipped = usable_peers(peers, operation.name)
    return method, skipped, _measure(suite, cases, usable, mode, effort, device, on_case)


def _measure(
    suite: Suite,
    cases: Sequence[Case | GemmCase],
    peers: Sequence[Peer],
    mode: str,
    effort: Effort,
    device: str,
    on_case: OnCase,
) -> Iterator[Measured]:
    sensors = Sensors()
    for case in cases:
        on_case(case.name)
        op = "attention_bwd" if isinstance(case, Case) and case.backward else suite.op
        operation = OPERATIONS.get(op, OPERATIONS["attention"])
        with torch.no_grad():
            rows, skipped = run_case(case, peers, mode, op, effort, device, sensors, operation)
        yield case.name, rows, skipped
        _free_memory(device)


def usable_peers(names: Sequence[str], operation: str) -> tuple[list[Peer], list[dict]]:
    """The named peers that can run on this machine, and why the others cannot."""
    usable, skipped = [], []
    for name in names:
        given = PEERS[name].operation
        reason = PEERS[name].unavailable() if given == operation else f"it computes {given}"
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
        if reason := peer.lacks(case) or peer.rejects(case):
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
            if reason := _declined(error):
                del rows[peer.name]
                skipped.append({"impl": peer.name, "case": case.name, "reason": reason})
            else:
                row |= {"failed": _one_line(error)}
    del pytorch, truth
    if device == "cuda" and mode in ("events", "graph"):
        torch.cuda.synchronize()
        time.sleep(effort.rest_ms / 1e3)
    try:
        rounds = timing.interleave(bursts, effort, case=case.name)
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


def _declined(error: Exception) -> str | None:
    """Why a peer does not compute a case, if the error says no more than that."""
    text = str(error)
    if text.startswith(NO_KERNEL):
        return "PyTorch has no such kernel for it"
    return text.splitlines()[0].rstrip(".") if text.startswith(NOT_BUILT) else None


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
