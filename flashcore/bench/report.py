"""Tables and plots out of records, and their place in the documentation.

A document holds blocks between ``<!-- flashcore report: NAME -->`` and ``<!-- flashcore report end -->``;
:func:`update` fills them, :func:`stale` says which no longer show what the records say.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from flashcore.bench import record
from flashcore.bench.cases import ADVERSARIAL, OURS, SHORT, SUITES, Case, GemmCase

ROOT = record.PACKAGE.parent
CASE_FIELDS = ("dtype", "batch", "heads", "kv_heads", "seqlen_q", "seqlen_k", "head_dim", "causal", "inputs")
NOTHING = "No measurement has been recorded yet.\n"


@dataclass(frozen=True)
class Table:
    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        lines = ["| " + " | ".join(self.headers) + " |", "|" + " --- |" * len(self.headers)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        parts = [f"**{self.title}**", "\n".join(lines), *self.notes]
        return "\n\n".join(part for part in parts if part) + "\n"


# --- who is the best peer

SAME_ORDER = 2.0  # cuDNN's time in the anchors over that in a run, or its inverse, must be less


def load_anchors(gpu: str, benchmarks: Path = record.BENCHMARKS) -> dict[tuple, dict]:
    """Earlier measurements of all peers on this kind of GPU, by case; empty where there are none."""
    path = benchmarks / "anchors" / f"{gpu}.json"
    if not path.exists():
        return {}
    return {_key(_anchor_row(row)): row for row in json.loads(path.read_text())["rows"]}


def _anchor_row(row: dict) -> dict:
    op = "attention_bwd" if row["suite"] == "backward" else "attention_fwd"
    lengths = {"seqlen_q": row["seqlen"], "seqlen_k": row["seqlen"]} if "seqlen" in row else {}
    return {**row, **lengths, "inputs": "normal", "op": op}


def _key(row: dict) -> tuple:
    return *(row[field] for field in CASE_FIELDS), row["op"] == "attention_bwd"


@dataclass(frozen=True)
class Shape:
    """All rows of one case, by implementation."""

    case: Case
    rows: dict[str, dict]
    anchor: dict | None

    @property
    def ours(self) -> dict | None:
        """FlashCore's row if it was measured and right."""
        row = self.rows.get("flashcore")
        return row if row and "ms_p50" in row else None

    @property
    def best_ms(self) -> float | None:
        """The best peer's time: measured in this run, or this run's cuDNN scaled to the best peer of the anchors.

        Where cuDNN took a time of another order in the anchors' run, that measured something else (the host, at short
        calls) and is left out.
        """
        times = [row["ms_p50"] for impl, row in self.rows.items() if impl not in OURS and "ms_p50" in row]
        cudnn = self.rows.get("cudnn", {}).get("ms_p50")
        if cudnn and self.anchor and 1 / SAME_ORDER < self.anchor["ms"]["cudnn"] / cudnn < SAME_ORDER:
            times.append(cudnn / self.anchor["cudnn_over_best"])
        return min(times, default=None)

    @property
    def ratio(self) -> float | None:
        """FlashCore's speed over the best peer's: above 1 is faster. None if either is unknown."""
        if self.ours is None or self.best_ms is None:
            return None
        return self.best_ms / self.ours["ms_p50"]


def shapes(data: dict, anchors: dict[tuple, dict]) -> list[Shape]:
    """The rows of a record, grouped by case, in the record's order."""
    grouped: dict[tuple, dict[str, dict]] = {}
    for row in data["rows"]:
        if "head_dim" in row:
            grouped.setdefault(_key(row), {})[row["impl"]] = row
    return [
        Shape(Case(**dict(zip((*CASE_FIELDS, "backward"), key, strict=True))), rows, anchors.get(key))
        for key, rows in grouped.items()
    ]


