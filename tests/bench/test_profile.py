"""The profiler's output, read without a profiler; and the arithmetic of the roofline."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from flashcore import cli
from flashcore.bench import profile, record, roofline
from flashcore.bench.cases import SUITES, Case, GemmCase
from flashcore.bench.peers import PEERS
from flashcore.bench.shapes import shapes
from flashcore.errors import EnvironmentProblem

CASE = Case(1, 256, 256, 2, 2, 64, True)
FIRST = [quantity.metrics[0] for quantity in profile.QUANTITIES]
STALLS = [
    f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio" for reason in ("wait", "gmma", "barrier")
]
UNITS = ["ns", "hz", *["%"] * (len(FIRST) - 2), *["inst"] * 3]


def log(*kernels: tuple) -> str:
    """What ``ncu --csv --page raw --print-units base --log-file`` writes; each kernel is a name and its values."""
    about = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Device", "CC"]

    def line(cells) -> str:
        return ",".join(f'"{cell}"' for cell in cells)

    lines = ["==PROF== Connected to process 7 (/usr/bin/python3.12)", "==PROF== Profiling: 0%....100% - 12 passes"]
    lines += [line([*about, *FIRST, *STALLS]), line([*[""] * len(about), *UNITS])]
    for i, (name, *values) in enumerate(kernels):
        lines.append(line([i, 7, "python3.12", "127.0.0.1", name, 1, 7, 0, "9.0", *values]))
    return "\n".join(lines) + "\n==PROF== Disconnected from process 7\n"


LONG = ("attention_forward_sm90", "928,160.00", "1,789,000,000", 66.4, 65.9, "n/a", "nan", 51, 42, 22, 8, 1.25, 2.5, 0)
SHORT = ("fill", 2000, 1.5e9, *[1] * 8, 0.1, 0.2, 0.3)


def test_read():
    row, other = profile.read(log(LONG, SHORT))
    assert row["kernel"] == "attention_forward_sm90"
    assert (row["us"], row["sm_mhz"]) == (928.16, 1789)
    assert (row["tensor_pct"], row["issue_pct"], row["hbm_pct"]) == (66.4, 51, 8)
    assert row["fma_pct"] is None
    assert row["alu_pct"] is None
    assert list(row["stalls"].items()) == [("gmma", 2.5), ("wait", 1.25)]
    assert (other["us"], other["sm_mhz"]) == (2, 1500)


def test_quantities_have_other_names_elsewhere():
    renamed = log(LONG).replace("sm__pipe_tensor_cycles_active", "sm__pipe_tensor_op_hmma_cycles_active")
    assert profile.read(renamed)[0]["tensor_pct"] == 66.4


def test_older_versions_name_units_in_full():
    text = log(LONG).replace('"ns","hz"', '"nsecond","cycle/nsecond"').replace("1,789,000,000", "1.789")
    assert profile.read(text)[0]["sm_mhz"] == 1789
    with pytest.raises(EnvironmentProblem, match="not understood: 928,160"):
        profile.read(text.replace("nsecond", "fortnight", 1))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", "NVreg_RestrictProfilingToAdminUsers=0"),
        ("==PROF== Connected\n==WARNING== No kernels were profiled.\n", "no kernel to profile: .*No kernels were"),
        ("==ERROR== Failed to find metric sm__x\n", "no kernel to profile: ==ERROR== Failed to find metric sm__x$"),
        ("", "it says nothing"),
        (log(), "no kernel to profile"),
    ],
)
def test_what_ncu_complains_about(text, says):
    with pytest.raises(EnvironmentProblem, match=says):
        profile.read(text)


@pytest.mark.parametrize(
    "text",
    [
        log(LONG).replace('"Kernel Name"', '"Kernel"'),
        log(LONG).rpartition(',"')[0] + "\n",  # torn
        log(LONG).replace("attention_forward_sm90", "x" * 200_000),  # longer than any field that csv reads
    ],
    ids=["no name", "torn", "long"],
)
def test_another_kind_of_log_is_named(text):
    with pytest.raises(EnvironmentProblem, match="no whole log of ncu"):
        profile.read(text)


def test_only_listed_metrics_are_asked_for():
    listed = {"gpu__time_duration", "sm__pipe_tensor_op_hmma_cycles_active", STALLS[0].removesuffix(".ratio")}
    assert profile.choose_metrics(listed) == [
        "gpu__time_duration.sum",
        "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed",
        STALLS[0],
    ]
    everything = profile.choose_metrics(set())
    assert everything[: len(FIRST)] == FIRST
    assert len(everything) == len(FIRST) + len(profile.STALLS)


FAKE = """#!{python}
import json, pathlib, sys
arguments = sys.argv[1:]
if arguments == ["--query-metrics"]:
    print("Device NVIDIA H200 (GH100)")
    for name in {listed}:
        print(f"{{name:<60}} Counter     %           # of something")
elif arguments == ["--version"]:
    print("NVIDIA (R) Nsight Compute Command Line Profiler\\nVersion 2025.3.1.0 (build 1)")
