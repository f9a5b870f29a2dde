"""The commands, as a user types them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from flashcore import cli, disk
from flashcore.bench import documents, record
from flashcore.bench.cases import SUITES
from flashcore.bench.peers import PEERS, Peer

NO_NVRTC = cli.compile.nvrtc_missing()
needs_nvrtc = pytest.mark.skipif(NO_NVRTC is not None, reason=str(NO_NVRTC))


def flashcore(*arguments: str, code: int = 0) -> str:
    """Standard output of ``flashcore ARGUMENTS``, which must exit with ``code``."""
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def no_kernels(monkeypatch):
    """The quick suite also compiles every kernel: not in tests about something else."""
    monkeypatch.setattr(cli.bench, "_show_compiled", lambda: None)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "flashcore", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("bench", "doctor", "compile", "explain", "explain-matmul", "profile", "report", "cache"):
        assert command in done.stdout


# --- what a user can mend is a sentence, never a traceback


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("bench", "--case", "["), "'[' is not a regular expression"),
        (("profile", "--case", "["), "'[' is not a regular expression"),
        (("explain", "--shape", "99999999999999999999,1,1,1,1,64"), "larger than any memory"),
        (("explain", "--shape", "4294967296,4294967296,1,1,1,64", "--arch", "9.0"), "larger than any memory"),
        (("explain-matmul", "--shape", "4294967296,4294967296,4294967296"), "larger than any memory"),
        (("explain-matmul", "--shape", "99999999999999999999,1,1", "--arch", "9.0"), "larger than any memory"),
        (("explain", "--shape", "1,64,64,8,8,64", "--arch", "9999.0"), "--arch"),
        (("bench", "--impl", "sdpa", "--case", "d64-s256-b1", "--round-ms", "1", "--out", "/proc/nothing"), "/proc/n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_sentence(arguments, says, no_kernels):
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2, result.output
    assert says in " ".join(result.output.split())
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    "arguments", [("cache",), ("cache", "--clear"), ("compile",), ("explain", "--shape", "1,64,64,8,8,64"), ("doctor",)]
)
def test_a_switch_that_is_none(arguments, monkeypatch):
    """What needs it says so; ``doctor`` reports it; a plan does not need it."""
    if arguments == ("compile",) and NO_NVRTC:
        pytest.skip(NO_NVRTC)
    monkeypatch.setattr(cli.compile, "declared", lambda head_dims: one_kernel())
    if arguments == ("compile",):  # a kernel that is in memory already asks no disk
        flashcore(*arguments)
    monkeypatch.setenv("FLASHCORE_CACHE", "maybe")
    needed = arguments[0] in ("cache", "compile")
    out = flashcore(*arguments, code=2 if needed else 0)
    assert ("FLASHCORE_CACHE='maybe' is not a switch" in " ".join(out.split())) == (arguments[0] != "explain")


def test_a_missing_library_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashcore.plan", None)
    assert "flashcore doctor says" in flashcore("explain", "--shape", "1,64,64,8,8,64", code=2)


# --- bench


BENCH = ("bench", "--round-ms", "1", "--rounds", "2", "--impl", "flashcore", "--impl", "sdpa")


def test_bench_records_what_it_shows(tmp_path, no_kernels):
    out = flashcore(*BENCH, "--case", "d64-s256-b1", "--out", str(tmp_path), "--commit", "abc")
    (path,) = tmp_path.rglob("quick.json")
    data = record.read(path)
    assert {row["impl"] for row in data["rows"]} == {"flashcore", "sdpa"}
    assert len(data["rows"]) == 2
    assert data["meta"]["commit"] == "abc"
    assert "flashcore, " in out
    assert "recorded in" in out


def test_only_a_complete_run_replaces_a_record(tmp_path, no_kernels, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setitem(
        SUITES, "quick", replace(SUITES["quick"], cases=SUITES["quick"].cases[-1:], peers=("sdpa",))
    )
    assert "recorded in" not in flashcore(*BENCH)
    assert list(tmp_path.rglob("*.json")) == []
    assert "recorded in" in flashcore("bench", "--round-ms", "1", "--rounds", "2")
    assert len(list(tmp_path.rglob("*.json"))) == 1


def test_bench_merges_parts_into_one_record(tmp_path, no_kernels):
    into = ("--out", str(tmp_path), "--commit", "abc", "--merge")
    for part in ("d64-s256-b2", "d64-s256-b1", "d64-s256-b1"):
        flashcore(*BENCH, "--case", part, *into)
    (path,) = tmp_path.rglob("quick.json")
    assert [row["impl"] for row in record.read(path)["rows"]] == ["flashcore", "sdpa"] * 3
    out = flashcore(*BENCH, "--case", "d64-s256-b1", *into[:2], "--merge", "--commit", "def", code=2)
    assert "made with another commit" in " ".join(out.split())


def test_a_run_that_is_stopped_keeps_what_it_has(tmp_path, no_kernels, monkeypatch):
    def stop(case, q, k, v):
        if case.kv_heads == 2:
            raise KeyboardInterrupt
        return PEERS["sdpa"].prepare(case, q, k, v)

    monkeypatch.setitem(PEERS, "flashcore", Peer("flashcore", "stops", stop, transposed=True))
    result = CliRunner().invoke(cli.app, [*BENCH, "--out", str(tmp_path)])
    assert result.exit_code != 0
    assert "stopped; what was measured is in" in result.output
    (path,) = tmp_path.rglob("*.json")
    assert record.read(path)["missing"] == [SUITES["quick"].cases[-1].name]
    assert len(record.read(path)["rows"]) == 6


KILLED = """
import sys, time
from flashcore import cli
from flashcore.bench.peers import PEERS, Peer

