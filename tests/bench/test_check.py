"""The judge of answers: it must accept a right one and name what is wrong with any other."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import flashcore
from flashcore.bench import check
from flashcore.bench.cases import Case
from flashcore.bench.peers import PEERS

CASE = Case(2, 96, 96, 4, 2, 32, True, "bfloat16")


@pytest.fixture
def judged():
    q, k, v = check.make_inputs(CASE, "cpu")
    truth = check.Truth(CASE, q, k, v)
    out = flashcore.attention(q, k, v, causal=True, backend="sdpa")

    def judge(answer: torch.Tensor) -> str | None:
        return check.judge(CASE, truth, answer, out, truth.errors(out))[1]

    return out, judge


def test_a_right_answer_passes(judged):
    out, judge = judged
    assert judge(out) is None
    assert judge((out.float() * 1.0001).to(out.dtype)) is None


def test_each_kind_of_wrong_answer_is_named(judged):
    out, judge = judged
    one_off = out.clone()
    one_off[1, 50, 2, 7] += 0.05
    unwritten = out.clone()
    unwritten[0, 95] = float("nan")
    assert "rel_err" in judge(out * 1.02)
    assert "max_abs_err" in judge(one_off)
    assert "NaN" in judge(unwritten)
    assert "instead of" in judge(out[:, :95])
    assert "instead of" in judge(out.float())


def test_an_error_in_rows_without_a_float64_answer_is_found():
    q, k, v = check.make_inputs(CASE, "cpu")
    few = check.Truth(CASE, q, k, v, flops=4 * 2 * 4 * 96 * 96 * 32 // 3)
    out = flashcore.attention(q, k, v, causal=True, backend="sdpa")
    checked = {row for start, stop, _ in few.blocks[0] for row in range(start, stop)}
    assert {0, 95} <= checked
    missed = min(set(range(96)) - checked)
    wrong = out.clone()
    wrong[:, missed] += 1
    assert few.errors(wrong) == few.errors(out)
    assert "differs from PyTorch" in check.judge(CASE, few, wrong, out, few.errors(out))[1]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(64, 64), (40, 72), (72, 40)])
def test_blocks_of_rows_are_the_rows_of_the_whole(causal, seqlen_q, seqlen_k, monkeypatch):
    case = Case(2, seqlen_q, seqlen_k, 4, 4, 16, causal, "float64")
    q, k, v = check.make_inputs(case, "cpu")
    whole = flashcore.attention(q, k, v, causal=causal, backend="reference")
    monkeypatch.setattr(check, "SCORES", 2 * 4 * seqlen_k * 7)  # 7 rows at a time
    blocks = check.Truth(case, q, k, v).blocks[0]
    assert len(blocks) == -(-seqlen_q // 7)
    torch.testing.assert_close(torch.cat([answer for *_, answer in blocks], dim=1), whole)


def test_rows_are_spread_and_within_the_cost():
    case = Case(1, 65536, 65536, 8, 8, 128, True)
    ranges = check.checked_rows(case, check.FLOPS)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == case.seqlen_q
    assert len(ranges) == check.BLOCKS
    assert all(before[1] < after[0] for before, after in pairwise(ranges))
    rows = sum(stop - start for start, stop in ranges)
    assert 0.5 * check.FLOPS < 4 * 8 * rows * case.seqlen_k * 128 <= check.FLOPS


def test_outliers_are_one_in_a_thousand():
    q, _, _ = check.make_inputs(Case(4, 512, 512, 8, 8, 64, False, "float32", inputs="outliers"), "cpu")
    share = (q.abs() > 10).float().mean().item()
    assert 0.5e-3 < share < 1.5e-3


def test_inputs_are_drawn_by_seed():
    first, again, other = (check.make_inputs(CASE, "cpu", seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("head_dim", [64, 256])
def test_negative_inputs_have_a_very_negative_lse(head_dim):
    case = Case(1, 65, 65, 2, 2, head_dim, True, "bfloat16", "negative")
    q, k, v = check.make_inputs(case, "cpu")
    out, lse = flashcore.attention(q.double(), k.double(), v.double(), causal=True, return_lse=True)
    assert lse.max() < -4096 * head_dim**-0.5 + 10
    assert lse.max() < -88  # below which exp is 0 in float32
    assert 0.05 < out.std() < 1  # and yet an ordinary softmax: several keys share a row
    assert torch.isfinite(out).all()


def test_large_inputs_have_scores_of_hundreds():
    q, k, _ = check.make_inputs(Case(1, 65, 65, 2, 2, 64, True, "float16", "large"), "cpu")
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / 8
    assert 200 < scores.abs().max() < 1000


FEATURES = (
    {"window": (20, 0)},
    {"causal": False, "window": (20, 5)},
    {"causal": False, "window": (None, 5)},
    {"softcap": 2.0},
    {"alibi": True},
    {"causal": False, "alibi": True},
    {"sink": True},
    {"window": (9, 0), "softcap": 1.5, "sink": True},
)


@pytest.mark.parametrize("feature", FEATURES, ids=str)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(64, 64), (40, 72), (72, 40)])
def test_the_written_out_answer_is_that_of_the_specification(feature, seqlen_q, seqlen_k, monkeypatch):
    case = replace(Case(2, seqlen_q, seqlen_k, 4, 2, 16, True, "float64"), **feature)
    q, k, v = check.make_inputs(case, "cpu")
    expected = PEERS["reference"].prepare(case, q, k, v)()
    monkeypatch.setattr(check, "SCORES", 2 * 4 * seqlen_k * 7)  # 7 rows at a time
    truth = check.Truth(case, q, k, v)
    assert len(truth.blocks[0]) == -(-seqlen_q // 7)
    assert truth.errors(expected).rel_err < 1e-12
    plain = PEERS["reference"].prepare(case.plain, q, k, v)()
    assert truth.errors(plain).rel_err > 1e-2


@pytest.mark.parametrize("feature", FEATURES, ids=str)
def test_what_stands_for_pytorch_is_as_good_as_its_dtype(feature):
    case = replace(CASE, **feature)
    tensors = check.make_inputs(case, "cpu")
    errors = check.Truth(case, *tensors).errors(check.in_blocks(case, *tensors))
    fa2_like = check.Truth(CASE, *tensors).errors(flashcore.attention(*tensors, causal=True, backend="sdpa"))
    assert 1e-4 < errors.rel_err < 2 * fa2_like.rel_err


def test_a_window_costs_what_it_sees():
    case = Case(1, 16384, 16384, 8, 8, 128, True)
    assert len(check.checked_rows(case, check.FLOPS)) == check.BLOCKS
    assert check.checked_rows(replace(case, window=(127, 0)), check.FLOPS) == [(0, 16384)]
