"""Records: what is written comes back, and the header says what was measured."""

from __future__ import annotations

import copy
import shutil
import subprocess

import pytest

from flashcore.bench import machine, record
from flashcore.bench.cases import SUITES


def test_a_record_comes_back(forward_record, tmp_path):
    path = record.path_for(forward_record, tmp_path)
    assert path == tmp_path / "h200" / "forward.json"
    record.write(forward_record, path)
    found = record.read(path)
    assert found["meta"] == forward_record["meta"]
    assert found["skipped"] == forward_record["skipped"]
    for before, after in zip(forward_record["rows"], found["rows"], strict=True):
        assert after.keys() == before.keys()
        for key, value in before.items():
            assert after[key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value)
    assert len(path.read_text().splitlines()) < 36 * 3 + 40  # one line per row


def test_empty_lists_come_back(forward_record, tmp_path):
    empty = {**forward_record, "rows": [], "skipped": []}
    record.write(empty, tmp_path / "x.json")
    assert record.read(tmp_path / "x.json") == empty


def test_a_nan_is_refused_rather_than_written_as_no_json(forward_record, tmp_path):
    forward_record["rows"][0]["rel_err"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        record.write(forward_record, tmp_path / "x.json")


def test_records_of_a_cpu_are_not_published(forward_record, tmp_path):
    record.write(forward_record, record.path_for(forward_record, tmp_path))
    forward_record["meta"]["gpu"] = None
    record.write(forward_record, record.path_for(forward_record, tmp_path))
    assert (tmp_path / "cpu" / "forward.json").exists()
    assert list(record.read_all(tmp_path)) == ["h200"]


def test_a_record_in_the_folder_of_another_gpu_is_refused(forward_record, tmp_path):
    """It would be compared with that one's anchors."""
    forward_record["meta"]["gpu"] = "NVIDIA H100 80GB HBM3"
    record.write(forward_record, tmp_path / "h200" / "forward.json")
    with pytest.raises(ValueError, match=r"forward\.json is a record of NVIDIA H100 80GB HBM3: it belongs into h100"):
        record.read_all(tmp_path)


def test_a_record_is_current_as_long_as_its_kernels_are(forward_record):
    assert not record.is_current(forward_record)
    forward_record["meta"]["kernel_digest"] = record.kernel_digest("forward")
    assert record.is_current(forward_record)
    assert not record.is_current({**forward_record, "suite": "gemm"})


def test_the_header_has_what_every_published_number_needs():
    meta = record.meta("forward", {"mode": "wall"})
    needed = {"gpu", "power_limit_w", "driver", "cuda", "torch", "flashcore", "commit", "kernel_digest", "date"}
    assert needed <= meta.keys()
    assert record.meta("forward", {}, "abc")["commit"] == "abc"


def test_commit_tells_whether_the_clone_was_changed(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=t", "-c", "user.email=t@t", *arguments], check=True)

    assert record.commit(tmp_path / "nowhere") == {"commit": None, "dirty": None}
    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "a")
    clean = record.commit(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    results = tmp_path / "benchmarks" / "results" / "h200"
    results.mkdir(parents=True)
    (results / "x.json").write_text("{}")
    assert record.commit(tmp_path) == clean  # a result does not make the measured sources dirty
    (tmp_path / "a").write_text("2")
    assert record.commit(tmp_path) == {**clean, "dirty": True}


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4"),
        (None, "cpu"),
        ("NVIDIA", "gpu"),
    ],
)
def test_slugs(name, slug):
    assert machine.slug(name) == slug


def test_cudnn_versions():
    assert machine.dotted_cudnn(91900) == "9.19.0"
    assert machine.dotted_cudnn(90701) == "9.7.1"
    assert machine.dotted_cudnn(None) is None


