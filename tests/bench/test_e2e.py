"""Whole models on the CPU: tiny ones, with attention that behaves and attention that does not."""

from __future__ import annotations

import importlib.util
import time
import warnings
from dataclasses import replace

import pytest
import torch

from flashcore.bench import models, suites, tables
from flashcore.bench.cases import SUITES
from flashcore.bench.models import Model, ModelCase
from flashcore.errors import FlashCoreWarning

transformers = pytest.importorskip("transformers", minversion="5")
from flashcore.bench import e2e  # noqa: E402
from flashcore.integrations import transformers as integration  # noqa: E402

TINY = Model("tiny", 97, 64, 96, 2, 4, 2)
PREFILL, GENERATE, TRAIN = CASES = (
    ModelCase(TINY, "prefill", 48, dtype="float32"),
    ModelCase(TINY, "generate", 40, 6, "float32"),
    ModelCase(TINY, "train", 40, dtype="float32"),
)
IMPLS = ("flashcore", "sdpa", "eager")


def run(cases, names=IMPLS):
    return suites.run(SUITES["e2e"], cases, names, commit="abc")


@pytest.fixture(autouse=True)
def few_calls(monkeypatch, request):
    if torch.cuda.is_available() and "gpu" not in request.keywords:
        pytest.skip("about the CPU")
    monkeypatch.setattr(ModelCase, "calls", property(lambda case: 1 if case.phase == "generate" else 2))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for models as small as these
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def attend(monkeypatch):
    """Put another function in the place of FlashCore's attention."""
    return lambda function: monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "fcore", function)


def test_the_suite_is_what_was_asked_for():
    names = [case.name for case in SUITES["e2e"].cases]
    phases = ("prefill-2048", "prefill-8192", "prefill-32768", "generate-2048", "train-4096")
    assert names == [f"{model}-{phase}" for model in ("llama2-7b", "llama3-8b") for phase in phases]
    assert {case.new_tokens for case in SUITES["e2e"].cases if case.phase == "generate"} == {128}
    assert all(case.turns >= 2 for case in SUITES["e2e"].cases)
    assert SUITES["e2e"].peers == ("flashcore", "cudnn", "fa2", "eager")


def test_models_have_the_parameters_that_they_are_named_after():
    seven, eight = models.MODELS
    assert seven.parameters == 6_738_415_616
    assert eight.parameters == 8_030_261_248
    network = e2e.build(TINY, "float32", torch.device("cpu"))
    assert sum(p.numel() for p in network.parameters()) == TINY.parameters
    assert {p.dtype for p in e2e.build(TINY, "bfloat16", torch.device("cpu")).parameters()} == {torch.bfloat16}


def test_every_phase_is_measured():
    seen = []
    data = suites.run(SUITES["e2e"], CASES, IMPLS, on_case=seen.append)
    assert seen == [case.name for case in CASES]
    assert data["skipped"] == []
    assert data["meta"]["method"]["transformers"] == transformers.__version__
    assert data["meta"]["kernel_digest"]
    assert [(row["phase"], row["impl"]) for row in data["rows"]] == [(c.phase, i) for c in CASES for i in IMPLS]
    for row in data["rows"]:
        assert "failed" not in row, row
        assert row["op"] == "e2e"
        assert 0 < row["ms_p10"] <= row["ms_p50"] <= row["ms_p90"]
        counted = 6 if row["phase"] == "generate" else row["tokens"]
        assert row["tokens_per_s"] == pytest.approx(1e3 * counted / row["ms_p50"])
        assert row["samples"] == (3 if row["phase"] == "generate" else 6)
        assert 0 < row["attention_pct"] < 100
        if row["impl"] == "sdpa":
            assert row["reference"] is True
        else:
            assert row["rel_err"] < 1e-5
            assert row.get("tokens_equal") == (6 if row["phase"] == "generate" else None)
    ours = {row["phase"]: row for row in data["rows"] if row["impl"] == "flashcore"}
    assert {row["backend"] for row in ours.values()} == {"sdpa"}
    assert ours["train"]["backward"] == "autograd"
    assert "backward" not in ours["prefill"]


def test_the_record_grows_with_each_case(attend, monkeypatch):
    suite = replace(SUITES["e2e"], cases=CASES)
    monkeypatch.setitem(SUITES, "e2e", suite)
    seen = []

    def on_case(name):
        if name == CASES[1].name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        suites.run(suite, None, ("sdpa",), on_case=on_case, on_record=lambda data, done: seen.append(data))
    assert [len(data["rows"]) for data in seen] == [0, 1]
    assert seen[-1]["missing"] == [case.name for case in CASES[1:]]
    assert seen[-1]["meta"]["method"]["seed"] == 0


