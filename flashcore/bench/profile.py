"""Where a kernel's cycles go, as Nsight Compute counts them.

:func:`run` profiles implementations case by case, each in a process of its own under ``ncu``, and returns a record like
those of ``flashcore bench``.
"""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flashcore.bench import record
from flashcore.bench.cases import SUITES, Case, GemmCase
from flashcore.bench.shapes import case_of
from flashcore.bench.tables import Table, short_name
from flashcore.errors import EnvironmentProblem

SUITE = "profile"  # of the record
WARM_UP_S = 0.3

# What is profiled when nothing is named: long sequences, and the short ones that other things limit.
CASES = tuple(
    case
    for case in SUITES["forward"].cases
    if (case.head_dim, case.causal, case.seqlen_q)
    in {
        *((head_dim, False, 4096) for head_dim in (64, 128, 256)),
        *((head_dim, True, 4096) for head_dim in (64, 128, 256)),
        *((head_dim, True, 512) for head_dim in (64, 128, 256)),
        *((head_dim, True, 1024) for head_dim in (64, 128)),
    }
)


# --- Nsight Compute


@dataclass(frozen=True)
class Quantity:
    key: str  # in a row of the record
    header: str
    metrics: tuple[str, ...]  # of ncu, by preference: names differ between chips and versions


def _percent(key: str, header: str, *metrics: str) -> Quantity:
    return Quantity(key, header, tuple(f"{metric}.avg.pct_of_peak_sustained_elapsed" for metric in metrics))


QUANTITIES = (
    Quantity("us", "us", ("gpu__time_duration.sum",)),
    Quantity("sm_mhz", "MHz", ("sm__cycles_elapsed.avg.per_second",)),
    _percent(
        "tensor_pct", "tensor pipe", "sm__pipe_tensor_cycles_active", "sm__pipe_tensor_op_hmma_cycles_active"
    ),
    _percent("exp_pct", "exp pipe", "sm__inst_executed_pipe_xu"),
    _percent("fma_pct", "FMA pipe", "sm__inst_executed_pipe_fma", "sm__pipe_fma_cycles_active"),
    _percent("alu_pct", "ALU pipe", "sm__inst_executed_pipe_alu", "sm__pipe_alu_cycles_active"),
    _percent("issue_pct", "issue slots", "smsp__issue_active", "sm__inst_issued"),
    _percent("smem_pct", "shared memory", "l1tex__data_bank_reads"),
    _percent("l2_pct", "L2", "lts__throughput", "lts__t_sectors"),
    _percent("hbm_pct", "HBM", "dram__throughput", "gpu__dram_throughput"),
)
# Why warps could not issue, each in warps per issued instruction. "gmma" is Hopper's wait at a matrix product.
STALLS = (
    "barrier", "branch_resolving", "dispatch_stall", "drain", "gmma", "imc_miss", "lg_throttle", "long_scoreboard",
    "math_pipe_throttle", "membar", "mio_throttle", "misc", "no_instruction", "not_selected", "short_scoreboard",
    "sleeping", "tex_throttle", "wait",
)  # fmt: skip
# To microseconds and to megahertz; other units are taken as they are.
_FACTORS = {
    "nsecond": 1e-3, "ns": 1e-3, "usecond": 1, "us": 1, "msecond": 1e3, "ms": 1e3, "second": 1e6, "s": 1e6,
    "hz": 1e-6, "khz": 1e-3, "mhz": 1, "ghz": 1e3,
    "cycle/second": 1e-6, "cycle/s": 1e-6, "cycle/usecond": 1, "cycle/us": 1, "cycle/nsecond": 1e3, "cycle/ns": 1e3,
    "": 1, "%": 1, "inst": 1, "warp": 1, "ratio": 1, "warp/inst": 1,
}  # fmt: skip


def _stall_metric(reason: str) -> str:
    return f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio"


def find_ncu(given: Path | None = None) -> str | None:
    """The profiler: the one that is named, that of the PATH, or where NVIDIA's packages put it."""
    if given is not None:
        return shutil.which(str(given))
    newest_first = sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"), reverse=True)
    usual = map(str, (Path("/usr/local/cuda/bin/ncu"), *newest_first))
    return shutil.which("ncu") or next(filter(None, map(shutil.which, usual)), None)


