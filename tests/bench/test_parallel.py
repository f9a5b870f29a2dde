"""One sequence on two ranks, on a CPU: both methods and one rank, checked and timed."""

import json
import math

import pytest
import torch

from flashcore.bench import parallel, suites, tables
from flashcore.bench.cases import SUITES, Case, ParallelCase
from flashcore.bench.timing import Effort

FAST = Effort(rounds=2, round_ms=1.0, lead_in_ms=0.0, rest_ms=0.0)
CASES = [ParallelCase(Case(1, 64, 64, 4, 2, 16, True, "float32"), phase) for phase in ("forward", "train")]

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not torch.distributed.is_available(), reason="about the CPU, with torch.distributed"
)


@pytest.fixture(scope="module")
def data():
    return suites.run(SUITES["parallel"], CASES, None, FAST, "abc")


def test_everybody_is_right_and_timed(data):
    assert [(row["impl"], row["phase"]) for row in data["rows"]] == [
        (impl, phase) for phase in ("forward", "train") for impl in ("ring", "ulysses", "one-gpu")
    ]
    for row in data["rows"]:
        assert "failed" not in row, row
        assert row["ms_p50"] > 0
        assert row["rel_err"] < 1e-5
        flops = 2 * 4 * 64 * 64 * 16 * (3.5 if row["phase"] == "train" else 1)
        assert math.isclose(row["tflops"], flops / row["ms_p50"] * 1e-9)
    assert data["skipped"] == [{"impl": "context-parallel", "reason": "needs two CUDA GPUs"}]
    json.dumps(data, allow_nan=False)


def test_table(data):
    (table,) = tables.tables(data, {})
    assert [row[:4] for row in table.rows] == [("16", "4:2", "64", phase) for phase in ("forward", "train")]
    for row in table.rows:
        ring, ulysses, one = map(float, row[4:7])
        assert float(row[7]) == pytest.approx(one / min(ring, ulysses), abs=0.05, rel=0.1)
        assert row[8] == ""


def test_failures_are_shown():
    rows = [{"op": "parallel", "impl": "ring", **CASES[0].fields(), "failed": "differs from one GPU by 0.3"}]
    (table,) = tables.tables({"suite": "parallel", "rows": rows, "skipped": []}, {})
    assert table.rows[0][4] == "failed"
    assert table.notes == ("FAILED: ring: differs from one GPU by 0.3",)


def test_a_rank_that_dies_fails_its_case(monkeypatch):
    def die(*args, **kwargs):
        raise RuntimeError("process 1 terminated with signal SIGABRT")

    monkeypatch.setattr(torch.multiprocessing, "spawn", die)
    ((name, rows, skipped),) = parallel.measure(CASES[:1], ["ring", "ulysses"], FAST, lambda name: None)
    assert name == CASES[0].name
    assert [row["failed"] for row in rows] == ["process 1 terminated with signal SIGABRT"] * 2
    assert skipped == []


def test_long_sequences_need_gpus():
    data = suites.run(SUITES["parallel"], SUITES["parallel"].cases, None, FAST, "abc")
    assert data["rows"] == []
    assert {entry["reason"] for entry in data["skipped"] if "case" in entry} == {
        f"{tokens} tokens need two CUDA GPUs" for tokens in (16384, 65536, 131072)
    }