def geomean(values: Iterable[float]) -> float:
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def summary(found: list[Shape]) -> list[str]:
    """What the ratios to the best peer come to, and what went wrong, one sentence each."""
    known = [(shape.case, shape.ratio) for shape in found if shape.ratio is not None]
    lines = []
    if known:
        groups = {"all": known}
        for head_dim in sorted({case.head_dim for case, _ in known}):
            groups[f"head_dim {head_dim}"] = [(c, r) for c, r in known if c.head_dim == head_dim]
        groups["S <= 1024"] = [(c, r) for c, r in known if c.seqlen_k <= 1024]
        groups["S >= 2048"] = [(c, r) for c, r in known if c.seqlen_k >= 2048]
        means = [f"{name} {geomean(r for _, r in group):.2f}" for name, group in groups.items() if group]
        worst, least = min(known, key=lambda pair: pair[1])
        lines.append(
            f"Speed over the best peer, geometric mean: {', '.join(means)}; lowest {least:.2f} ({worst.name})."
        )
    spread = [shape.ours["std_pct"] for shape in found if shape.ours and shape.ours["ms_p50"] > 0.1]
    if spread:
        lines.append(f"Run-to-run standard deviation on shapes above 0.1 ms: at most {max(spread):.1f} %.")
    for shape in found:
        for impl, row in shape.rows.items():
            if "failed" in row:
                lines.append(f"FAILED: {impl} on {shape.case.name}: {row['failed']}")
    return lines


# --- tables


def tables(data: dict, anchors: dict[tuple, dict]) -> list[Table]:
    """Everything a record says, as tables."""
    title = f"{data['suite']}: {SUITES[data['suite']].about}"
    if data["suite"] == "startup":
        return startup_tables(data)
    if data["suite"] == "gemm":
        return [gemm_table(title, data)] if data["rows"] else []
    if data["suite"] == "e2e":
        from flashcore.bench import e2e

        return e2e.tables(title, data)
    found = shapes(data, anchors)
    if not found:
        return []
    if data["suite"] == "accuracy":
        return [accuracy_table(title, found)]
    if data["suite"] == "matrix":
        return matrix_tables(found, data["skipped"])
    return [timing_table(title, found, data["meta"]["method"]["mode"])]


def _impls(found: list[Shape]) -> list[str]:
    return list(dict.fromkeys(impl for shape in found for impl in shape.rows))


def _mask(case: Case) -> str:
    return "causal" if case.causal else "full"


def _length(case: Case) -> str:
    return str(case.seqlen_q) if case.seqlen_q == case.seqlen_k else f"{case.seqlen_q} x {case.seqlen_k}"


def _heads(case: Case) -> str:
    return str(case.heads) if case.heads == case.kv_heads else f"{case.heads}:{case.kv_heads}"


def timing_table(title: str, found: list[Shape], mode: str) -> Table:
    """One row per shape: TFLOP/s of everybody (microseconds where latency is the point), and the ratio."""
    unit, show = {
        "events": ("TFLOP/s", lambda row: f"{row['tflops']:.0f}"),
        "graph": ("us", lambda row: f"{1e3 * row['ms_p50']:.1f}"),
        "host": ("us", lambda row: f"{1e3 * row['ms_p50']:.1f}"),
        "wall": ("ms", lambda row: f"{row['ms_p50']:.2f}"),
    }[mode]
    decode = mode != "host" and all(shape.case.seqlen_q == 1 for shape in found)
    if decode:
        unit, show = "TB/s", lambda row: f"{row['tbps']:.2f}"
    impls = _impls(found)
    timed = mode != "host"
    headers = ["head_dim", "mask", "S", "batch", "heads", *(f"{impl}, {unit}" for impl in impls)]
    rows = []
    for shape in found:
        case = shape.case
        cells = [str(case.head_dim), _mask(case), _length(case), str(case.batch), _heads(case)]
        for impl in impls:
            row = shape.rows.get(impl)
            cells.append("" if row is None else show(row) if "ms_p50" in row else "failed")
        if timed:
            ours = shape.ours or {}
            cells.append("" if shape.ratio is None else f"{shape.ratio:.2f}")
            cells.append(f"{ours['std_pct']:.1f}" if ours else "")
            cells.append(f"{ours['rel_err']:.2e}" if ours else "")
        rows.append(tuple(cells))
    headers += ["over best peer", "std %", "rel. error"] if timed else []
    notes = summary(found) if timed else []
    if decode:
        notes += _picked(found, "backend")
    return Table(title, tuple(headers), tuple(rows), (*notes, *_picked(found, "backward")))


