"""The record of a measurement: ``benchmarks/results/<gpu>/<suite>.json``, the only source of published numbers.

A record is ``{"suite", "meta", "rows", "skipped"}``. ``meta`` says on what and with which kernels it was measured;
each row is one implementation on one case; ``skipped`` says who was not measured, and why. One that does not hold all
cases of its suite names them in ``missing``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
from collections.abc import Container, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import flashcore
from flashcore.bench import machine
from flashcore.bench.cases import SUITES

PACKAGE = Path(flashcore.__file__).resolve().parent
BENCHMARKS = PACKAGE.parent / "benchmarks"  # of the clone that this package runs from; absent from a wheel
RESULTS = BENCHMARKS / "results"


# The suites that no kernel of Triton's takes part in.
WITHOUT_TRITON = ("gemm", "startup")
# Whose CUDA kernels take part in a suite, where these are not those of prefill alone.
_TRAINING = ("attention", "backward", "backward_rows", "backward_dq", "backward_wide", "backward_product")
OPERATIONS = {
    **dict.fromkeys(("backward", "parallel", "varlen"), _TRAINING),
    "e2e": (*_TRAINING, "decode"),
    "gemm": ("gemm",),
    "startup": ("attention", "decode", "gemm"),
    **dict.fromkeys(("accuracy", "decode", "matrix", "paged"), ("attention", "decode")),
}


def kernel_digest(suite: str) -> str:
    """Names the kernel sources that the suite measures, as this package would compile them; a record keeps it."""
    from flashcore.backends.hopper.jit import source_digest
    from flashcore.backends.hopper.kernels import KERNELS

    kernels = (KERNELS[name] for name in OPERATIONS.get(suite, ("attention",)))
    digest = "\0".join(source_digest(kernel.source, kernel.table) for kernel in kernels)
    if suite in WITHOUT_TRITON:
        return digest
    sources = sorted((PACKAGE / "backends" / "triton").glob("attention*.py"))
    sources += [PACKAGE / "backends" / "triton" / name for name in ("tiles.py", "configs.py")]
    sources += [PACKAGE / "score.py"] if suite == "window" else []  # it prints what kernels do to scores
    return hashlib.sha256("\0".join([digest, *(path.read_text() for path in sources)]).encode()).hexdigest()


def commit(root: Path = PACKAGE.parent) -> dict:
    """``{"commit": id or None, "dirty": bool or None}`` of the clone; results themselves do not make it dirty."""
    try:
        head = _git(root, "rev-parse", "HEAD").strip()
        changes = _git(root, "status", "--porcelain", "--", ":/", ":(exclude,top)benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": head, "dirty": bool(changes.strip())}


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def meta(suite: str, method: dict, commit_id: str | None = None) -> dict:
    """The header of a suite's record. ``commit_id`` names the sources where there is no clone to ask."""
    return {
        **machine.describe(),
        **({"commit": commit_id, "dirty": None} if commit_id else commit()),
        "kernel_digest": kernel_digest(suite),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "method": method,
    }


def is_current(data: dict) -> bool:
    """Whether a record was made with the kernels that this package would compile."""
    return data["meta"]["kernel_digest"] == kernel_digest(data["suite"])


def path_for(record: dict, results: Path = RESULTS) -> Path:
    return Path(results) / machine.slug(record["meta"]["gpu"]) / f"{record['suite']}.json"


def write(record: dict, path: Path) -> None:
    """JSON with one row per line, so that differences between two runs read well; numbers to 6 significant digits.

    A process that dies meanwhile leaves what was there before.
    """
    lists = {key: record[key] for key in ("rows", "skipped")}
    head = {key: value for key, value in record.items() if key not in lists}
    text = json.dumps(head, indent=1, allow_nan=False).removesuffix("\n}")
    for key, rows in lists.items():
        lines = ",\n".join("  " + json.dumps(_rounded(row), allow_nan=False) for row in rows)
        text += f',\n "{key}": [\n{lines}\n ]' if rows else f',\n "{key}": []'
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(text + "\n}\n")
    fresh.replace(path)


class MergeError(ValueError):
    """Two records do not describe one state of machine, software and sources, measured in one way."""