else:
    pathlib.Path({said!r}).write_text(json.dumps(arguments))
    pathlib.Path(arguments[arguments.index("--log-file") + 1]).write_text({log!r})
    sys.exit({code})
"""


@pytest.fixture
def fake_ncu(tmp_path, monkeypatch):
    """An executable that answers as ncu does, with a log and an exit code of the test's choice."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def make(text: str, code: int = 0) -> list[str]:
        path, said = tmp_path / "ncu", tmp_path / "said.json"
        listed = [name.partition(".")[0] for name in (*FIRST, *STALLS)]
        path.write_text(FAKE.format(python=sys.executable, listed=listed, said=str(said), log=text, code=code))
        path.chmod(0o755)
        return ["--ncu", str(path)]

    monkeypatch.setattr(profile.record, "meta", lambda suite, method, commit: {"gpu": None, "method": method})
    plan = replace(profile_operation(), make_inputs=lambda case, device: (), plan=lambda case: {"backend": "hopper"})
    monkeypatch.setitem(operations(), "attention", plan)
    return make


def operations() -> dict:
    from flashcore.bench.operations import OPERATIONS

    return OPERATIONS


def profile_operation():
    return operations()["attention"]


def flashcore(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, ["profile", *arguments])
    assert result.exit_code == code, result.output
    return result.output


SHAPE = ("--shape", "1,256,256,2,2,64", "--causal")


def test_a_profile_is_shown_and_recorded(fake_ncu, tmp_path):
    ncu = fake_ncu(log(SHORT, LONG))
    out = flashcore(*SHAPE, *ncu, "--out", str(tmp_path))
    assert "64 causal 256" in out
    assert "gmma 2.50, wait 1.25" in out
    data = record.read(tmp_path / "cpu" / "profile.json")
    (row,) = data["rows"]
    assert row["kernel"] == "attention_forward_sm90"  # the longer of the two
    assert row["backend"] == "hopper"
    assert {name: row[name] for name in CASE.fields()} == CASE.fields()
    assert "Nsight Compute 2025.3.1.0" in data["meta"]["method"]["about"]
    asked = json.loads((tmp_path / "said.json").read_text())
    assert asked[asked.index("--metrics") + 1] == ",".join([*FIRST, *sorted(STALLS)])
    assert asked[asked.index("--clock-control") + 1] == "none"
    assert asked[-4:] == ["-m", "flashcore.bench.profile", "flashcore", json.dumps(CASE.fields())]


def test_only_the_whole_choice_replaces_a_record(fake_ncu, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert "recorded in" not in flashcore(*SHAPE, *fake_ncu(log(LONG)))
    assert "recorded in" in flashcore(*fake_ncu(log(LONG)))
    assert len(record.read(tmp_path / "cpu" / "profile.json")["rows"]) == len(profile.CASES) == 11


def test_what_is_missing(fake_ncu, tmp_path, monkeypatch):
    denied = "==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - The user does not have permission"
    assert "may not read the GPU's performance counters" in flashcore(*SHAPE, *fake_ncu(denied, 1), code=2)
    crashed = flashcore(*SHAPE, *fake_ncu("==ERROR== The application returned an error code (1).", 1), code=2)
    assert "returned an error code" in crashed
    assert "ncu is not installed" in flashcore(*SHAPE, "--ncu", str(tmp_path / "nothing"), code=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = flashcore(*SHAPE, *fake_ncu(log(LONG)), code=2)
    assert "no CUDA GPU is available" in out
    assert "--prepare" in out  # for a machine that has one
    assert "no such implementation: nope" in flashcore("--impl", "nope", code=2)
    assert "no case of suite forward" in flashcore("--case", "nope", code=2)
    assert "--shape" in flashcore("--shape", "1,2", code=2)


def test_a_prepared_command_and_its_log(tmp_path):
    out = flashcore("--prepare", "--case", "d64-s4096.*full")
    assert "--log-file d64-s4096-b4-h32-full-bf16.csv" in out
    path = tmp_path / "log.csv"
    path.write_text(log(LONG))
    assert "attention_forward_sm90" in flashcore("--read", str(path))
    path.write_text("nothing")
    assert "no kernel to profile" in flashcore("--read", str(path), code=2)
    path.write_bytes(bytes(range(256)))
    assert "no kernel to profile" in flashcore("--read", str(path), code=2)
    assert "No such file" in flashcore("--read", str(tmp_path / "nothing"), code=2)
    assert "directory" in flashcore("--read", str(tmp_path), code=2)


@pytest.mark.parametrize("shape", ["99999999999999999999,1,1,1,1,64", "1,64,64,6,4,64", "1,64,64,0,0,64"])
def test_a_shape_is_checked_before_anything_is_profiled(shape):
    for more in ([], ["--prepare"]):
        assert "attention: " in flashcore("--shape", shape, *more, code=2)
    assert "--dtype" in flashcore("--shape", "1,64,64,4,4,64", "--dtype", "bf16", code=2)


@pytest.mark.parametrize(
    ("impl", "case"),
    [("flashcore", CASE), ("math", CASE), ("flashcore-matmul", GemmCase("small", 8, 16, 32, "float32", "float32"))],
)
def test_one_call_is_profiled_after_a_warm_up(impl, case, monkeypatch):
    events = []
    peer = PEERS[impl]

    def prepare(*arguments):
        call = peer.prepare(*arguments)
        return lambda: (events.append("call"), call())

    monkeypatch.setitem(PEERS, impl, replace(peer, prepare=prepare))
    monkeypatch.setattr(profile, "WARM_UP_S", 0.01)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("synchronize"))
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda name=name: events.append(name))
    profile._profiled(impl, json.dumps(case.fields()), "cpu")
    assert events[:2] == ["call", "synchronize"]
    assert events[-4:] == ["start", "call", "synchronize", "stop"]
    assert events.count("start") == 1


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    """Needs ncu and the right to read counters, like the command."""
    ncu = profile.find_ncu()
    if profile.missing(ncu):
        pytest.skip(profile.missing(ncu))
    metrics = profile.choose_metrics(profile.listed_metrics(ncu))
    try:
        row = profile.profile(ncu, SUITES["forward"].cases[0], "flashcore", metrics)
    except EnvironmentProblem as problem:
        if "may not read" in str(problem):
            pytest.skip(str(problem))
        raise
    assert row["kernel"] == "attention_forward_sm90"
    assert all(row[quantity.key] > 0 for quantity in profile.QUANTITIES)
    assert row["stalls"]