def hang(case, q, k, v):
    if case.causal:
        time.sleep(600)
    return PEERS["sdpa"].prepare(case, q, k, v)

PEERS["flashcore"] = Peer("flashcore", "hangs", hang, transposed=True)
cli.app(sys.argv[1:])
"""


def test_a_run_that_is_killed_leaves_a_record_that_a_later_one_goes_on_with(tmp_path, no_kernels):
    """Nobody can catch SIGKILL, so what was measured must be on disk by then, and whole."""
    arguments = [*BENCH, "--out", str(tmp_path), "--commit", "abc"]
    with subprocess.Popen([sys.executable, "-c", KILLED, *arguments], stderr=subprocess.DEVNULL) as run:
        try:
            while not (found := list(tmp_path.rglob("*.json"))) or len(record.read(found[0])["rows"]) < 2:
                assert run.poll() is None
                time.sleep(0.05)
        finally:
            run.kill()
    assert run.returncode == -signal.SIGKILL
    *_, last = names = [case.name for case in SUITES["quick"].cases]
    (path,) = tmp_path.rglob("*.json")
    data = record.read(path)
    assert (data["suite"], data["missing"], len(data["rows"])) == ("quick", names[1:], 2)
    assert data["meta"]["commit"] == "abc"
    flashcore(*arguments, "--merge", "--case", last)
    assert record.read(path)["missing"] == names[1:-1]
    assert len(record.read(path)["rows"]) == 4


def test_bench_fails_when_flashcore_is_wrong(tmp_path, monkeypatch, no_kernels):
    wrong = Peer("flashcore", "wrong", lambda case, q, k, v: lambda: torch.zeros_like(q))
    monkeypatch.setitem(PEERS, "flashcore", wrong)
    out = flashcore(*BENCH, "--case", "d64-s256-b1", "--out", str(tmp_path), code=1)
    assert "FAILED: flashcore on d64-s256-b1-h8:2-causal-bf16" in out


def test_bench_draws_a_plot(tmp_path, no_kernels):
    pytest.importorskip("matplotlib")
    flashcore(*BENCH, "--case", "d64-s256-b1", "--out", str(tmp_path), "--plot")
    (path,) = tmp_path.rglob("quick.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_bench_names_what_does_not_exist():
    assert "no such suite: nope" in flashcore("bench", "--suite", "nope", code=2)
    assert "no such implementation: nope" in flashcore("bench", "--impl", "nope", code=2)
    assert "no case of suite quick" in flashcore("bench", "--case", "nope", code=2)


def test_bench_lists():
    out = flashcore("bench", "--list")
    assert "d128-s16384-b1-h16-causal-bf16" in out
    assert "cudnn: SDPA through cuDNN" in out


@needs_nvrtc
def test_quick_compiles_every_kernel(monkeypatch):
    monkeypatch.setattr(cli.compile, "declared", lambda head_dims: one_kernel())
    assert one_kernel()[0][0] in flashcore(*BENCH, "--case", "d64-s256-b1")


# --- compile and cache


def one_kernel():
    from flashcore.backends.hopper.configs import declared_configs

    return declared_configs()[:1]


@needs_nvrtc
def test_compile_fills_the_cache_and_cache_clears_it(monkeypatch, own_cache):
    from flashcore.backends.hopper import jit

    monkeypatch.setattr(cli.compile, "declared", lambda head_dims: one_kernel())
    for source in (None, "disk"):
        monkeypatch.setattr(jit, "_memory", {})
        (kernel,) = json.loads(flashcore("compile", "--all", "--json"))
        assert kernel["kernel"] == one_kernel()[0][0]
        assert kernel["from_cache"] == source
        assert kernel["registers"] > 0
        assert kernel["spill_bytes"] == 0
        assert (kernel["seconds"] > 0) == (source is None)
    assert "disk cache" in flashcore("compile") or "memory cache" in flashcore("compile")
    assert disk.facts()["entries"] == 1
    assert disk.facts()["bytes"] > 1000
    assert flashcore("cache", "--clear").split("entries")[1].split()[0] == "0"
    assert disk.facts()["entries"] == 0


@needs_nvrtc
def test_compile_shows_the_compilers_log_when_a_kernel_does_not_compile(monkeypatch):
    from flashcore.backends.hopper import jit

    monkeypatch.setattr(cli.compile, "declared", lambda head_dims: one_kernel())
    monkeypatch.setattr(jit, "_memory", {})
    monkeypatch.setattr(jit, "kernel_source", lambda config: "this is not C++")
    out = flashcore("compile", code=2)
    assert one_kernel()[0][0] in out
    assert "did not compile" in out


def test_head_dims_choose_the_kernels_that_serve_them():
    pytest.importorskip("flashcore.backends.hopper.configs")
    everything = cli.compile.declared(None)
    assert {getattr(config, "head_dim", None) for _, config in everything} == {None, 64, 96, 128, 192, 256}
    assert {"gemm", "decode", "forward", "backward"} == {name.split("-")[0] for name, _ in everything}
    chosen = cli.compile.declared([40, 96, 100, 136])  # decoding kernels are compiled for a head_dim as it is
    assert {config.head_dim for name, config in chosen if name.startswith("forward")} == {64, 128, 192}
    assert {config.head_dim for name, config in chosen if name.startswith("decode")} == {40, 96}


@needs_nvrtc
def test_compile_refuses_what_it_has_no_kernel_for():
    assert "no kernel serves head_dim 512" in flashcore("compile", "--head-dim", "512", code=2)
    assert "--head-dim" in flashcore("compile", "--head-dim", "-1", code=2)
    assert "no kernels for sm_80" in flashcore("compile", "--arch", "sm_80", code=2)
    assert "contradict" in flashcore("compile", "--all", "--head-dim", "64", code=2)


# --- doctor


def test_doctor_answers_in_json():
    facts = json.loads(flashcore("doctor", "--json"))
    assert facts["machine"]["torch"] == torch.__version__
    assert facts["backends"]["reference"] == "usable"
    assert (facts["backends"]["hopper"] == "usable") <= torch.cuda.is_available()
    assert facts["cache"]["entries"] == 0
    assert facts["cache"]["writable"] is True
    assert facts["variables"]["FLASHCORE_CACHE_DIR"] == facts["cache"]["path"]
    assert "reference" in flashcore("doctor")


def test_doctor_looks_without_touching(own_cache):
    flashcore("doctor")
    assert not own_cache.exists()


def test_doctor_answers_where_nothing_works(monkeypatch):
    """Without torch, cuda.core, Triton and nvidia-smi, in a fresh process."""
    hide = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'cuda', 'cuda.core', 'triton', 'pynvml')));"
    )
    code = f"{hide} from flashcore.cli import app; app(['doctor', '--json'])"
    environment = {**os.environ, "PATH": "", "PYTHONPATH": str(documents.ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["machine"]["gpu"] is None
    assert facts["machine"]["nvrtc"] is None
    assert all("torch" in verdict for verdict in facts["backends"].values())


def test_doctor_says_when_the_cache_cannot_be_written(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(blocked / "kernels"))
    assert json.loads(flashcore("doctor", "--json"))["cache"]["writable"] is False


def test_doctor_and_cache_say_what_is_not_trusted(own_cache):
    own_cache.mkdir()
    own_cache.chmod(0o777)
    (own_cache / "kernels").mkdir()
    assert "chmod go-w" in json.loads(flashcore("doctor", "--json"))["cache"]["problem"]
    assert "chmod go-w" in flashcore("cache", code=2)
    assert "chmod go-w" in flashcore("cache", "--clear", code=2)


# --- explain


SHAPE = ("explain", "--shape", "2,1024,1024,16,4,128")


def test_explain_plans_for_a_gpu_that_is_not_here():
    out = flashcore(*SHAPE, "--causal", "--arch", "9.0")
    assert "hopper" in out
    assert "128 causal" in out
    assert "backward  hopper" in flashcore(*SHAPE, "--arch", "9.0", "--grad")


def test_explain_says_who_defers():
    decoding = ("explain", "--shape", "8,1,8192,64,4,128", "--arch", "9.0")
    assert "backend   triton: hopper defers to it: triton is made for" in flashcore(*decoding)
    assert "backend   hopper: requested" in flashcore(*decoding, "--backend", "hopper")


def test_explain_says_why_not():
    out = flashcore(*SHAPE, "--arch", "8.0")
    assert "backend   sdpa: triton defers to it: sdpa is known to be good" in out
    assert "not Hopper" in out
    assert "dtype float32" in flashcore(*SHAPE, "--arch", "9.0", "--dtype", "float32")
    too_long = ("explain", "--shape", "1,64,64,8,8,520", "--arch", "9.0", "--backend", "hopper")
    assert "head_dim 520" in flashcore(*too_long, code=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_explain_is_about_this_machine_otherwise():
    out = flashcore(*SHAPE)
    assert "bfloat16 on cpu" in out
    assert "hopper: device cpu" in out  # the problem is asked before the machine
    assert "triton: device cpu" in out


def test_explain_checks_as_the_call_does():
    assert "heads_q=6 is not a multiple of heads_k=4" in flashcore(
        "explain", "--shape", "1,64,64,6,4,64", code=2
    )
    assert "does not exist" in flashcore(*SHAPE, "--backend", "nope", code=2)
    assert "does not exist" in flashcore(*SHAPE, "--backend", "nope", "--arch", "9.0", code=2)
    assert "--shape" in flashcore("explain", "--shape", "1,2,3", code=2)
    assert "--shape" in flashcore("explain", "--shape", "1,2,3,4,4,-8", code=2)
    assert "--dtype" in flashcore(*SHAPE, "--dtype", "int8", code=2)
    assert "--arch" in flashcore(*SHAPE, "--arch", "hopper", code=2)


def test_explain_handles_empty_problems():
    assert "empty" in flashcore("explain", "--shape", "1,0,64,8,8,64", "--arch", "9.0")


PRODUCT = ("explain-matmul", "--shape", "8192,8192,8192")


def test_explain_matmul_plans_for_a_gpu_that_is_not_here():
    out = flashcore(*PRODUCT, "--arch", "9.0")
    assert "backend   hopper" in out
    assert "b along n" in out
    assert "b along k" in flashcore(*PRODUCT, "--arch", "9.0", "--weight")
    swiglu = flashcore(*PRODUCT, "--arch", "9.0", "--activation", "swiglu", "--bias", "--out-dtype", "float32")
    assert "bfloat16 -> float32" in swiglu
    assert "swiglu" in swiglu
    assert "32 x 32 tiles" in swiglu  # of 256 rows in a cluster and 128 of 4096 columns
    assert "backend   torch" in flashcore(*PRODUCT, "--arch", "8.0")


def test_explain_matmul_checks_as_the_call_does():
    assert "m,n,k" in flashcore("explain-matmul", "--shape", "1,2", code=2)
    assert "--dtype" in flashcore(*PRODUCT, "--dtype", "int8", code=2)
    assert "--out-dtype" in flashcore(*PRODUCT, "--out-dtype", "int8", code=2)
    assert "out_dtype=bfloat16 is not supported" in flashcore(
        *PRODUCT, "--dtype", "float16", "--out-dtype", "bfloat16", code=2
    )
    assert "activation='relu'" in flashcore(*PRODUCT, "--activation", "relu", code=2)
    assert "--arch" in flashcore(*PRODUCT, "--arch", "hopper", code=2)


# --- report


def test_report_says_which_records_are_older_than_the_kernels(monkeypatch, tmp_path):
    (tmp_path / "docs").mkdir()
    for name, block in (("README.md", "forward"), ("docs/benchmarks.md", "tables")):
        (tmp_path / name).write_text(f"<!-- flashcore report: {block} -->\n<!-- flashcore report end -->\n")
    monkeypatch.setattr(documents.Documents, "__init__", lambda self: object.__setattr__(self, "root", tmp_path))
    assert "no records yet" in flashcore("report", code=1)
    assert "no records yet" in flashcore("report", "--update")

    meta = {
        "gpu": "NVIDIA H200",
        "date": "2030-01-02",
        "commit": None,
        "kernel_digest": record.kernel_digest("forward"),
    }
    data = {"suite": "small", "meta": meta, "rows": [], "skipped": []}
    path = tmp_path / "benchmarks" / "results" / "h200" / "small.json"
    monkeypatch.setattr(documents.Documents, "stale", lambda self: [])
    record.write(data, path)
    assert "h200/small: 2030-01-02, commit unknown, 0 rows: current" in flashcore("report")
    assert "h200/small: without 14 of its cases: d64-s512-b1-h8-full-fp16, " in flashcore("report")
    record.write(data, path.with_name("forward.partial.json"))
    assert "forward.partial.json: a run that ended early" in flashcore("report")
    meta["kernel_digest"] = "0" * 64
    record.write(data, path)
    assert "the kernel sources have changed since" in flashcore("report")