def missing(ncu: str | None) -> str | None:
    """What this machine lacks for profiling; None if it seems to have everything."""
    import torch

    if ncu is None:
        return "Nsight Compute's ncu is not installed, or not on the PATH (--ncu names it)"
    if not torch.cuda.is_available():
        return "no CUDA GPU is available: kernels are profiled while they run"
    return None


def listed_metrics(ncu: str) -> set[str]:
    """Names (without their suffixes) that this ncu can collect on this machine's GPU."""
    done = subprocess.run([ncu, "--query-metrics"], capture_output=True, text=True)
    if done.returncode:
        raise EnvironmentProblem(f"ncu --query-metrics failed: {_complaint(done.stdout + done.stderr)}")
    return set(re.findall(r"^\s*(\w+__\w+)", done.stdout, re.M))


def choose_metrics(listed: set[str]) -> list[str]:
    """The metrics to ask for: of each quantity the first that is listed, and every listed stall.

    ncu refuses to start over one unknown name. A list without any of ours is in a form that we cannot read: then all
    are asked for, and ncu has the word.
    """
    wanted = [quantity.metrics for quantity in QUANTITIES] + [(_stall_metric(reason),) for reason in STALLS]
    known = [next((m for m in names if m.partition(".")[0] in listed), None) for names in wanted]
    return list(filter(None, known)) or [names[0] for names in wanted]


def command(ncu: str, case: Case | GemmCase, impl: str, metrics: Sequence[str], log: Path) -> list[str]:
    """The command line that profiles one call and leaves ncu's table in ``log``."""
    return [
        ncu, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none", "--target-processes", "all",
        "--profile-from-start", "off", "--metrics", ",".join(metrics), "--log-file", str(log),
        sys.executable, "-m", "flashcore.bench.profile", impl, json.dumps(case.fields()),
    ]  # fmt: skip


def prepared(ncu: str | None, case: Case | GemmCase, impl: str) -> str:
    """The same for a shell, to be run by somebody who may read the counters."""
    everything = [quantity.metrics[0] for quantity in QUANTITIES] + [
        _stall_metric(reason) for reason in STALLS
    ]
    return shlex.join(command(ncu or "ncu", case, impl, everything, Path(f"{case.name}.csv")))


def profile(ncu: str, case: Case | GemmCase, impl: str, metrics: Sequence[str]) -> dict:
    """What ncu counts during one call after a warm-up: the keys of :data:`QUANTITIES`, "kernel" and "stalls".

    :raises EnvironmentProblem: ncu could not, and why.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.csv"
        done = subprocess.run(command(ncu, case, impl, metrics, log), capture_output=True, text=True)
        text = log.read_text() if log.exists() else ""
    if done.returncode or '"ID"' not in text:
        raise EnvironmentProblem(f"{case.name}: {_complaint(text + done.stdout + done.stderr)}")
    return max(read(text), key=lambda row: row["us"] or 0)


def read(text: str) -> list[dict]:
    """The kernels of an ncu log (``--csv --page raw``), one dict each; None where ncu has no value.

    :raises EnvironmentProblem: there is no kernel in it, or it is another kind of log.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    try:
        table = list(csv.reader(lines))
        header = next((i for i, line in enumerate(table) if line[0] == "ID"), None)
        if header is None or len(table) < header + 3:
            raise EnvironmentProblem(_complaint(text))
        names, units, *kernels = table[header:]
        return [_row(dict(zip(names, zip(values, units, strict=True), strict=True))) for values in kernels]
    except (csv.Error, ValueError, KeyError) as error:  # a torn line, no column with the kernel's name
        raise EnvironmentProblem(f"this is no whole log of ncu --csv --page raw: {error}") from None


def _row(cells: dict[str, tuple[str, str]]) -> dict:
    row: dict = {"kernel": cells["Kernel Name"][0]}
    for quantity in QUANTITIES:
        row[quantity.key] = next((_number(*cells[m]) for m in quantity.metrics if m in cells), None)
    stalls = {reason: _number(*cells[m]) for reason in STALLS if (m := _stall_metric(reason)) in cells}
    known = {reason: value for reason, value in stalls.items() if value}
    row["stalls"] = dict(sorted(known.items(), key=lambda pair: -pair[1]))
    return row