def _picked(found: list[Shape], field: str) -> list[str]:
    """Which "backend" or "backward" pass `flashcore` stands for: a plan's backward need not be FlashCore's own."""
    picked = [shape.ours[field] for shape in found if shape.ours and field in shape.ours]
    counts = (f"{name} ({picked.count(name)} shapes)" for name in dict.fromkeys(picked))
    what = "backend" if field == "backend" else "backward pass"
    return [f"The {what} that FlashCore's plan picked: {', '.join(counts)}."] if picked else []


def compact_table(found: list[Shape]) -> Table:
    """TFLOP/s and, in parentheses, the ratio to the best peer: a row per head_dim and mask, a column per length."""
    lengths = sorted({shape.case.seqlen_q for shape in found})
    cells: dict[tuple, dict[int, str]] = {}
    for shape in found:
        text = "failed"
        if shape.ours:
            text = f"{shape.ours['tflops']:.0f}" + (f" ({shape.ratio:.2f})" if shape.ratio is not None else "")
        cells.setdefault((shape.case.head_dim, _mask(shape.case)), {})[shape.case.seqlen_q] = text
    rows = [
        (f"{head_dim} {mask}", *(by_length.get(length, "") for length in lengths))
        for (head_dim, mask), by_length in cells.items()
    ]
    headers = ("head_dim, mask", *(f"S = {length}" for length in lengths))
    return Table(
        "FlashCore forward, TFLOP/s (in parentheses: over the best peer)", headers, tuple(rows), tuple(summary(found))
    )


def accuracy_table(title: str, found: list[Shape]) -> Table:
    impls = _impls(found)
    rows = []
    for shape in found:
        case = shape.case
        cells = [str(case.head_dim), _mask(case), _length(case), case.dtype, case.inputs]
        for impl in impls:
            row = shape.rows.get(impl, {})
            text = f"{row['rel_err']:.3e}" if "rel_err" in row else ""
            cells.append(f"{text} failed".strip() if "failed" in row else text)
        ours, fa2 = (shape.rows.get(impl, {}).get("rel_err") for impl in ("flashcore", "fa2"))
        cells.append(f"{ours / fa2:.3f}" if ours and fa2 else "")
        rows.append(tuple(cells))
    headers = ("head_dim", "mask", "S", "dtype", "inputs", *impls, "flashcore / fa2")
    failures = [line for line in summary(found) if line.startswith("FAILED")]
    return Table(f"{title}: relative error", headers, tuple(rows), tuple(failures))


def matrix_tables(found: list[Shape], skipped: list[dict]) -> list[Table]:
    """One table per shape, the fastest first: what PyTorch does by default, and what one gains by another choice."""
    tables = []
    for shape in found:
        case = shape.case
        default = shape.rows.get("sdpa", {}).get("ms_p50")
        label = next(iter(shape.rows.values())).get("label", case.name)
        rows = []
        for impl, row in sorted(shape.rows.items(), key=lambda item: item[1].get("ms_p50", math.inf)):
            ms = row.get("ms_p50")
            cells = ["failed", ""] if ms is None else [f"{1e3 * ms:.1f}", f"{default / ms:.2f}" if default else ""]
            errors = (f"{row[key]:.2e}" if key in row else "" for key in ("rel_err", "max_abs_err"))
            rows.append((impl, *cells, *errors, str(row.get("backend", ""))))
        headers = ("implementation", "us", "speed over sdpa", "rel. error", "max. abs. error", "FlashCore's backend")
        notes = [f"FAILED: {impl}: {row['failed']}" for impl, row in shape.rows.items() if "failed" in row]
        notes += _left_out("Not measured", [s for s in skipped if s.get("case") == case.name])
        size = f"batch {case.batch}, S = {_length(case)}, heads {_heads(case)}, head_dim {case.head_dim}"
        title = f"matrix: {label} ({size}, {_mask(case)}, {SHORT[case.dtype]})"
        if shape is found[-1]:
            notes += _left_out("Not measured at any shape", [s for s in skipped if "case" not in s])
        tables.append(Table(title, headers, tuple(rows), tuple(notes)))
    return tables


