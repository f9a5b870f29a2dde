"""The suite of backward passes, on the CPU: its float64 gradients, its judge, and what is timed."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from flashcore.bench import backward, check, suites, tables
from flashcore.bench.cases import SUITES, Case
from flashcore.bench.peers import PEERS, Peer
from flashcore.bench.shapes import load_anchors, shapes
from flashcore.bench.timing import Effort
from flashcore.cli import app

FAST = Effort(rounds=2, round_ms=1, warmup_ms=0, lead_in_ms=0)
CASE = Case(2, 48, 48, 4, 2, 32, True, "bfloat16", backward=True)


def run(case=CASE, names=("flashcore", "sdpa")):
    return suites.run(SUITES["backward"], [case], names, FAST)


@pytest.fixture
def add_peer(monkeypatch):
    def add(name, prepare, **more):
        monkeypatch.setitem(PEERS, name, Peer(name, "for a test", prepare, **more))

    return add


@pytest.mark.parametrize(
    ("causal", "window"), [(False, None), (True, None), (True, (9, 0)), (False, (9, 4)), (False, (None, 4))]
)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(48, 48), (33, 57), (57, 33)])
def test_the_float64_gradients_are_those_of_autograd(causal, window, seqlen_q, seqlen_k, monkeypatch):
    case = Case(2, seqlen_q, seqlen_k, 4, 2, 16, causal, "float64", backward=True, window=window)
    tensors = backward.make_inputs(case, "cpu")
    expected = backward.prepare(PEERS["reference"], case, *tensors)()
    monkeypatch.setattr(check, "SCORES", 2 * seqlen_k * 7)  # 7 rows at a time
    truth = backward.Truth(case, *tensors)
    assert len(truth.slices[0]) == 4  # all of them
    for batch, heads, head, (dq, dk, dv) in truth.slices[0]:
        torch.testing.assert_close(dq, expected[0][batch, :, heads])
        torch.testing.assert_close(dk, expected[1][batch, :, head])
        torch.testing.assert_close(dv, expected[2][batch, :, head])
    assert max(truth.errors(expected).columns().values()) < 1e-12


def test_windows_have_gradients_to_compare_with():
    case = replace(CASE, window=(9, 0))
    tensors = backward.make_inputs(case, "cpu")
    answer = backward.pytorch_answer(case, "cpu", *tensors)
    assert [x.dtype for x in answer] == [torch.bfloat16] * 3
    windowed, plain = (backward.Truth(c, *tensors).errors(answer) for c in (case, CASE))
    assert windowed.columns()["rel_err"] < 1e-2
    assert plain.columns()["rel_err"] > 0.1
    ours, sdpa = run(case, ("flashcore", "reference"))["rows"]
    assert "failed" not in ours | sdpa


def test_gradients_that_nobody_wrote_out_are_refused():
    case = replace(CASE, softcap=3.0)
    with pytest.raises(NotImplementedError, match="softcap"):
        backward.pytorch_answer(case, "cpu", *backward.make_inputs(case, "cpu"))


def test_slices_are_spread_and_few():
    case = replace(CASE, batch=6, heads=10, kv_heads=5)
    tensors = backward.make_inputs(case, "cpu")
    pairs = [(batch, head) for batch, _, head, _ in backward.Truth(case, *tensors).slices[0]]
    assert len(set(pairs)) == len(pairs) == backward.SLICES
    assert (pairs[0], pairs[-1]) == ((0, 0), (5, 4))
    few = backward.Truth(case, *tensors, flops=1)
    assert [(batch, head) for batch, _, head, _ in few.slices[0]] == [(0, 0), (5, 4)]


def test_a_row_has_all_columns():
    ours, sdpa, math = run(names=("flashcore", "sdpa", "math"))["rows"]
    for row in (ours, sdpa, math):
        assert row["op"] == "attention_bwd"
        assert "failed" not in row
        assert row["ms_p50"] > 0
        assert row["tflops"] == pytest.approx(2.5 * replace(CASE, backward=False).tflops(row["ms_p50"]))
        assert row["rel_err"] == max(row[f"rel_err_{name}"] for name in backward.NAMES)
        assert all(0 < row[f"rel_err_{name}"] < 2e-2 for name in backward.NAMES)
    assert ours["backward"] == "autograd" or torch.cuda.is_available()


def test_only_the_backward_pass_is_timed(add_peer):
    calls = []

    def prepare(case, q, k, v):
        right = PEERS["sdpa"].prepare(case, q, k, v)

        def call():
            assert torch.is_grad_enabled()
            calls.append(1)
            return right()

        return call

    add_peer("counted", prepare, transposed=True)
    (row,) = run(names=("counted",))["rows"]
    assert row["samples"] >= 6
    assert calls == [1]


def test_the_output_gradient_reaches_peers_of_both_layouts():
    """Every element of dO differs, so that a gradient read in the wrong layout is a wrong one."""
    rows = run(replace(CASE, kv_heads=4, causal=False), ("reference", "sdpa"))["rows"]
    assert [row["impl"] for row in rows if "failed" not in row] == ["reference", "sdpa"]


def test_a_peer_without_gradients_is_recorded_as_failed(add_peer):
    add_peer("forward only", lambda case, q, k, v: lambda: q.detach())
    bad, good = run(names=("forward only", "sdpa"))["rows"]
    assert "does not require grad" in bad["failed"]
    assert "ms_p50" in good


def test_where_pytorch_has_no_flash_kernel_its_own_choice_is_what_counts(add_peer):
    def prepare(case, q, k, v):
        raise RuntimeError("No available kernel. Aborting execution.")

    tensors = backward.make_inputs(CASE, "cpu")
    add_peer("fa2", prepare)
    answer = backward.pytorch_answer(CASE, "cuda", *tensors)
    for ours, theirs in zip(answer, backward.prepare(PEERS["sdpa"], CASE, *tensors)(), strict=True):
        assert torch.equal(ours, theirs)


def test_its_cases_are_not_profiled_as_forward_passes():
    result = CliRunner().invoke(app, ["profile", "--suite", "backward", "--case", "d64-s512"])
    assert result.exit_code != 0
    assert "only forward passes" in result.output


@pytest.fixture
def judged():
    tensors = backward.make_inputs(CASE, "cpu")
    truth = backward.Truth(CASE, *tensors, flops=1)  # 2 of the 4 slices
    right = backward.pytorch_answer(CASE, "cpu", *tensors)

    def judge(grads):
        return backward.judge(CASE, truth, grads, right, truth.errors(right))

    return right, judge


def test_each_gradient_is_judged(judged):
    right, judge = judged
    errors, wrong = judge(right)
    assert wrong is None
    for index, name in enumerate(backward.NAMES):
        for change, reason in (
            (lambda x: 1.05 * x, "rel_err"),
            (lambda x: x.float(), "instead of"),
            (lambda x: torch.full_like(x, torch.nan), "NaN"),
        ):
            grads = list(copy.copy(right))
            grads[index] = change(grads[index])
            found, wrong = judge(grads)
            assert wrong.startswith(f"{name}: ")
            assert reason in wrong
            assert found is None or getattr(found, name).rel_err > 5 * getattr(errors, name).rel_err


def test_an_error_in_a_head_without_a_float64_answer_is_found(judged):
    right, judge = judged
    dq = right[0].clone()
    dq[0, :, -1] *= 1.05  # of the first batch entry the first key head's queries alone are in a slice
    _, wrong = judge((dq, *right[1:]))
    assert wrong.startswith("dq: a head differs from PyTorch")


def test_the_table_says_whose_backward_it_was():
    case = SUITES["backward"].cases[0]
    rows = [
        {
            "op": "attention_bwd",
            "impl": impl,
            **case.fields(),
            "rel_err": 3e-3,
            "max_abs_err": 1e-2,
            "std_pct": 1.0,
        }
        | {
            "ms_p50": ms,
            "tflops": case.tflops(ms),
            **({"backward": "torch-flash"} if impl == "flashcore" else {}),
        }
        for impl, ms in (("flashcore", 1.0), ("cudnn", 0.8))
    ]
    data = {"suite": "backward", "rows": rows, "meta": {"method": {"mode": "events"}}}
    (shape,) = shapes(data, load_anchors("h200"))
    assert shape.case == case
    assert shape.anchor["suite"] == "backward"
    assert shape.best_ms == pytest.approx(0.8 / 1.086)
    (table,) = tables.tables(data, load_anchors("h200"))
    assert table.rows[0][5:8] == (f"{case.tflops(1):.0f}", f"{case.tflops(0.8):.0f}", "0.74")
    assert "torch-flash (1 shapes)" in table.notes[-1]
