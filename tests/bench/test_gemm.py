"""The matrix products of the harness: cases, truth, rows and table, on the CPU."""

from __future__ import annotations

import pytest
import torch

from flashcore.bench import gemm, suites, tables
from flashcore.bench.cases import SUITES, GemmCase
from flashcore.bench.peers import PEERS, Peer
from flashcore.bench.timing import Effort

FAST = Effort(rounds=2, round_ms=1, warmup_ms=0, lead_in_ms=0)
CASES = (
    GemmCase("large", 64, 48, 32, "bfloat16", "float32"),
    GemmCase("up", 32, 24, 64, weight=True),
    GemmCase("up", 32, 24, 64, weight=True, activation="swiglu"),
)


def run(names=("flashcore-matmul", "cublas"), cases=CASES):
    return suites.run(SUITES["gemm"], cases, names, FAST)


def test_the_suite_has_the_shapes_of_the_design():
    cases = SUITES["gemm"].cases
    assert len({case.name for case in cases}) == len(cases) == 12 + 1 + 30 + 9
    assert {(c.dtype, c.out_dtype) for c in cases if c.group == "large"} == {
        ("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float16", "float16"), ("float16", "float32"),
    }  # fmt: skip
    assert {c.m for c in cases if c.weight and not c.activation} == {16, 128, 1024, 4096, 16384}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_inputs_lie_in_memory_as_the_case_says(case):
    a, b = gemm.make_inputs(case, "cpu")
    assert a.shape == (case.m, case.k)
    assert b.shape == (case.k, case.columns)
    assert (b.t() if case.weight else b).is_contiguous()
    assert gemm.cublas(case, a, b)().shape == case.out_shape


def test_swiglu_counts_both_halves():
    assert CASES[2].flops == 2 * CASES[1].flops


def test_rows_are_right_and_become_a_table():
    data = run()
    assert len(data["rows"]) == 6
    for row in data["rows"]:
        assert "failed" not in row, row
        assert row["op"] == "gemm"
        assert row["tflops"] > 0
    assert data["rows"][0]["backend"] == "torch" or torch.cuda.is_available()
    (table,) = tables.tables(data, {})
    assert len(table.rows) == 3
    assert any("SwiGLU" in note for note in table.notes)


def test_a_wrong_column_is_found_and_shown(monkeypatch):
    def prepare(case, a, b):
        out = gemm.cublas(case, a, b)()
        out[:, 5] = 0
        return lambda: out

    monkeypatch.setitem(PEERS, "flashcore-matmul", Peer("flashcore-matmul", "wrong", prepare, operation="gemm"))
    data = run(cases=CASES[:1])
    assert "rel_err" in data["rows"][0]["failed"]
    (table,) = tables.tables(data, {})
    assert "failed" in table.rows[0]
    assert table.notes[0].startswith("FAILED: flashcore-matmul on large-64x48x32-bf16-fp32")


def test_only_some_rows_of_a_large_product_have_a_float64_answer():
    case = GemmCase("large", 640, 32, 16, "float32", "float32")
    a, b = gemm.make_inputs(case, "cpu")
    truth = gemm.Truth(case, a, b, flops=case.flops / 10)
    assert 0 < len(truth.rows) <= 64
    assert {0, 639} <= set(truth.rows.tolist())
    assert truth.errors(torch.mm(a, b)).rel_err < 1e-5


def test_implementations_of_another_operation_are_left_out():
    data = run(("flashcore", "cublas"), CASES[:1])
    assert [row["impl"] for row in data["rows"]] == ["cublas"]
    assert data["skipped"] == [{"impl": "flashcore", "reason": "it computes attention"}]
