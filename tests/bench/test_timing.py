"""The arithmetic of timing, with clocks that the tests turn."""

from __future__ import annotations

import gc
import statistics
import weakref
from itertools import pairwise
from unittest import mock

import pytest

from flashcore.bench import timing
from flashcore.bench.timing import Effort


class Clock:
    """A clock that only moves when a call takes time."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def spend(self, ms: float) -> None:
        self.seconds += ms / 1e3


def bursts(clock: Clock, times: dict[str, float], order: list[str]):
    """Bursts that take a fixed time per sample and note who ran."""

    def make(name, ms):
        def run(n):
            order.append(name)
            clock.spend(n * ms)
            return [ms] * n

        return run

    return {name: make(name, ms) for name, ms in times.items()}


def test_rounds_take_turns_in_the_order_of_the_seed():
    def order(seed, case="x"):
        clock, order = Clock(), []
        effort = Effort(rounds=4, round_ms=10, warmup_ms=0.5, lead_in_ms=0, seed=seed)
        timing.interleave(bursts(clock, dict.fromkeys("abc", 1.0), order), effort, clock, case)
        assert order[:3] == ["a", "b", "c"]  # warm-up
        return order[3:]

    first = order(0)
    assert [sorted(first[i : i + 3]) for i in range(0, 12, 3)] == [["a", "b", "c"]] * 4
    assert first == order(0)
    assert first != order(1)
    assert first != order(0, "another case")


def test_nobody_always_follows_the_same_one():
    """With five and a rotating start, each always ran behind one neighbour."""
    names = ("flashcore", "flashcore-triton", "cudnn", "fa2", "fa3")
    for case in ("d64", "d128"):
        before = {a for order in timing.orders(names, 5, 0, case) for a, b in pairwise(order) if b == "flashcore"}
        assert len(before) > 1


def test_each_turn_begins_untimed():
    clock, order = Clock(), []
    effort = Effort(rounds=2, round_ms=10, warmup_ms=0.5, lead_in_ms=30)
    rounds = timing.interleave(bursts(clock, {"a": 1.0, "b": 1.0}, order), effort, clock)
    turns = order[2:]
    assert turns[::2] == turns[1::2]  # one burst untimed, one timed
    assert sorted(turns[:4]) == sorted(turns[4:]) == ["a", "a", "b", "b"]
    assert [len(one) for one in rounds["a"]] == [10, 10]
    assert clock.seconds * 1e3 == pytest.approx(2 + 4 * (30 + 10))


def test_samples_fill_the_round_but_are_never_fewer_than_three():
    clock = Clock()
    effort = Effort(rounds=2, round_ms=40, warmup_ms=1, lead_in_ms=0)
    rounds = timing.interleave(bursts(clock, {"quick": 2.0, "slow": 100.0}, []), effort, clock)
    assert [len(one) for one in rounds["quick"]] == [20, 20]
    assert [len(one) for one in rounds["slow"]] == [3, 3]


def test_warm_up_lasts_as_long_as_asked_and_runs_once_at_least():
    for warmup_ms, expected in ((0.0, 1.0), (50.0, 51.0)):
        clock = Clock()
        burst = bursts(clock, {"a": 1.0}, [])["a"]
        timing._warm_up(burst, Effort(warmup_ms=warmup_ms), clock)
        assert clock.seconds * 1e3 == pytest.approx(expected)


def test_a_slow_first_call_does_not_count():
    clock, first = Clock(), [True]

    def burst(n):
        clock.spend(500 if first and first.pop() else n * 1.0)
        return [1.0] * n

    rounds = timing.interleave({"a": burst}, Effort(rounds=1, round_ms=30, warmup_ms=501, lead_in_ms=0), clock)
    assert len(rounds["a"][0]) in (29, 30)  # rounding


def test_summary_is_percentiles_over_samples_and_spread_over_rounds():
    rounds = [[1.0, 2.0, 3.0], [2.0, 4.0, 90.0]]
    found = timing.summarize(rounds)
    assert found["ms_p50"] == statistics.median([1, 2, 2, 3, 4, 90])
    assert found["ms_p10"] == pytest.approx(1.5)
    assert found["ms_p90"] == pytest.approx(47)
    assert found["std_pct"] == pytest.approx(100 * statistics.stdev([2.0, 4.0]) / 2.5)
    assert found["samples"] == 6


def test_wall_burst_measures_each_call():
    clock = Clock()
    durations = iter([3.0, 5.0])
    assert timing.wall_burst(lambda: clock.spend(next(durations)), clock)(2) == pytest.approx([3.0, 5.0])


def test_a_context_is_entered_once_per_burst():
    entered = []

    class Context:
        def __enter__(self):
            entered.append(True)

        def __exit__(self, *_):
            return None

    assert timing.within(Context, lambda n: [1.0] * n)(4) == [1.0] * 4
    assert len(entered) == 1


def test_a_graph_keeps_what_its_calls_read(monkeypatch):
    """Freed, it would be given back to the device by the next capture, and the next replay would read it."""
    import torch

    class Call:
        def __call__(self):
            pass

    monkeypatch.setattr(torch, "cuda", mock.MagicMock())
    monkeypatch.setattr(timing, "event_burst", lambda call: lambda n: [timing.GRAPH_CALLS_MS] * n)
    call = Call()
    held = weakref.ref(call)
    burst = timing.graph_burst(call)
    del call
    gc.collect()
    assert held() is not None
    del burst
    gc.collect()
    assert held() is None


@pytest.mark.gpu
def test_every_burst_finds_a_longer_kernel_longer():
    import torch

    small, large = (torch.randn(n, n, device="cuda") for n in (1024, 4096))
    for make in (timing.event_burst, timing.graph_burst):
        times = [statistics.median(make(lambda x=x: x @ x)(10)) for x in (small, large)]
        assert times[1] > 8 * times[0], make.__name__
    assert 0 < statistics.median(timing.host_burst(lambda: small @ small)(3)) < 1


@pytest.mark.gpu
def test_device_time_does_not_depend_on_a_slow_host():
    import time

    import torch

    x = torch.randn(2048, 2048, device="cuda")

    def slow_host():
        time.sleep(50e-6)
        return x @ x

    fast, slow = (statistics.median(timing.graph_burst(call)(10)) for call in (lambda: x @ x, slow_host))
    assert slow == pytest.approx(fast, rel=0.2)
