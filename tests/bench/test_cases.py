"""Suites and their arithmetic."""

from __future__ import annotations

import json

import pytest

from flashcore.bench.cases import SUITES, Case
from flashcore.bench.record import BENCHMARKS

ANCHORS = json.loads((BENCHMARKS / "anchors" / "h200.json").read_text())["rows"]


def test_forward_is_the_36_shapes_of_16k_tokens():
    cases = SUITES["forward"].cases
    assert len(set(cases)) == 36
    assert {c.batch * c.seqlen_q for c in cases} == {16384}
    assert {c.heads * c.head_dim for c in cases} == {2048}
    assert {(c.head_dim, c.causal) for c in cases} == {(d, m) for d in (64, 128, 256) for m in (False, True)}
    assert {c.seqlen_q for c in cases} == {512, 1024, 2048, 4096, 8192, 16384}
    assert {c.dtype for c in cases} == {"bfloat16"}


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_names_tell_the_cases_of_a_suite_apart(suite):
    names = [case.name for case in suite.cases]
    assert len(set(names)) == len(names)


SQUARE = [row for row in ANCHORS if row["suite"] != "decode"]


@pytest.mark.parametrize("row", SQUARE, ids=lambda r: f"{r['suite']}-d{r['head_dim']}-s{r['seqlen']}-{r['causal']}")
def test_flops_follow_the_convention_of_the_anchors(row):
    case = Case(
        row["batch"], row["seqlen"], row["seqlen"], row["heads"], row["kv_heads"], row["head_dim"], row["causal"],
        backward=row["suite"] == "backward",
    )  # fmt: skip
    best = min(row["ms"].values())
    # Their milliseconds have 5 decimals, which are up to 3 significant digits; their TFLOP/s one decimal.
    assert case.tflops(best) == pytest.approx(row["best_tflops"], rel=1e-3, abs=0.06)
    assert row["ms"]["cudnn"] / best == pytest.approx(row["cudnn_over_best"], abs=2e-3)


@pytest.mark.parametrize("suite", ["forward", "backward", "small", "long"])
def test_every_case_has_an_anchor(suite):
    anchors = {
        (r["dtype"], r["batch"], r["heads"], r["kv_heads"], r["seqlen"], r["head_dim"], r["causal"])
        for r in SQUARE
        if (r["suite"] == "backward") == (suite == "backward")
    }
    for c in SUITES[suite].cases:
        assert (c.dtype, c.batch, c.heads, c.kv_heads, c.seqlen_q, c.head_dim, c.causal) in anchors, c.name


def test_a_causal_mask_needs_half():
    full = Case(2, 100, 300, 4, 2, 64, False)
    assert full.flops == 4 * 2 * 4 * 100 * 300 * 64
    assert Case(2, 100, 300, 4, 2, 64, True).flops * 2 == full.flops


def test_the_backward_pass_needs_two_and_a_half_times_the_forward():
    backward, forward = SUITES["backward"].cases, SUITES["forward"].cases
    assert [2 * case.flops for case in backward] == [5 * case.flops for case in forward]
    assert [case.fields() for case in backward] == [case.fields() for case in forward]
