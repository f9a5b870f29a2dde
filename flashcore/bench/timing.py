"""Timing that is fair to everybody: warm-up by time, interleaved rounds, medians, and the spread between rounds.

A *burst* is a callable ``burst(n) -> list[float]`` that runs one implementation ``n`` times and returns milliseconds
per call. There is one way to make a burst for each kind of measurement:

``event_burst``   CUDA events around each call, L2 flushed before it, as ``triton.testing.do_bench`` does
``graph_burst``   replays of a CUDA graph that holds many calls: device time without the host, L2 warm
``host_burst``    host time to enqueue one call, without waiting for the device
``wall_burst``    wall time of one call, for the CPU
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

Burst = Callable[[int], list[float]]

FLUSH_BYTES = 256 * 2**20  # several times the L2 of any GPU so far; do_bench's choice too
GRAPH_CALLS_MS = 2.0  # device time that one graph should hold, so that the launch of the graph does not count
HOST_CALLS = 100  # calls per host sample: fewer than a stream's queue holds


@dataclass(frozen=True)
class Effort:
    """How much wall time to spend on one implementation of one case."""

    rounds: int = 5
    round_ms: float = 40.0
    warmup_ms: float = 40.0
    lead_in_ms: float = 60.0  # untimed start of each turn: at its power cap a GPU must find the clock for a kernel
    rest_ms: float = 2000.0  # idle time of a GPU before each case, so that none pays for the heat of the one before
    seed: int = 0  # of the order in which implementations take turns

    def samples(self, ms: float) -> int:
        """How many samples fill a round when one takes ``ms`` of wall time. At least 3, for a round has a median."""
        return max(3, int(self.round_ms / ms))


# For the suite that asks what is left after seconds at the power cap.
SUSTAINED = Effort(round_ms=100.0, warmup_ms=800.0, lead_in_ms=150.0, rest_ms=0.0)


def orders(names: Iterable[str], rounds: int, seed: int, case: str = "") -> list[list[str]]:
    """Who runs after whom in each round, shuffled: nobody always runs behind the same neighbour, whose heat it would
    pay for. Another case is shuffled in another way."""
    names = list(names)
    draw = random.Random(f"{seed} {case}")
    return [draw.sample(names, len(names)) for _ in range(rounds)]


def interleave(
    bursts: Mapping[str, Burst], effort: Effort, clock: Callable[[], float] = time.perf_counter, case: str = ""
) -> dict[str, list[list[float]]]:
    """Measure all bursts in turns. Returns the samples of each round, in milliseconds, by name."""
    names = list(bursts)
    samples = {name: effort.samples(_warm_up(bursts[name], effort, clock)) for name in names}
    lead_ins = {name: int(samples[name] * effort.lead_in_ms / effort.round_ms) for name in names}
    rounds = {name: [] for name in names}
    for order in orders(names, effort.rounds, effort.seed, case):
        for name in order:
            if lead_ins[name]:
                bursts[name](lead_ins[name])
            rounds[name].append(bursts[name](samples[name]))
    return rounds


def _warm_up(burst: Burst, effort: Effort, clock: Callable[[], float]) -> float:
    """Run for ``warmup_ms``, once at least. Returns the wall milliseconds per sample of the last burst."""
    begin = clock()
    n = 1
    while True:
        start = clock()
        burst(n)
        now = clock()
        if 1e3 * (now - begin) >= effort.warmup_ms:
            return max(1e3 * (now - start) / n, 1e-3)
        n = 5


def summarize(rounds: list[list[float]]) -> dict[str, float]:
    """The recorded columns: percentiles over all samples; standard deviation of the rounds' medians, percent."""
    samples = sorted(sample for one in rounds for sample in one)
    medians = [statistics.median(one) for one in rounds]
    middle = statistics.median(samples)
    spread = statistics.stdev(medians) if len(medians) > 1 else 0.0
    return {
        "ms_p50": middle,
        "ms_p10": _percentile(samples, 0.1),
        "ms_p90": _percentile(samples, 0.9),
        "std_pct": 100 * spread / middle,
        "samples": len(samples),
    }


def _percentile(ordered: list[float], share: float) -> float:
    """Linear interpolation between the neighbours, as numpy does by default."""
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def within(context: Callable[[], AbstractContextManager], burst: Burst) -> Burst:
    """The burst inside a context: entered once per burst, so it costs the measured calls nothing."""

    def run(n: int) -> list[float]:
        with context():
            return burst(n)

    return run


def wall_burst(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Burst:
    def run(n: int) -> list[float]:
        samples = []
        for _ in range(n):
            start = clock()
            call()
            samples.append(1e3 * (clock() - start))
        return samples

    return run


def event_burst(call: Callable[[], object], watch: Callable[[], None] = lambda: None) -> Burst:
    """``watch`` is called while the device still works through the burst, to read clocks and power."""
    import torch

    flush = _flush_buffer()

    def run(n: int) -> list[float]:
        starts = [torch.cuda.Event(enable_timing=True) for _ in range(n)]
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(n)]
        for start, end in zip(starts, ends, strict=True):
            flush.zero_()
            start.record()
            call()
            end.record()
        watch()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]

    return run


def graph_burst(
    call: Callable[[], object],
    watch: Callable[[], None] = lambda: None,
    context: Callable[[], AbstractContextManager] = nullcontext,
) -> Burst:
    """Capture enough calls to fill ``GRAPH_CALLS_MS`` and replay them; a sample is one replay over its calls.

    The burst keeps `call` alive, and with it the tensors that it reads: of them a graph has but the addresses, and the
    capture of the next graph returns free memory to the device.
    """
    import torch

    with context():
        ms = statistics.median(event_burst(call)(5))
        calls = max(1, min(200, int(GRAPH_CALLS_MS / ms)))
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()

    def run(n: int, alive: object = call) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
        graph.replay()  # the queue is never empty when a timed replay begins
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        watch()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / calls for before, after in pairwise(events)]

    return run


def host_burst(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Burst:
    import torch

    def run(n: int) -> list[float]:
        samples = []
        for _ in range(n):
            torch.cuda.synchronize()
            start = clock()
            for _ in range(HOST_CALLS):
                call()
            samples.append(1e3 * (clock() - start) / HOST_CALLS)
        torch.cuda.synchronize()
        return samples

    return run


_FLUSH = None


def _flush_buffer():
    """One buffer for the process: peers share it, and long suites need the memory."""
    global _FLUSH
    import torch

    if _FLUSH is None:
        _FLUSH = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    return _FLUSH