def _left_out(what: str, skipped: list[dict]) -> list[str]:
    reasons = [f"{entry['impl']} ({entry['reason']})" for entry in skipped]
    return [f"{what}: {', '.join(reasons)}."] if reasons else []


def not_recorded(recorded: Iterable[str]) -> list[str]:
    """The suites that have no record on a GPU which has some. `quick` is for any machine and publishes nothing."""
    return [name for name in SUITES if name not in recorded and name != "quick"]


def gemm_table(title: str, data: dict) -> Table:
    """One row per product: everybody's TFLOP/s, and FlashCore's speed over cuBLAS's."""
    unit, field, digits = ("ms", "ms_p50", 2) if data["meta"]["method"]["mode"] == "wall" else ("TFLOP/s", "tflops", 0)
    grouped: dict[GemmCase, dict[str, dict]] = {}
    for row in data["rows"]:
        case = GemmCase(**{f.name: row[f.name] for f in fields(GemmCase)})
        grouped.setdefault(case, {})[row["impl"]] = row
    impls = list(dict.fromkeys(row["impl"] for row in data["rows"]))
    rows, ratios, failures = [], {}, []
    for case, by_impl in grouped.items():
        cells = [case.group, str(case.m), str(case.n), str(case.k), f"{SHORT[case.dtype]} -> {SHORT[case.out_dtype]}"]
        cells.append(case.activation or "")
        for impl in impls:
            row = by_impl.get(impl, {})
            cells.append(f"{row[field]:.{digits}f}" if field in row else "failed" if "failed" in row else "")
            if "failed" in row:
                failures.append(f"FAILED: {impl} on {case.name}: {row['failed']}")
        ours, theirs = (by_impl.get(impl, {}) for impl in ("flashcore-matmul", "cublas"))
        ratio = theirs["ms_p50"] / ours["ms_p50"] if "ms_p50" in ours and "ms_p50" in theirs else None
        cells.append("" if ratio is None else f"{ratio:.3f}")
        cells += [f"{ours['std_pct']:.1f}", f"{ours['rel_err']:.2e}"] if "ms_p50" in ours else ["", ""]
        rows.append(tuple(cells))
        if ratio is not None:
            kind = "SwiGLU" if case.activation else "MLP" if case.weight else case.group
            ratios.setdefault(kind, []).append((ratio, case.name))
    notes = [
        f"Speed over cuBLAS, {kind}: geometric mean {geomean(r for r, _ in known):.3f}, "
        f"lowest {min(known)[0]:.3f} ({min(known)[1]})."
        for kind, known in ratios.items()
    ]
    headers = ["case", "m", "n", "k", "dtypes", "activation", *(f"{impl}, {unit}" for impl in impls)]
    headers += ["over cuBLAS", "std %", "rel. error"]
    return Table(title, tuple(headers), tuple(rows), (*notes, *failures))


def startup_tables(data: dict) -> list[Table]:
    compiled = [row for row in data["rows"] if row["op"] == "compile"]
    started = {row["impl"]: row for row in data["rows"] if row["op"] == "start"}
    found = []
    if compiled:
        rows = tuple(
            (row["kernel"], f"{row['seconds']:.2f}", *(str(row[k]) for k in ("registers", "spill_bytes", "smem_bytes")))
            for row in compiled
        )
        slowest = max(row["seconds"] for row in compiled)
        found.append(
            Table(
                "startup: cold compile of each kernel",
                ("kernel", "seconds", "registers", "spilled bytes", "shared memory, bytes"),
                rows,
                (f"Slowest: {slowest:.2f} s.",),
            )
        )
    if started:
        rows = tuple(
            (impl, *(f"{row[key]:.2f}" for key in ("s_p50", "s_min", "s_max"))) for impl, row in started.items()
        )
        beyond = ()
        if {"torch", "flashcore"} <= started.keys():
            seconds = started["flashcore"]["s_p50"] - started["torch"]["s_p50"]
            beyond = (f"FlashCore beyond torch without attention: {seconds:.2f} s.",)
        found.append(
            Table(
                "startup: seconds from the start of a process to its first result, kernels on disk",
                ("implementation", "median", "fastest", "slowest"),
                rows,
                beyond,
            )
        )
    return found