def test_a_machine_without_anything_is_described(monkeypatch):
    import sys

    for name in ("torch", "pynvml"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("PATH", "")
    facts = machine.describe()
    assert facts["gpu"] is None
    assert facts["driver"] is None
    assert facts["cuda"] is None
    assert facts["python"]


def test_nvidia_smi_answers_where_nvml_is_missing(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pynvml", None)
    answers = {"driver_version,power.limit": ["580.1", "700.00"], "clocks.sm,power.draw": ["1755", "652.10"]}
    monkeypatch.setattr(machine, "_nvidia_smi", answers.__getitem__)
    sensors = machine.Sensors()
    assert sensors.facts() == {"driver": "580.1", "power_limit_w": 700}
    assert sensors.read() == machine.Reading(1755, 652.1)
    kept = []
    sensors.watch(kept)
    assert kept == []  # starting a process per reading would disturb what is measured


def test_a_run_of_some_cases_joins_the_others(forward_record):
    """Cases of the new run replace their old selves; reasons of those who were tried again, too."""
    old = copy.deepcopy(forward_record)
    old["rows"], (again, *_) = old["rows"][:-3], old["rows"]
    old["skipped"] += [
        {"impl": "te", "case": "first", "reason": "too long"},
        {"impl": "te", "case": "other", "reason": "too long"},
    ]
    new = copy.deepcopy(forward_record)
    new["rows"] = [{**again, "ms_p50": 7.0}, *forward_record["rows"][-3:], {**again, "impl": "te", "ms_p50": 9.0}]
    new["skipped"] = [{"impl": "fa4", "reason": "still not installed"}]
    new["meta"]["date"] = "2030-01-03T03:04:05+00:00"

    merged = record.merge(old, new, ["first"])
    assert merged["meta"]["date"] == new["meta"]["date"]
    assert len(merged["rows"]) == len(forward_record["rows"]) + 1
    assert merged["rows"][0]["ms_p50"] == 7.0
    assert merged["rows"][1:-1] == forward_record["rows"][1:]
    assert merged["skipped"] == [
        {"impl": "te", "case": "other", "reason": "too long"},
        {"impl": "fa4", "reason": "still not installed"},
    ]


@pytest.mark.parametrize(
    ("key", "value"), [("commit", "fedc"), ("kernel_digest", "0" * 64), ("driver", "570.0"), ("gpu", "NVIDIA H100")]
)
def test_runs_of_different_states_are_not_one_record(forward_record, key, value):
    new = copy.deepcopy(forward_record)
    new["meta"][key] = value
    with pytest.raises(ValueError, match=f"another {key}"):
        record.merge(forward_record, new, [])


def test_runs_by_different_methods_are_not_one_record(forward_record):
    new = copy.deepcopy(forward_record)
    new["meta"]["method"]["about"] = "in a hurry"
    with pytest.raises(ValueError, match="another method"):
        record.merge(forward_record, new, [])


def test_records_with_triton_name_its_sources_too():
    """A change of Triton's kernels must not leave a record that shows them looking current."""
    suites = "forward", "backward", "decode", "e2e", "gemm", "startup"
    assert len({record.kernel_digest(suite) for suite in suites}) == len(suites)


def test_records_of_score_functions_name_what_prints_them(monkeypatch, tmp_path):
    shutil.copytree(record.PACKAGE, tmp_path / "flashcore", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(record, "PACKAGE", tmp_path / "flashcore")
    before = {suite: record.kernel_digest(suite) for suite in ("forward", "window")}
    printer = tmp_path / "flashcore" / "score.py"
    printer.write_text(printer.read_text().replace("__expf", "expf"))
    assert record.kernel_digest("forward") == before["forward"]
    assert record.kernel_digest("window") != before["window"]


def part(data: dict, rows: slice) -> dict:
    return record.with_missing({**data, "rows": data["rows"][rows]})


def test_a_record_grows_in_place_where_there_is_none(forward_record, tmp_path):
    keeper = record.Keeper(tmp_path, merge=False)
    keeper(part(forward_record, slice(0)), [])
    assert not keeper.path.exists()
    keeper(part(forward_record, slice(3)), ["first"])
    assert len(record.read(keeper.path)["missing"]) == 35
    keeper.finish(forward_record, ["first"])
    assert "missing" not in record.read(keeper.path)
    assert [path.name for path in keeper.path.parent.iterdir()] == ["forward.json"]


def test_an_older_record_stays_until_the_new_one_is_complete(forward_record, tmp_path):
    path = record.path_for(forward_record, tmp_path)
    record.write(forward_record, path)
    before = path.read_text()
    new = copy.deepcopy(forward_record)
    new["meta"]["commit"] = "fedc"
    keeper = record.Keeper(tmp_path, merge=False)
    keeper(part(new, slice(0)), [])
    keeper(part(new, slice(3)), ["first"])
    assert path.read_text() == before
    assert keeper.growing == path.with_name("forward.partial.json")
    assert len(record.read(keeper.growing)["rows"]) == 3
    assert list(record.read_all(tmp_path)["h200"]) == ["forward"]
    keeper.finish(new, ["first"])
    assert record.read(path)["meta"]["commit"] == "fedc"
    assert not keeper.growing.exists()


def test_a_merged_record_grows_in_place(forward_record, tmp_path):
    path = record.path_for(forward_record, tmp_path)
    record.write(part(forward_record, slice(6)), path)
    keeper = record.Keeper(tmp_path, merge=True)
    keeper(part(forward_record, slice(0)), [])
    keeper(part(forward_record, slice(6, 9)), ["third"])
    found = record.read(path)
    assert len(found["rows"]) == 9
    assert len(found["missing"]) == 33


def test_what_cannot_be_merged_or_written_is_said_before_anything_is_measured(forward_record, tmp_path):
    path = record.path_for(forward_record, tmp_path)
    record.write(forward_record, path)
    new = copy.deepcopy(forward_record)
    new["meta"]["commit"] = "fedc"
    with pytest.raises(record.MergeError, match="another commit"):
        record.Keeper(tmp_path, merge=True)(part(new, slice(0)), [])
    with pytest.raises(OSError, match=r"forward\.json"):
        record.Keeper(path, merge=False)(part(new, slice(0)), [])


def test_a_write_that_fails_leaves_the_old_record(forward_record, tmp_path):
    path = tmp_path / "x.json"
    record.write(forward_record, path)
    before = path.read_text()
    forward_record["rows"][-1]["rel_err"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        record.write(forward_record, path)
    assert path.read_text() == before


def test_records_of_today_hold_every_case():
    """Of suites that have not grown since."""
    for suites in record.read_all().values():
        for name in {"forward", "small", "decode", "e2e", "gemm", "startup", "matrix"} & suites.keys():
            assert record.missing(suites[name]) == [], name


def test_cases_that_differ_by_a_feature_are_not_one():
    """In a partial record, and in a merged one."""
    plain, softcap = SUITES["window"].cases[-4:-2]
    assert softcap.features == {"softcap"}
    rows = [{"op": "attention_fwd", "impl": "flashcore", **softcap.fields()}]
    data = {"suite": "window", "rows": rows, "skipped": []}
    absent = record.missing(data)
    assert plain.name in absent
    assert softcap.name not in absent


def test_a_record_of_training_is_of_the_backward_kernels(monkeypatch):
    """All kernels of attention's gradients that there are, and no record of the forward alone."""
    from flashcore.backends.hopper import jit
    from flashcore.backends.hopper.kernels import KERNELS

    seen: list[str] = []
    monkeypatch.setattr(jit, "source_digest", lambda source, table: seen.append(source) or source)
    gradients = {kernel.source for name, kernel in KERNELS.items() if name.startswith("backward")}
    for suite, wanted in (("backward", True), ("parallel", True), ("varlen", True), ("e2e", True), ("forward", False)):
        seen.clear()
        record.kernel_digest(suite)
        assert (gradients & set(seen)) == (gradients if wanted else set()), suite