# --- roofline


def test_cycles_of_a_block():
    """By hand, for one warpgroup's 64 queries, 128 keys and head_dim 64."""
    cycles = roofline.block_cycles(64, 128, 64)
    assert cycles["tensor pipe"] == 4 * 64 + 8 * 32  # 4 x m64n128k16 of 64 cycles, 8 x m64n64k16 of 32
    assert cycles["exp pipe"] == 64 * 128 / 16
    assert cycles["FMA pipe"] == 64 * 128 * 2 / 128
    assert cycles["ALU pipe"] == 64 * 128 * (1 / 2 + 1 / 2) / 64
    assert cycles["issue slots"] == 64 * 128 / 32 * (2 + 1 + 1) / 4
    # 4 steps read 64 x 16 of Q and 128 x 16 of K, 8 steps 16 x 64 of V; 2 bytes each
    assert cycles["shared memory"] == (4 * (64 * 16 + 128 * 16) + 8 * 16 * 64) * 2 / 128


def test_a_peak_is_what_the_white_paper_says():
    peak = roofline.MMA_FLOPS * 132 * 1830e6
    assert peak / 1e12 == pytest.approx(989.4, rel=1e-3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tile_m", "tile_n"), [(192, 128), (128, 64), (64, 80)])
def test_work_by_enumeration(causal, tile_m, tile_n):
    case = Case(2, 300, 410, 4, 2, 64, causal)
    blocks = loaded = 0
    for m in range(0, 300, tile_m):
        most = 0
        for row in range(m, m + tile_m, 64):
            seen = [j for j in range(410) if not causal or j <= row + 63 + 110] if row < 300 else [0]
            count = len({j // tile_n for j in seen})
            blocks, most = blocks + count, max(most, count)
        loaded += most
    done = roofline.work(case, tile_m, tile_n)
    assert done.blocks == 8 * blocks
    row = 64 * 2
    assert done.l2_bytes == 8 * (loaded * tile_n * 2 + 300) * row
    assert done.hbm_bytes == (2 * 2 * 300 * 4 + 2 * 2 * 410 * 2) * row


def test_the_roofline_of_a_record(forward_record):
    """600 TFLOP/s at head_dim 128, full, is 4 x 64 x 128 x 128 FLOP per block: the tensor pipe's clock follows."""
    for row in forward_record["rows"]:
        row |= {"backend": "hopper", "sm_mhz": 1500, "config": "bfloat16 head_dim x: tile 128 x 128, 2 consumers"}
    found = shapes(forward_record, {})
    table = roofline.roofline_table("NVIDIA H200", found, 132, 4.8e12)
    rows = {row[0]: dict(zip(table.headers, row, strict=True)) for row in table.rows}
    row = rows["128 full 4096"]
    assert row["tensor pipe, MHz"] == f"{600e12 / 132 / 4096 / 1e6:.0f}"
    assert row["exp pipe, MHz"] == f"{600e12 / 132 / 4096 / 2e6:.0f}"
    assert row["useful products, %"] == "100"
    assert 50 < float(rows["128 causal 512"]["useful products, %"]) < 100
    seconds = 4 * 4 * 16 * 4096**2 * 128 / 600e12
    assert row["HBM, %"] == f"{100 * 4 * 4 * 4096 * 2048 * 2 / 4.8e12 / seconds:.0f}"
    assert [row[:2] for row in roofline.block_table("NVIDIA H200", found).rows][1] == ("128", "128 x 128")


def test_only_what_the_kernel_computed_has_a_roofline(forward_record):
    for row in forward_record["rows"]:
        row |= {"backend": "sdpa", "sm_mhz": 1500}
    assert roofline.roofline_table("NVIDIA H200", shapes(forward_record, {}), 132, None).rows == ()
