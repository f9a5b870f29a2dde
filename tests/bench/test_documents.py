"""From records to documents."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace

import pytest

from flashcore.bench import documents, record, tables
from flashcore.bench.cases import SUITES, Case
from flashcore.bench.documents import Documents, replace_block
from flashcore.bench.shapes import load_anchors, shapes, summary


def test_the_documents_show_what_the_records_say():
    stale = [str(path.relative_to(documents.ROOT)) for path in Documents().stale()]
    assert stale == [], "run: flashcore report --update"


def test_the_best_peer_is_cudnn_scaled_by_the_anchors(forward_record, anchors):
    for shape in shapes(forward_record, anchors):
        expected = 500 * shape.anchor["cudnn_over_best"]
        assert shape.case.tflops(shape.best_ms) == pytest.approx(expected)
        assert shape.ratio == pytest.approx(600 / expected)


def test_a_measured_peer_counts_where_it_is_faster_than_the_estimate(forward_record, anchors):
    for row in forward_record["rows"]:
        if row["impl"] == "fa2":
            row["ms_p50"] /= 10
    assert [s.ratio for s in shapes(forward_record, anchors)] == pytest.approx([600 / 4000] * 36)


def test_an_anchor_of_something_else_does_not_count(forward_record, anchors):
    """Where cuDNN took several times as long, the host was measured."""
    slow = {key: {**row, "ms": {**row["ms"], "cudnn": 10 * row["ms"]["cudnn"]}} for key, row in anchors.items()}
    for shape in shapes(forward_record, slow):
        assert shape.best_ms == shape.rows["cudnn"]["ms_p50"]


def test_without_anchors_the_best_measured_peer_counts(forward_record):
    assert {round(s.ratio, 6) for s in shapes(forward_record, {})} == {1.2}


def test_our_own_other_backends_are_no_peers(forward_record):
    for row in forward_record["rows"]:
        if row["impl"] == "fa2":
            row |= {"impl": "flashcore-triton", "ms_p50": row["ms_p50"] / 10}
    assert {round(s.ratio, 6) for s in shapes(forward_record, {})} == {1.2}


def test_anchors_of_another_gpu_are_not_used():
    assert load_anchors("h100-pcie") == {}
    assert load_anchors("h100") != load_anchors("h200")


def test_an_anchor_of_a_peer_that_was_measured_does_not_count(forward_record, anchors):
    """A peer's own time is better than an estimate of it."""
    measured = [{**row, "impl": "fa3"} for row in forward_record["rows"] if row["impl"] == "fa2"]
    forward_record["rows"] += measured
    found = shapes(forward_record, anchors)
    for shape in found:
        expected = 500 * (shape.anchor["cudnn_over_best"] if shape.anchor["best"] == "fa4" else 1)
        assert shape.case.tflops(shape.best_ms) == pytest.approx(expected)
    assert {shape.anchor["best"] for shape in found} == {"cudnn", "fa3", "fa4"}
    for row in measured:
        row |= {"failed": "for a test"}
        del row["ms_p50"]
    for shape in shapes(forward_record, anchors):
        assert shape.case.tflops(shape.best_ms) == pytest.approx(500 * shape.anchor["cudnn_over_best"])


def test_the_summary_is_geometric_means_and_the_minimum(forward_record):
    rows = {(r["impl"], r["head_dim"], r["seqlen_q"], r["causal"]): r for r in forward_record["rows"]}
    rows["flashcore", 64, 512, False]["ms_p50"] *= 4
    first, spread = summary(shapes(forward_record, {}))
    assert f"all {1.2 * 4 ** (-1 / 36):.2f}," in first
    assert f"head_dim 64 {1.2 * 4 ** (-1 / 12):.2f}, head_dim 128 1.20, head_dim 256 1.20" in first
    assert f"S <= 1024 {1.2 * 4 ** (-1 / 12):.2f}, S >= 2048 1.20;" in first
    assert "lowest 0.30 (d64-s512-b32-h32-full-bf16)" in first
    assert "0.7 %" in spread


def test_a_failure_has_no_number_and_is_shouted(forward_record, anchors):
    row = next(r for r in forward_record["rows"] if r["impl"] == "flashcore")
    for key in ("ms_p50", "ms_p10", "ms_p90", "std_pct", "tflops"):
        del row[key]
    row["failed"] = "12 elements are NaN or Inf"
    (table,) = tables.tables(forward_record, anchors)
    assert table.rows[0][5] == "failed"
    assert table.rows[0][8] == ""  # no ratio
    assert table.notes[-1] == "FAILED: flashcore on d64-s512-b32-h32-full-bf16: 12 elements are NaN or Inf"
    assert tables.compact_table("", shapes(forward_record, anchors)).rows[0][1] == "failed"


