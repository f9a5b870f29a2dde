"""Records: what is written comes back, and the header says what was measured."""

from __future__ import annotations

import subprocess

import pytest

from flashcore.bench import machine, record


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