def provenance(data: dict) -> str:
    """One sentence on what was measured, where and when."""
    meta = data["meta"]
    where = f"{meta['gpu']}, {meta['power_limit_w']} W cap, driver {meta['driver']}"
    software = f"torch {meta['torch']}, cuDNN {meta['cudnn']}, NVRTC {meta['nvrtc']}, cuda.core {meta['cuda_core']}"
    commit = (meta["commit"] or "unknown")[:12] + (" with local changes" if meta["dirty"] else "")
    return (
        f"Measured {meta['date'][:10]} on {where}; {software}; FlashCore {meta['flashcore']}, commit {commit}, "
        f"kernel sources {meta['kernel_digest'][:12]}."
    )


# --- plot


def plot(data: dict, anchors: dict[tuple, dict], path: Path) -> None:
    """TFLOP/s over sequence length: a column per head_dim, a row per mask. The file carries the digest of its data."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [shape for shape in shapes(data, anchors) if shape.case.inputs == "normal"]
    head_dims = sorted({shape.case.head_dim for shape in found})
    masks = sorted({shape.case.causal for shape in found})
    size = (4 * len(head_dims), 3 * len(masks) + 0.6)
    figure, axes = pyplot.subplots(len(masks), len(head_dims), figsize=size, sharex=True, squeeze=False)
    for row, causal in enumerate(masks):
        for column, head_dim in enumerate(head_dims):
            panel = [s for s in found if (s.case.causal, s.case.head_dim) == (causal, head_dim)]
            _plot_panel(axes[row][column], sorted(panel, key=lambda s: s.case.seqlen_q))
            axes[row][column].set_title(f"head_dim {head_dim}, {'causal' if causal else 'full'}", fontsize=10)
            if column == 0:
                axes[row][column].set_ylabel("TFLOP/s")
            if row == len(masks) - 1:
                axes[row][column].set_xlabel("sequence length")
    handles = {label: h for ax in axes.flat for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="upper center", ncols=len(handles), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Description": plot_key(data, anchors)})
    pyplot.close(figure)


def _plot_panel(axis, panel: list[Shape]) -> None:
    impls = _impls(panel)
    for impl in sorted(impls, key=lambda name: (name in OURS, name)):  # ours are drawn last, on top
        points = [(s.case.seqlen_q, s.rows[impl]["tflops"]) for s in panel if "tflops" in s.rows.get(impl, {})]
        if points:
            style = {"color": "black", "linewidth": 2.2} if impl == "flashcore" else {"linewidth": 1.2}
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=impl, **style)
    best = [(s.case.seqlen_q, s.case.tflops(s.best_ms)) for s in panel if s.anchor and s.best_ms]
    if best:
        axis.plot(*zip(*best, strict=True), "--", color="gray", label="best peer (estimated)")
    axis.set_xscale("log", base=2)
    axis.set_xticks([s.case.seqlen_q for s in panel], [_thousands(s.case.seqlen_q) for s in panel])
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)


def _thousands(seqlen: int) -> str:
    return f"{seqlen // 1024}K" if seqlen >= 1024 else str(seqlen)


def plot_key(data: dict, anchors: dict[tuple, dict]) -> str:
    """Names what a plot shows: the rows, and the estimates that the anchors add."""
    shown = [data["rows"], [shape.anchor for shape in shapes(data, anchors)]]
    return "flashcore-data-" + hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


# --- documents


@dataclass(frozen=True)
class Documents:
    """A clone's records and the documents that show them."""

    root: Path = ROOT

    @property
    def results(self) -> dict[str, dict[str, dict]]:
        return record.read_all(self.root / "benchmarks" / "results")

    def anchors(self, gpu: str) -> dict[tuple, dict]:
        return load_anchors(gpu, self.root / "benchmarks")

    def plot_path(self, gpu: str) -> Path:
        return self.root / "docs" / "img" / f"forward-{gpu}.png"

    def blocks(self) -> dict[Path, dict[str, str]]:
        """What each block of each document should say."""
        from flashcore.bench import profile

        performance, numerics = (self.root / "docs" / name for name in ("performance.md", "numerics.md"))
        return {
            self.root / "README.md": {"forward": self._forward_block()},
            self.root / "docs" / "benchmarks.md": {"tables": self._tables_block()},
            **({performance: profile.document_blocks(self)} if performance.exists() else {}),
            **({numerics: {"adversarial": self._adversarial_block()}} if numerics.exists() else {}),
        }

    def _forward_block(self) -> str:
        parts = []
        for gpu, suites in self.results.items():
            if data := suites.get("forward"):
                image = self.plot_path(gpu).relative_to(self.root).as_posix()
                parts.append(f"![TFLOP/s over sequence length on {data['meta']['gpu']}]({image})\n")
                parts.append(compact_table(shapes(data, self.anchors(gpu))).markdown())
                parts.append(provenance(data) + "\n")
        return "\n".join(parts) or NOTHING

    def _adversarial_block(self) -> str:
        parts = []
        for gpu, suites in self.results.items():
            if data := suites.get("accuracy"):
                found = [shape for shape in shapes(data, self.anchors(gpu)) if shape.case in ADVERSARIAL]
                if found:
                    title = f"{data['meta']['gpu']}: adversarial cases"
                    parts += [accuracy_table(title, found).markdown(), provenance(data) + "\n"]
        return "\n".join(parts) or NOTHING

    def _tables_block(self) -> str:
        parts = []
        for gpu, suites in self.results.items():
            if absent := not_recorded(suites):
                name = next(iter(suites.values()))["meta"]["gpu"]
                parts.append(f"Not recorded on {name}: {', '.join(absent)}.\n")
            for name in SUITES:
                if data := suites.get(name):
                    parts.append(f"### {data['meta']['gpu']}: {name}\n")
                    parts += [table.markdown() for table in tables(data, self.anchors(gpu))]
                    parts += [provenance(data) + "\n", f"Method: {data['meta']['method']['about']}.\n"]
        return "\n".join(parts) or NOTHING

    def update(self) -> list[Path]:
        """Rewrite every block and plot that is out of date. Returns the files written."""
        written = []
        for path, blocks in self.blocks().items():
            text = path.read_text()
            new = text
            for name, body in blocks.items():
                new = replace_block(new, name, body, path)
            if new != text:
                path.write_text(new)
                written.append(path)
        for gpu, suites in self.results.items():
            if "forward" in suites and not self._plot_is_current(gpu, suites["forward"]):
                plot(suites["forward"], self.anchors(gpu), self.plot_path(gpu))
                written.append(self.plot_path(gpu))
        return written

    def stale(self) -> list[Path]:
        """The documents and plots that do not show what the records say."""
        found = [
            path
            for path, blocks in self.blocks().items()
            if any(replace_block(text := path.read_text(), name, body, path) != text for name, body in blocks.items())
        ]
        found += [
            self.plot_path(gpu)
            for gpu, suites in self.results.items()
            if "forward" in suites and not self._plot_is_current(gpu, suites["forward"])
        ]
        return found

    def _plot_is_current(self, gpu: str, data: dict) -> bool:
        path = self.plot_path(gpu)
        return path.exists() and plot_key(data, self.anchors(gpu)).encode() in path.read_bytes()


def replace_block(text: str, name: str, body: str, path: Path | None = None) -> str:
    """``text`` with the block called ``name`` filled with ``body``.

    :raises ValueError: unless there is exactly one such block.
    """
    pattern = rf"(<!-- flashcore report: {re.escape(name)} -->\n).*?(<!-- flashcore report end -->)"
    new, count = re.subn(pattern, lambda match: f"{match[1]}\n{body}\n{match[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{path}: {count} blocks named {name!r}, expected one")
    return new