def test_tables_hold_every_implementation(forward_record, anchors):
    (table,) = tables.tables(forward_record, anchors)
    assert table.headers[5:8] == ("flashcore, TFLOP/s", "cudnn, TFLOP/s", "fa2, TFLOP/s")
    assert len(table.rows) == 36
    assert table.rows[0][:8] == ("64", "full", "512", "32", "32", "600", "500", "400")
    assert table.markdown().count("\n| 128 | ") == 12
    compact = tables.compact_table("", shapes(forward_record, anchors))
    assert compact.headers == ("head_dim, mask", *(f"S = {512 * 2**i}" for i in range(6)))
    assert [row[0] for row in compact.rows] == [f"{d} {m}" for d in (64, 128, 256) for m in ("full", "causal")]
    assert compact.rows[0][1] == "600 (1.20)"


def test_accuracy_is_compared_with_fa2():
    base = dict(dtype="bfloat16", batch=1, heads=8, kv_heads=8, seqlen_q=64, seqlen_k=64, head_dim=64, causal=True)
    rows = [
        {"op": "accuracy", "impl": impl, **base, "inputs": "outliers", "rel_err": error, "max_abs_err": 1.0}
        for impl, error in (("flashcore", 2.1e-3), ("fa2", 2e-3))
    ]
    (table,) = tables.tables({"suite": "accuracy", "rows": rows, "meta": {}}, {})
    assert table.rows == (("64", "causal", "64", "bfloat16", "outliers", "2.100e-03", "2.000e-03", "1.050"),)


def test_startup_says_what_comes_on_top_of_torch():
    rows = [
        {"op": "compile", "impl": "flashcore", "kernel": "a", "seconds": 1.5, "registers": 168, "spill_bytes": 0}
        | {"smem_bytes": 1024},
        {"op": "start", "impl": "torch", "s_p50": 4.0, "s_min": 3.9, "s_max": 4.2},
        {"op": "start", "impl": "flashcore", "s_p50": 4.25, "s_min": 4.1, "s_max": 4.3},
    ]
    compiled, started = tables.tables({"suite": "startup", "rows": rows, "meta": {}}, {})
    assert compiled.rows == (("a", "1.50", "168", "0", "1024"),)
    assert started.notes == ("FlashCore beyond torch without attention: 0.25 s.",)


@pytest.fixture
def clone(tmp_path):
    """A clone with empty blocks and no records."""
    (tmp_path / "docs").mkdir()
    for name, block in (("README.md", "forward"), ("docs/benchmarks.md", "tables")):
        (tmp_path / name).write_text(
            f"before\n<!-- flashcore report: {block} -->\n<!-- flashcore report end -->\nafter\n"
        )
    shutil.copytree(record.BENCHMARKS / "anchors", tmp_path / "benchmarks" / "anchors")
    return Documents(tmp_path)


@pytest.fixture
def whole_clone(clone):
    """One with every document that has blocks."""
    for name, blocks in (("performance", ("roofline", "profile", "packing")), ("numerics", ("adversarial",))):
        text = "".join(f"<!-- flashcore report: {block} -->\n<!-- flashcore report end -->\n" for block in blocks)
        (clone.root / "docs" / f"{name}.md").write_text(text)
    return clone


def on_h100(data: dict) -> dict:
    """The same record as another card would make it: a tenth slower."""
    data = copy.deepcopy(data)
    data["meta"]["gpu"] = "NVIDIA H100 80GB HBM3"
    for row in data["rows"]:
        row |= {"tflops": row["tflops"] / 1.1, **{f"ms_{p}": row[f"ms_{p}"] * 1.1 for p in ("p50", "p10", "p90")}}
    return data


def test_without_records_the_documents_say_so(clone):
    assert clone.stale() == [clone.root / "README.md", clone.root / "docs" / "benchmarks.md"]
    clone.update()
    assert clone.stale() == []
    assert documents.NOTHING in (clone.root / "README.md").read_text()