def test_half_precision_is_held_to_its_own_rounding():
    data = run([ModelCase(TINY, "prefill", 48)])
    assert not any("failed" in row for row in data["rows"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.phase)
def test_a_wrong_answer_is_failed_and_not_timed(attend, case):
    calls = []

    def wrong(module, query, key, value, *args, **kwargs):
        calls.append(1)
        out, weights = integration.attention_forward(module, query, key, value, *args, **kwargs)
        return 0.9 * out, weights

    attend(wrong)
    rows = {row["impl"]: row for row in run([case])["rows"]}
    assert "allowed" in rows["flashcore"]["failed"]
    assert rows["flashcore"]["rel_err"] > 1e-4
    assert not {"ms_p50", "tokens_per_s", "attention_pct"} & rows["flashcore"].keys()
    assert len(calls) <= TINY.layers * max(1, case.new_tokens)
    assert "tokens_per_s" in rows["eager"]


def test_nan_is_failed_and_can_be_recorded(attend):
    attend(lambda module, query, *rest, **more: (torch.full_like(query.transpose(1, 2), float("nan")), None))
    row = run([PREFILL])["rows"][0]
    assert "NaN" in row["failed"]
    assert "rel_err" not in row


def test_what_somebody_else_computed_is_not_taken_for_flashcore(attend):
    """A mask makes PyTorch compute it; a warning of another kind changes nothing."""

    def masked(module, query, key, value, mask, **kwargs):
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        return integration.attention_forward(module, query, key, value, mask, **kwargs)

    integration._warn_once.cache_clear()
    attend(masked)
    row = run([PREFILL])["rows"][0]
    assert row["failed"].startswith("FlashCoreWarning: attn_implementation")

    def warns(*args, **kwargs):
        warnings.warn("kernels are not kept on disk", FlashCoreWarning, stacklevel=2)
        return integration.attention_forward(*args, **kwargs)

    attend(warns)
    with pytest.warns(FlashCoreWarning, match="not kept"):
        assert "failed" not in run([PREFILL])["rows"][0]


def test_the_other_warning_that_counts_begins_as_expected():
    from flashcore import plan

    with pytest.warns(FlashCoreWarning, match=e2e.NOT_OURS):
        plan.warn_that_the_gpu_could_do_better("attention", "a test's", "a reason")


@pytest.mark.parametrize(("good", "when"), [(3, "while it was timed"), (10, "while attention was watched")])
def test_one_that_breaks_later_has_no_number(attend, good, when):
    """The first call is compared, then come three turns of a lead-in and two calls."""
    calls = []

    def breaks(*args, **kwargs):
        calls.append(1)
        if len(calls) > TINY.layers * good:
            raise RuntimeError("later")
        return integration.attention_forward(*args, **kwargs)

    attend(breaks)
    broken, *others = run([PREFILL])["rows"]
    assert broken["failed"] == f"{when}: RuntimeError: later"
    assert not {"ms_p50", "tokens_per_s", "samples"} & broken.keys()
    assert all("tokens_per_s" in row for row in others)


def test_who_cannot_run_is_listed_with_the_reason():
    data = run([PREFILL], ("flashcore", "fa2", "reference"))
    assert [row["impl"] for row in data["rows"]] == ["flashcore"]
    assert "rel_err" not in data["rows"][0]  # nobody to compare with
    assert data["skipped"] == [
        {"impl": "fa2", "reason": "needs a CUDA GPU"},
        {"impl": "reference", "reason": "it is no attention of a Transformers model"},
    ]


def test_large_models_are_for_a_gpu():
    data = run(SUITES["e2e"].cases)
    assert data["rows"] == []
    assert len(data["skipped"]) == 10
    assert "6.7 G parameters need a CUDA GPU" in data["skipped"][0]["reason"]


def test_without_transformers_the_suite_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    data = run(CASES)
    assert data["rows"] == []
    assert data["skipped"] == [{"reason": "transformers is not installed"}]


def test_with_an_older_transformers_too(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "4.57.6")
    data = run(CASES)
    assert data["rows"] == []
    assert "transformers 4.57.6" in data["skipped"][0]["reason"]


def test_eager_runs_where_its_scores_fit(monkeypatch):
    h200 = 150 * 10**9
    monkeypatch.setattr(e2e, "_memory", lambda device: h200)
    fits = {case.name for case in SUITES["e2e"].cases if e2e._too_large(case, torch.device("cpu")) is None}
    phases = ("prefill-2048", "prefill-8192", "generate-2048")
    assert fits == {f"{model}-{phase}" for model in ("llama2-7b", "llama3-8b") for phase in phases}
    monkeypatch.setattr(e2e, "_memory", lambda device: PREFILL.eager_bytes)
    data = run([PREFILL])
    assert [row["impl"] for row in data["rows"]] == ["flashcore", "sdpa"]
    assert data["skipped"][0]["reason"].startswith("it keeps its scores: about 0 GiB")


def test_tokens_count_until_the_first_other_one():
    known = e2e.Answer(torch.ones(4, 3), torch.tensor([5, 6, 7, 8]))
    values = torch.ones(4, 3)
    values[2:] = torch.tensor([[1.1], [100.0]])
    found = e2e.Answer(values, torch.tensor([5, 6, 9, 8])).compared_with(known)
    assert found == {"rel_err": pytest.approx(0.1 / 3**0.5), "tokens_equal": 2}
    assert e2e.Answer(known.values, known.tokens).compared_with(known) == {"rel_err": 0, "tokens_equal": 4}
    assert e2e.Answer(torch.tensor([3.0])).compared_with(e2e.Answer(torch.tensor([2.0]))) == {"rel_err": 0.5}


@pytest.mark.parametrize("name", IMPLS)
def test_the_stopwatch_sees_every_attention_forward_and_backward(name):
    network = e2e.build(TINY, "float32", torch.device("cpu"))
    ids = torch.arange(40)[None]
    with e2e.watched(network, name) as watch:
        e2e._prefill(network, ids)
        assert len(watch.marks) == 2 * TINY.layers
        e2e._train(network, ids)
    assert len(watch.marks) == 2 * TINY.layers * 3
    assert watch.marks == sorted(watch.marks)
    assert watch.milliseconds() > 0
    known = network.model.layers[0].self_attn.q_proj.weight.grad.clone()
    with e2e._attending(network, name):
        e2e._train(network, ids)
    torch.testing.assert_close(network.model.layers[0].self_attn.q_proj.weight.grad, known)


def test_what_holds_up_a_first_call_is_no_share_of_attention(attend):
    calls = []

    def slow_at_first(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            time.sleep(1.0)
        return integration.attention_forward(*args, **kwargs)

    attend(slow_at_first)
    network = e2e.build(TINY, "float32", torch.device("cpu"))
    found = e2e._share(network, TRAIN, torch.arange(40)[None], "flashcore")
    assert len(calls) == 2 * TINY.layers
    assert 0 < found["attention_ms"] < 1000


def test_the_stopwatch_runs_around_the_backward_of_attention_only():
    """The marks of the way back enclose the gradient of attention, and nothing else."""
    watch = e2e.Stopwatch(torch.device("cpu"))
    seen = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            seen.append(len(watch.marks))
            return grad

    q = Probe.apply(torch.ones(2, requires_grad=True))
    q, k, v = e2e._Enter.apply(watch, q, torch.ones(2), torch.ones(2))
    out = Probe.apply(e2e._Leave.apply(watch, Probe.apply(q * k * v)))
    out.sum().backward()
    assert seen == [2, 3, 4]


def test_a_decoding_step_lies_behind_the_prompt():
    network = e2e.build(TINY, "float32", torch.device("cpu")).eval()
    with e2e._attending(network, "sdpa"):
        step = e2e._decoding_step(network, torch.arange(40)[None])
        out = step()
    assert out.logits.shape == (1, 1, 97)
    assert out.past_key_values.get_seq_length() == 43


def test_the_record_becomes_tables(monkeypatch):
    monkeypatch.setattr(e2e, "_too_large", lambda case, device: "no room" if case.phase == "train" else None)
    data = run(CASES)
    data["rows"][0]["failed"] = "as the test likes it"
    del data["rows"][0]["tokens_per_s"]
    speed, share, pace, memory, distance = tables.tables(data, {})
    assert speed.headers[:6] == ("model", "phase", "tokens", *IMPLS)
    assert {row[0] for row in speed.rows} == {"tiny"}
    assert [row[1:3] for row in speed.rows] == [("prefill", "48"), ("generate", "40 + 6"), ("train", "40")]
    assert speed.rows[0][3] == "failed"
    assert speed.rows[0][6] == ""  # no ratio
    ours, sdpa = data["rows"][3], data["rows"][4]
    assert speed.rows[1][6] == f"{ours['tokens_per_s'] / sdpa['tokens_per_s']:.3f}"
    assert speed.rows[2][5] == ""
    assert speed.notes == (
        "Not measured: eager on tiny-train-40: no room.",
        "FAILED: flashcore on tiny-prefill-48: as the test likes it",
    )
    assert share.rows[2][-1] == "sdpa, backward autograd"
    assert [row[:2] for row in pace.rows] == [("tiny", impl) for impl in IMPLS]
    assert memory.rows[1][3] == ""  # of the CPU nobody knows
    assert distance.rows[1][4] == "reference"
    assert distance.rows[1][3].endswith(", 6 of 6 tokens")
    assert "e2e: whole models" in speed.title
    assert all(float(row[7]) >= 0 for row in speed.rows[1:])


@pytest.mark.gpu
def test_every_phase_on_a_gpu():
    model = Model("small", 1000, 512, 1024, 2, 8, 2)
    cases = (
        ModelCase(model, "prefill", 1024),
        ModelCase(model, "generate", 512, 8),
        ModelCase(model, "train", 1024),
    )
    data = run(cases, ("flashcore", "cudnn", "fa2", "eager", "sdpa"))
    assert data["skipped"] == []
    for row in data["rows"]:
        assert "failed" not in row, row
        assert 0 < row["attention_pct"] < 100
        assert 0 < row["peak_gib"] < 4
        assert row.get("reference") == (True if row["impl"] == "fa2" else None)