class Keeper:
    """Writes a record as it grows, so that a run that ends early loses nothing.

    It grows in place where there is no record yet, or where it is merged into one of the same state; else beside the
    old one, in ``<suite>.partial.json``, which takes the old one's place when the run is complete.
    """

    def __init__(self, results: Path, merge: bool) -> None:
        self._results = results
        self._merge = merge
        self._base: dict | None = None
        self.path: Path | None = None  # of the complete record
        self.growing: Path | None = None  # where it is while it grows
        self.written = False

    def __call__(self, data: dict, done: Sequence[str]) -> dict:
        """Keep what a run of the cases `done` has found so far. Returns what is written.

        :raises MergeError: it cannot be merged; said before anything is measured.
        :raises OSError: it cannot be written; said then, too.
        """
        if self.path is None:
            self.path = path_for(data, self._results)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path.parent, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "cannot be written", str(self.path.parent))
            if self._merge and self.path.exists():
                self._base = read(self.path)
            replaces = self._base is None and self.path.exists()
            self.growing = self.path.with_suffix(".partial.json") if replaces else self.path
        whole = data if self._base is None else merge(self._base, data, done)
        if done:
            write(whole, self.growing)
            self.written = True
        return whole

    def finish(self, data: dict, done: Sequence[str]) -> dict:
        """Keep what a whole run has found, in its place."""
        whole = self(data, done)
        write(whole, self.path)
        if self.growing != self.path:
            self.growing.unlink(missing_ok=True)
        return whole


def with_missing(data: dict) -> dict:
    """The record with the names of its suite's cases that it is without, if there are any."""
    absent = missing(data)
    return {key: value for key, value in data.items() if key != "missing"} | ({"missing": absent} if absent else {})


def missing(data: dict) -> list[str]:
    """The names of its suite's cases of which a record holds neither a row nor the reason why there is none."""
    explained = {entry.get("case") for entry in data["skipped"]}
    held = {_identity(row, ("op", *_ABOUT_A_CASE)) for row in data["rows"]}
    held |= {_identity(row, _ABOUT_A_CASE) for row in data["rows"]}
    cases = SUITES[data["suite"]].cases if data["suite"] in SUITES else ()
    names = ((case.name, _identity(case.fields(), ("op", *_ABOUT_A_CASE))) for case in cases)
    return [name for name, about in names if name not in explained and about not in held]


# The columns that say what a row is about; the others are what was found.
_ABOUT_A_CASE = {
    "dtype", "batch", "heads", "kv_heads", "seqlen_q", "seqlen_k", "head_dim", "causal", "inputs", "window", "softcap",
    "alibi", "sink", "group", "m", "n", "k", "out_dtype", "weight", "activation", "model", "phase", "tokens",
    "new_tokens", "lengths", "page_size",
}  # fmt: skip
_IDENTITY = {"op", "impl", "kernel", *_ABOUT_A_CASE}
_OF_THE_MOMENT = {"date", "method"}


def merge(old: dict, new: dict, cases: Iterable[str]) -> dict:
    """The record `old` with what `new` measured put in its place or added: a long suite need not run in one go.

    :param cases: the names of those that `new` is about.

    :raises MergeError: they are not of one state.
    """
    metas = old["meta"], new["meta"]
    keys = sorted((metas[0].keys() | metas[1].keys()) - _OF_THE_MOMENT)
    differing = [key for key in keys if metas[0].get(key) != metas[1].get(key)]
    if metas[0]["method"].get("about") != metas[1]["method"].get("about"):
        differing.append("method")
    if differing:
        raise MergeError(f"the record that is there was made with another {', '.join(differing)}")
    rows = {_identity(row): row for row in (*old["rows"], *new["rows"])}
    tried = {entry.get("impl") for entry in (*new["rows"], *new["skipped"])}
    again = set(cases)
    kept = [s for s in old["skipped"] if s.get("impl") not in tried or s.get("case", "") not in again | {""}]
    skipped = kept + new["skipped"]
    return with_missing({**new, "rows": list(rows.values()), "skipped": skipped})


def _identity(row: dict, columns: Container[str] = _IDENTITY) -> tuple:
    return tuple(sorted((key, json.dumps(value)) for key, value in row.items() if key in columns))


def read(path: Path) -> dict:
    return json.loads(Path(path).read_text())


def read_all(results: Path = RESULTS) -> dict[str, dict[str, dict]]:
    """Every record below ``results``: ``{gpu slug: {suite: record}}``. The CPU's are no measurements and stay out; runs
    that ended before they could replace a record, too.

    :raises ValueError: a record names another GPU than its folder, whose anchors it would be compared with.
    """
    found: dict[str, dict[str, dict]] = {}
    for path in sorted(Path(results).glob("*/*.json")):
        if path.parent.name != "cpu" and not path.name.endswith(".partial.json"):
            data = read(path)
            if (gpu := machine.slug(data["meta"]["gpu"])) != path.parent.name:
                raise ValueError(f"{path} is a record of {data['meta']['gpu']}: it belongs into {gpu}")
            found.setdefault(path.parent.name, {})[path.stem] = data
    return found


def _rounded(row: dict) -> dict:
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}