def test_documents_follow_the_records(clone, forward_record):
    pytest.importorskip("matplotlib")
    clone.update()
    path = record.path_for(forward_record, clone.root / "benchmarks" / "results")
    record.write(forward_record, path)
    plot = clone.plot_path("h200")
    assert clone.stale() == [clone.root / "README.md", clone.root / "docs" / "benchmarks.md", plot]
    assert clone.update() == [clone.root / "README.md", clone.root / "docs" / "benchmarks.md", plot]
    assert clone.stale() == []
    assert clone.update() == []

    text = (clone.root / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "![TFLOP/s over sequence length on NVIDIA H200](docs/img/forward-h200.png)" in text
    assert "600 (1.20)" in text
    assert "commit 0123456789ab, kernel sources ffffffffffff." in text
    assert plot.read_bytes().startswith(b"\x89PNG")

    forward_record["rows"][0]["tflops"] = 612.0
    record.write(forward_record, path)
    assert clone.stale() == [clone.root / "README.md", clone.root / "docs" / "benchmarks.md", plot]


def test_the_documents_show_both_cards(whole_clone, forward_record):
    """Each with its own numbers, plot and anchors, and by name; a card without records is named, too."""
    pytest.importorskip("matplotlib")
    clone, results = whole_clone, whole_clone.root / "benchmarks" / "results"
    for row in forward_record["rows"]:
        row |= {"backend": "hopper", "sm_mhz": 1500, "config": "bfloat16 head_dim x: tile 128 x 128, 2 consumers"}
    forward_record["meta"]["sm_count"] = 132
    names = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
    pages = [clone.root / name for name in ("README.md", "docs/benchmarks.md", "docs/performance.md")]

    record.write(forward_record, record.path_for(forward_record, results))
    clone.update()
    for page in pages:
        assert "Not recorded on the H100 yet." in page.read_text()
        assert names["h100"] not in page.read_text()
    numerics = (clone.root / "docs" / "numerics.md").read_text()
    assert "Not recorded on the H100 and the H200 yet." in numerics

    record.write(on_h100(forward_record), record.path_for(on_h100(forward_record), results))
    assert clone.plot_path("h100") in clone.stale()
    clone.update()
    assert clone.stale() == []
    readme, benchmarks, performance = (page.read_text() for page in pages)
    for gpu, name in names.items():
        assert clone.plot_path(gpu).exists()
        assert f"![TFLOP/s over sequence length on {name}](docs/img/forward-{gpu}.png)" in readme
        assert f"**{name}: FlashCore forward, TFLOP/s" in readme
        assert f"### {name}: forward" in benchmarks
        assert f"Not recorded on {name}: backward, small, " in benchmarks
        assert f"**{name}: cycles that each unit" in performance
        assert f"**{name}: the clock at which each unit" in performance
    assert clone.plot_path("h100").read_bytes() != clone.plot_path("h200").read_bytes()
    for text in (readme, benchmarks):
        assert "Not recorded on the" not in text

    def rows(gpu):
        """Of a card's table in the README: after its title, until the next."""
        text = readme.partition(f"**{names[gpu]}: FlashCore")[2].partition("Measured")[0]
        return [line for line in text.splitlines() if line.startswith("| 64 full")]

    for gpu, tflops in (("h200", 600), ("h100", 600 / 1.1)):
        known = load_anchors(gpu)
        over = {s.case.seqlen_q: s.anchor["cudnn_over_best"] for s in shapes(forward_record, known)[:6]}
        cells = (f"{tflops:.0f} ({1.2 / ratio:.2f})" for ratio in over.values())
        assert rows(gpu) == [f"| 64 full | {' | '.join(cells)} |"]
    assert rows("h100") != rows("h200")


def test_a_table_of_older_kernels_says_so(clone, forward_record):
    pytest.importorskip("matplotlib")
    path = record.path_for(forward_record, clone.root / "benchmarks" / "results")
    small = {**forward_record, "suite": "small", "rows": []}
    for digests in (("f" * 64, record.kernel_digest("small")), (record.kernel_digest("forward"), "f" * 64)):
        for data, digest in zip((forward_record, small), digests, strict=True):
            data["meta"] = {**data["meta"], "kernel_digest": digest}
            record.write(data, path.with_stem(data["suite"]))
        clone.update()
        readme, benchmarks = ((clone.root / name).read_text() for name in ("README.md", "docs/benchmarks.md"))
        older = {
            part.split("\n")[0] for part in benchmarks.split("### NVIDIA H200: ")[1:] if "**Of older kernels:**" in part
        }
        assert older == ({"forward"} if digests[0] == "f" * 64 else {"small"})
        assert ("**Of older kernels:**" in readme) == ("forward" in older)


def test_the_documents_name_the_versions_of_peers(forward_record):
    assert "cuda.core 1.2.0; FlashCore" in documents.provenance(forward_record)
    forward_record["meta"]["peers"] = {"fa3": "3.0.0", "te": "2.1"}
    assert "cuda.core 1.2.0, fa3 3.0.0, te 2.1; FlashCore" in documents.provenance(forward_record)


def test_an_edited_number_is_out_of_date(clone, forward_record):
    pytest.importorskip("matplotlib")
    record.write(forward_record, record.path_for(forward_record, clone.root / "benchmarks" / "results"))
    clone.update()
    readme = clone.root / "README.md"
    readme.write_text(readme.read_text().replace("600 (1.20)", "700 (1.40)", 1))
    assert clone.stale() == [readme]


def test_a_missing_or_repeated_block_is_an_error():
    block = "<!-- flashcore report: x -->\n<!-- flashcore report end -->\n"
    assert "body" in replace_block(block, "x", "body")
    for text in ("", block * 2, block.replace(": x", ": y")):
        with pytest.raises(ValueError, match="expected one"):
            replace_block(text, "x", "body")


def test_a_block_does_not_swallow_the_next():
    text = "".join(f"<!-- flashcore report: {n} -->\nold\n<!-- flashcore report end -->\n" for n in "ab")
    new = replace_block(text, "a", "new")
    assert new.count("old") == 1
    assert new.index("new") < new.index("old")


def test_a_partial_record_says_what_it_is_without(clone, forward_record):
    pytest.importorskip("matplotlib")
    results = clone.root / "benchmarks" / "results"
    forward_record["rows"] = forward_record["rows"][:3]
    record.write(record.with_missing(forward_record), record.path_for(forward_record, results))
    clone.update()
    for name in ("README.md", "docs/benchmarks.md"):
        text = (clone.root / name).read_text()
        assert "Not measured yet: d64-s1024-b16-h32-full-bf16, " in text
        assert text.count("d64-s512-b32-h32-full-bf16") <= 1  # the lowest ratio
    assert clone.stale() == []


def test_a_record_without_rows_is_no_plot(clone, forward_record):
    forward_record["rows"] = []
    results = clone.root / "benchmarks" / "results"
    record.write(record.with_missing(forward_record), record.path_for(forward_record, results))
    clone.update()
    assert clone.stale() == []
    assert "![" not in (clone.root / "README.md").read_text()


def test_a_table_names_the_shapes_that_fa3_has_no_time_for(forward_record, anchors):
    (table,) = tables.tables(forward_record, anchors)
    assert not any("FlashAttention-3" in note for note in table.notes)
    few = {key: anchor for key, anchor in anchors.items() if key[6] != 64}
    few = {key: anchor for key, anchor in few.items() if key[4] != 512}
    (table,) = tables.tables(forward_record, few)
    (note,) = (note for note in table.notes if "FlashAttention-3" in note)
    assert "d64-s1024-b16-h32-causal-bf16" in note
    assert "d128-s512-b32-h16-full-bf16" in note
    assert "d128-s1024" not in note
    (table,) = tables.tables(forward_record, {})
    assert any("no anchor of it, for any shape" in note for note in table.notes)
    forward_record["rows"] += [{**row, "impl": "fa3"} for row in forward_record["rows"] if row["impl"] == "fa2"]
    (table,) = tables.tables(forward_record, {})
    assert not any("FlashAttention-3" in note for note in table.notes)


def test_a_table_of_several_dtypes_names_them():
    cases = SUITES["odd"].cases
    rows = [
        {"op": "attention_fwd", "impl": "flashcore", **case.fields(), "rel_err": 2e-3, "std_pct": 1.0, "ms_p50": 0.25}
        for case in cases
    ]
    data = {"suite": "odd", "rows": rows, "skipped": [], "meta": {"method": {"mode": "graph"}}}
    (table,) = tables.tables(data, {})
    assert table.headers[:7] == ("head_dim", "mask", "S", "batch", "heads", "dtype", "flashcore, us")
    assert table.rows[0][:7] == ("248", "causal", "4096", "1", "8", "bf16", "250.0")
    assert table.rows[1][:7] == ("128", "causal", "4096", "1", "16", "fp16", "250.0")
    assert {len(row) for row in table.rows} == {len(table.headers)}
    (table,) = tables.tables({**data, "rows": [row for row in rows if row["dtype"] == "bfloat16"]}, {})
    assert "dtype" not in table.headers


def test_features_are_shown_with_what_they_cost():
    plain = Case(2, 8192, 8192, 16, 16, 128, True)
    changes = {"softcap": 30.0}, {"window": (127, 0), "sink": True}, {"head_dim": 64, "alibi": True}
    cases = (plain, *(replace(plain, **change) for change in changes))
    rows = [
        {"op": "attention_fwd", "impl": impl, **case.fields(), "rel_err": 2e-3, "max_abs_err": 1e-3, "std_pct": 1.0}
        | {"ms_p50": ms, "tflops": case.tflops(ms)}
        for case, ms in zip(cases, (1.0, 1.1, 0.2, 1.0), strict=True)
        for impl, ms in (("flashcore", ms), ("fa3-varlen", 2 * ms))
    ]
    data = {"suite": "window", "rows": rows, "skipped": [], "meta": {"method": {"mode": "events"}}}
    (table,) = tables.tables(data, {})
    assert table.headers[-1] == "time over plain"
    assert [row[1] for row in table.rows] == ["causal", "causal, softcap 30", "window 128, sink", "causal, alibi"]
    assert [row[-1] for row in table.rows] == ["", "1.10", "0.20", ""]
    assert {row[7] for row in table.rows} == {"2.00"}
    assert any("FlashAttention-3's dense path was not measured" in note for note in table.notes)
