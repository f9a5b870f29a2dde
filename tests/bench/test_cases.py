"""Suites and their arithmetic."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from flashcore.bench.cases import SUITES, Case
from flashcore.bench.machine import slug
from flashcore.bench.record import BENCHMARKS
from flashcore.bench.shapes import key, load_anchors

ANCHORS = {path.stem: json.loads(path.read_text()) for path in (BENCHMARKS / "anchors").glob("*.json")}


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


SQUARE = [(gpu, row) for gpu, found in ANCHORS.items() for row in found["rows"] if row["suite"] != "decode"]


@pytest.mark.parametrize("gpu", ANCHORS)
def test_anchors_name_their_gpu(gpu):
    assert slug(ANCHORS[gpu]["gpu"].partition(",")[0]) == gpu


@pytest.mark.parametrize("gpu", ANCHORS)
def test_an_anchor_estimates_a_peer_from_cudnn(gpu):
    """Without cuDNN, or with it alone, it says nothing about the others."""
    for row in ANCHORS[gpu]["rows"]:
        assert {"cudnn", "fa3"} <= row["ms"].keys()
        assert row["best"] == min(row["ms"], key=row["ms"].get)
        assert row["ms"]["cudnn"] / row["ms"][row["best"]] == pytest.approx(row["cudnn_over_best"], abs=2e-3)


@pytest.mark.parametrize(
    "row",
    [row for _, row in SQUARE],
    ids=[f"{gpu}-{r['suite']}-d{r['head_dim']}-s{r['seqlen']}-{r['causal']}" for gpu, r in SQUARE],
)
def test_flops_follow_the_convention_of_the_anchors(row):
    case = Case(
        row["batch"], row["seqlen"], row["seqlen"], row["heads"], row["kv_heads"], row["head_dim"], row["causal"],
        backward=row["suite"] == "backward",
    )  # fmt: skip
    best = min(row["ms"].values())
    # Their milliseconds have 5 decimals, which are up to 3 significant digits; their TFLOP/s one decimal.
    assert case.tflops(best) == pytest.approx(row["best_tflops"], rel=1e-3, abs=0.06)


# Of the H100's anchors one has a time of cuDNN's that was disturbed, and was left out.
@pytest.mark.parametrize(
    ("gpu", "suite", "without"),
    [
        *(("h200", suite, set()) for suite in ("forward", "backward", "small", "long")),
        ("h100", "forward", {"d128-s1024-b16-h16-causal-bf16"}),
        ("h100", "backward", set()),
    ],
)
def test_every_case_has_an_anchor(gpu, suite, without):
    anchors = load_anchors(gpu)
    op = SUITES[suite].op
    # Beyond those, `backward` has shapes of its own.
    cases = SUITES[suite].cases[:36]
    assert {c.name for c in cases if key({"op": op, **c.fields()}) not in anchors} == without


def test_a_causal_mask_needs_half():
    full = Case(2, 100, 300, 4, 2, 64, False)
    assert full.flops == 4 * 2 * 4 * 100 * 300 * 64
    assert Case(2, 100, 300, 4, 2, 64, True).flops * 2 == full.flops


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(5, 0), (5, 3), (None, 3), (7, None), (200, 200)])
def test_a_window_needs_what_it_sees(causal, window):
    """Counted one by one."""
    case = Case(2, 50, 70, 4, 2, 64, causal, window=window)
    left, right = window
    pairs = sum(
        (left is None or j >= i + 20 - left) and (j <= i + 20 if causal else right is None or j <= i + 20 + right)
        for i in range(50)
        for j in range(70)
    )
    assert case.flops == 4 * 2 * 4 * 64 * pairs
    assert replace(case, backward=True).flops * 2 == case.flops * 5


def test_the_odd_shapes():
    """By name; where nothing is said bf16 without a mask."""
    assert {case.name for case in SUITES["odd"].cases} == {
        "d248-s4096-b1-h8-causal-bf16",
        "d128-s4096-b1-h16-causal-fp16",
        "d64-s4000x500-b2-h16-causal-bf16",
        "d128-s16x4096-b8-h32:8-causal-bf16",
        "d128-s512-b4-h32-causal-fp16",
        "d128-s1000-b3-h10:2-full-bf16",
        "d96-s3000-b3-h5:1-full-bf16",
        "d80-s5120-b2-h14:2-full-bf16",
        "d64-s197-b16-h12-full-bf16",
        "d64-s1500-b1-h20-full-bf16",
        "d128-s4429-b2-h24-full-bf16",
        "d128-s128x16384-b2-h32:8-full-bf16",
    }
    assert SUITES["odd"].peers == SUITES["forward"].peers
    assert {case.dtype for case in set(SUITES["odd"].cases) & set(SUITES["small"].cases)} == {"float16"}


def test_the_windows_that_are_measured():
    cases = SUITES["window"].cases
    windows = {(c.head_dim, c.seqlen_q, c.window[0] + 1) for c in cases if c.features == {"window"}}
    assert windows == {(d, s, w) for d in (64, 128, 256) for s in (8192, 16384) for w in (128, 1024, 4096)}
    assert all(c.batch * c.seqlen_q == 16384 and c.causal for c in cases)
    assert {c.head_dim for c in cases if not c.features and c.seqlen_q == 16384} == {64, 128, 256}
    names = [case.name for case in cases]
    assert "d64-s8192-b2-h64:8-window128-sink-bf16" in names
    assert "d256-s8192-b2-h16:8-window4096-softcap50-bf16" in names
    assert {"softcap", "alibi", "sink"} < {f for c in cases if c.plain == cases[-4] for f in c.features}


def test_the_backward_pass_of_grouped_heads_and_windows():
    cases = SUITES["backward"].cases[36:]
    assert {(c.seqlen_q, c.window) for c in cases} == {
        (s, w) for s in (2048, 4096, 8192, 16384) for w in (None, (1023, 0))
    }
    assert {(c.heads, c.kv_heads, c.head_dim, c.causal, c.backward) for c in cases} == {(32, 8, 128, True, True)}


@pytest.mark.parametrize("suite", ["forward", "backward", "odd", "window", "matrix", "accuracy"])
def test_a_case_comes_back_from_its_row(suite):
    op = SUITES[suite].op
    for case in SUITES[suite].cases:
        assert Case.of(json.loads(json.dumps({"op": op, "impl": "x", **case.fields()}))) == case


def test_softcap_and_alibi_are_two_cases():
    with pytest.raises(ValueError, match="not both"):
        Case(1, 8, 8, 2, 2, 16, True, softcap=3.0, alibi=True)


def test_the_backward_pass_needs_two_and_a_half_times_the_forward():
    backward, forward = SUITES["backward"].cases[:36], SUITES["forward"].cases
    assert [2 * case.flops for case in backward] == [5 * case.flops for case in forward]
    assert [case.fields() for case in backward] == [case.fields() for case in forward]
