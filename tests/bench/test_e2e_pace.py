"""Whole models: the pace of a generation, and who sets it."""

from __future__ import annotations

import pytest
import torch

from flashcore.bench.cases import SUITES
from flashcore.bench.models import Model, ModelCase

pytest.importorskip("transformers", minversion="5")
from flashcore.bench import e2e, models, suites, tables

GENERATE = ModelCase(Model("tiny", 97, 64, 96, 2, 4, 2), "generate", 40, 6, "float32")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about the CPU")


def test_a_generation_has_its_pace():
    for row in suites.run(SUITES["e2e"], [GENERATE], ("flashcore", "sdpa"))["rows"]:
        assert "failed" not in row, row
        assert row["first_token_ms"] > 0
        assert row["token_ms"] == pytest.approx((row["ms_p50"] - row["first_token_ms"]) / 5)
        assert row["launch_bound"] == (row["step_device_ms"] < models.LAUNCH_BOUND * row["token_ms"])


@pytest.mark.parametrize(("device_ms", "bound"), [(7.9, True), (8.1, False)])
def test_a_device_that_works_for_less_than_a_token_waits_for_the_host(monkeypatch, device_ms, bound):
    """100 ms for the first token and 10 for each of the 5 others."""
    tokens = []
    monkeypatch.setattr(e2e, "_milliseconds", lambda call, device: call() or 100.0)
    monkeypatch.setattr(e2e, "_generate", lambda network, case, ids: tokens.append(case.new_tokens))
    network = e2e.build(GENERATE.model, "float32", torch.device("cpu"))
    row = {"impl": "sdpa", "model": "tiny", "ms_p50": 150.0, "step_device_ms": device_ms}
    row |= e2e._pace(network, GENERATE, torch.zeros(1, 40, dtype=torch.long), row)
    assert tokens == [1]
    assert row["token_ms"] == pytest.approx(10)
    assert row["launch_bound"] is bound
    (table,) = tables.pace_tables([row, {"impl": "sdpa", "model": "tiny"}])
    assert table.rows == (("tiny", "sdpa", "100.00", "10.00", f"{device_ms:.2f}"),)
    assert [note.endswith("waits for the host: sdpa on tiny.") for note in table.notes] == [True] * bound


def test_without_generations_there_is_no_such_table():
    assert tables.pace_tables([{"impl": "sdpa", "model": "tiny", "tokens_per_s": 3.0}]) == []
