"""Decoding and the comparison of implementations, on the CPU; how their records are shown."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flashcore.bench import shapes, suites, tables, timing
from flashcore.bench.cases import SUITES, Case
from flashcore.bench.peers import PEERS, Peer
from flashcore.bench.shapes import load_anchors
from flashcore.bench.timing import Effort

FAST = Effort(rounds=2, round_ms=1, warmup_ms=0, lead_in_ms=0)
DECODE = Case(2, 1, 96, 4, 2, 32, False, "bfloat16")
MATRIX = Case(1, 48, 48, 2, 2, 32, True, "float32", label="a small one")


def run(name, case, impls):
    """On the wall clock: CUDA graphs need a GPU."""
    return suites.run(replace(SUITES[name], mode="events"), [case], impls, FAST)


@pytest.fixture
def add_peer(monkeypatch):
    def add(name, prepare, **more):
        monkeypatch.setitem(PEERS, name, Peer(name, "for a test", prepare, **more))

    return add


def test_decoding_is_measured_in_bytes_of_keys_and_values():
    case = SUITES["decode"].cases[0]
    assert case.kv_bytes == 2 * 8 * 8192 * 8 * 128 * 2
    assert case.speed(0.1)["tbps"] == pytest.approx(2.684, rel=1e-3)
    rows = run("decode", DECODE, ["flashcore", "sdpa"])["rows"]
    for row in rows:
        assert "failed" not in row
        assert row["op"] == "attention_decode"
        assert row["tbps"] == pytest.approx(DECODE.kv_bytes / row["ms_p50"] * 1e-9)
    assert "tbps" not in MATRIX.speed(1.0)


def test_decoding_takes_turns_on_copies_of_the_cache(add_peer, monkeypatch):
    """Together they exceed what L2 could hold."""
    monkeypatch.setattr(timing, "FLUSH_BYTES", 3 * DECODE.kv_bytes - 1)
    seen = []

    def prepare(case, q, k, v):
        right = PEERS["sdpa"].prepare(case, q, k, v)

        def call():
            seen.append(k.data_ptr())
            return right()

        return call

    add_peer("counted", prepare, transposed=True)
    (row,) = run("decode", DECODE, ["counted"])["rows"]
    assert "failed" not in row
    assert len(set(seen)) == 3
    assert seen[:3] == seen[3:6]


def test_bytes_follow_the_convention_of_the_anchors():
    """Three of the cases have anchors, of FlashAttention-3 beside cuDNN; their milliseconds have 5 decimals."""
    anchored = [(case, load_anchors("h200").get(shapes.key(row(case)))) for case in SUITES["decode"].cases]
    found = [(case, anchor) for case, anchor in anchored if anchor]
    assert len(found) == 3
    for case, anchor in found:
        best = min(anchor["ms"].values())
        assert case.speed(best)["tbps"] == pytest.approx(anchor["best_TBps"], rel=1e-3)
        assert anchor["ms"]["cudnn"] / best == pytest.approx(anchor["cudnn_over_best"], abs=2e-3)


def row(case):
    return {"op": "attention_decode", **case.fields()}


@pytest.mark.parametrize("name", ["decode", "matrix"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_they_need_a_gpu(name):
    assert "needs a CUDA GPU" in suites.run(SUITES[name], effort=FAST)["skipped"][0]["reason"]


def test_the_matrix_has_every_attention_once():
    attention = [name for name, peer in PEERS.items() if peer.operation == "attention"]
    assert len(set(SUITES["matrix"].peers)) == len(SUITES["matrix"].peers)
    others = {"reference", "fa2-varlen", "fa3-varlen", "flashcore-dense", "eager"}
    assert set(SUITES["matrix"].peers) == set(attention) - others
    labels = [case.label for case in SUITES["matrix"].cases]
    assert len(set(labels)) == 5
    assert all(labels)


def test_a_kernel_that_pytorch_does_not_have_is_not_measured(add_peer):
    def decline(case, q, k, v):
        raise RuntimeError("No available kernel. Aborting execution.")

    add_peer("declines", decline)
    data = run("matrix", MATRIX, ["sdpa", "declines"])
    assert [row["impl"] for row in data["rows"]] == ["sdpa"]
    assert data["skipped"] == [
        {"impl": "declines", "case": MATRIX.name, "reason": "PyTorch has no such kernel for it"}
    ]


def test_the_matrix_is_one_table_per_shape_with_who_is_missing(add_peer):
    add_peer("absent", None, unavailable=lambda: "absent is not installed")
    add_peer("wrong", lambda case, q, k, v: lambda: torch.zeros_like(q))
    data = run("matrix", MATRIX, ["wrong", "sdpa", "flashcore", "absent", "fa2"])
    times = {row["impl"]: row for row in data["rows"]}
    times["sdpa"]["ms_p50"], times["flashcore"]["ms_p50"] = 0.03, 0.02
    (table,) = tables.tables(data, {})
    assert table.title == "matrix: a small one (batch 1, S = 48, heads 2, head_dim 32, causal, fp32)"
    assert [row[:3] for row in table.rows] == [
        ("flashcore", "20.0", "1.50"), ("sdpa", "30.0", "1.00"), ("wrong", "failed", ""),
    ]  # fmt: skip
    assert float(table.rows[0][3]) < 1e-5
    assert table.notes[0].startswith("FAILED: wrong: rel_err")
    here = torch.cuda.is_available()
    on_no_shape = ["absent (absent is not installed)", *([] if here else ["fa2 (needs a CUDA GPU)"])]
    assert table.notes[-1] == f"Not measured at any shape: {', '.join(on_no_shape)}."
    assert ("Not measured: fa2 (float32 inputs)." in table.notes) == here


def test_decoding_is_shown_in_bytes_per_second():
    rows = [
        {"op": "attention_decode", "impl": impl, **case.fields(), "rel_err": 2e-3, "max_abs_err": 1e-3}
        | {"ms_p50": ms, "std_pct": 1.0, **case.speed(ms)}
        | ({"backend": backend} if impl == "flashcore" else {})
        for case, backend in zip(SUITES["decode"].cases[:2], ("triton", "hopper"), strict=True)
        for impl, ms in (("flashcore", 0.08), ("cudnn", 0.1))
    ]
    data = {"suite": "decode", "rows": rows, "skipped": [], "meta": {"method": {"mode": "graph"}}}
    (table,) = tables.tables(data, {})
    assert table.headers[5:7] == ("flashcore, TB/s", "cudnn, TB/s")
    assert table.rows[0][2:8] == ("1 x 8192", "8", "32:8", "3.36", "2.68", "1.25")
    assert table.notes[-1] == "The backend that FlashCore's plan picked: triton (1 shapes), hopper (1 shapes)."


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("decode", Case(2, 1, 4096, 8, 2, 64, False)),
        ("matrix", Case(1, 256, 256, 8, 8, 64, True, "float16", label="a small one")),
        ("matrix", Case(2, 1, 1024, 8, 2, 128, False, label="a small step")),
    ],
    ids=["decode", "matrix", "matrix-step"],
)
def test_graphs_of_everybody_on_a_gpu(name, case):
    """In CUDA graphs, as the suites run; FlexAttention would compile for a while."""
    impls = [impl for impl in SUITES[name].peers if impl != "flex"]
    data = suites.run(SUITES[name], [case], impls, FAST)
    rows = {row["impl"]: row for row in data["rows"]}
    assert {impl: row["failed"] for impl, row in rows.items() if "failed" in row} == {}
    assert {"flashcore", "flashcore-triton", "cudnn", "fa2"} <= rows.keys()
    assert all(0 < row["ms_p50"] < 1 for row in rows.values())
    assert tables.tables(data, {})