def _number(text: str, unit: str) -> float | None:
    """Microseconds, megahertz, percent, or a ratio."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:  # "n/a"
        return None
    if unit.lower() not in _FACTORS:
        raise EnvironmentProblem(f"ncu answers in a unit that is not understood: {text} {unit}")
    value = float(f"{value * _FACTORS[unit.lower()]:.6g}")
    return None if math.isnan(value) else value  # NaN where nothing was counted


def _complaint(text: str) -> str:
    """What ncu's output means for the user."""
    if "ERR_NVGPUCTRPERM" in text:
        return (
            "this user may not read the GPU's performance counters. Run as root, load NVIDIA's kernel module with "
            "NVreg_RestrictProfilingToAdminUsers=0, or give the container --cap-add SYS_ADMIN "
            "(https://developer.nvidia.com/ERR_NVGPUCTRPERM)"
        )
    said = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("==PROF==")]
    errors = [
        line for line in said if "==ERROR==" in line or re.match(r"\w*(Error|Exception|Problem)\b", line)
    ]
    return "ncu found no kernel to profile: " + " / ".join((errors or said or ["it says nothing"])[-4:])


def run(
    cases: Sequence[Case | GemmCase],
    impl: str,
    ncu: str,
    commit: str | None = None,
    on_case=lambda name: None,
):
    """Profile every case and return the record.

    :raises EnvironmentProblem: ncu cannot profile here, and why.
    """
    import torch

    from flashcore.bench.operations import OPERATIONS
    from flashcore.bench.peers import PEERS

    operation = OPERATIONS[PEERS[impl].operation]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    metrics = choose_metrics(listed_metrics(ncu))
    rows = []
    for case in cases:
        on_case(case.name)
        row = {"op": SUITE, "impl": impl, **case.fields()}
        if impl == operation.ours:
            row |= operation.plan(case, *operation.make_inputs(case, device))
        rows.append(row | profile(ncu, case, impl, metrics))
    about = (
        f"Nsight Compute {_version(ncu)}, one call after {WARM_UP_S} s of them, clocks as they are, caches flushed "
        "before each of its passes; percent of peak over the kernel's time"
    )
    method = {"mode": SUITE, "about": about, "metrics": metrics}
    return {"suite": SUITE, "meta": record.meta(SUITE, method, commit), "rows": rows, "skipped": []}


def _version(ncu: str) -> str:
    said = subprocess.run([ncu, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"Version (\S+)", said)
    return found[1] if found else "of unknown version"


def _profiled(impl: str, fields: str, device: str = "cuda") -> None:
    """What runs under ncu: one call inside of the range that it profiles."""
    import torch

    from flashcore.bench.operations import OPERATIONS
    from flashcore.bench.peers import PEERS

    peer = PEERS[impl]
    row = json.loads(fields)
    case = GemmCase(**row) if peer.operation == "gemm" else case_of(row)
    with torch.no_grad(), peer.context():
        call = peer.prepare(case, *OPERATIONS[peer.operation].make_inputs(case, device))
        start = time.monotonic()
        while time.monotonic() < start + WARM_UP_S:
            call()
            torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def table(rows: Sequence[dict], title: str = "What Nsight Compute counts (percent of peak)") -> Table:
    """One line per profiled kernel. Rows read from a log have no case: they show the kernel's name."""
    headers = (
        "kernel",
        *(quantity.header for quantity in QUANTITIES),
        "most common stalls (warps per instruction)",
    )
    lines = []
    for row in rows:
        cells = [_name(row)]
        cells += ["-" if row[q.key] is None else f"{row[q.key]:.0f}" for q in QUANTITIES]
        stalls = sorted(row["stalls"].items(), key=lambda pair: -pair[1])[:3]
        cells.append(", ".join(f"{reason.replace('_', ' ')} {value:.2f}" for reason, value in stalls))
        lines.append(tuple(cells))
    return Table(title, headers, tuple(lines))


def _name(row: dict) -> str:
    if "head_dim" not in row:
        return row["kernel"]
    other = "" if row["impl"] == "flashcore" else f" ({row['impl']})"
    return short_name(case_of(row)) + other


if __name__ == "__main__":
    _profiled(*sys.argv[1:])
