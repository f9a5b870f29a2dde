"""Tables out of records: one kind for each kind of suite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from flashcore.bench.cases import SHORT, SUITES, Case, GemmCase, PackedCase
from flashcore.bench.models import LAUNCH_BOUND
from flashcore.bench.shapes import Shape, geomean, over_dense, shapes, summary, unanchored


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


def tables(data: dict, anchors: dict[tuple, dict]) -> list[Table]:
    """Everything that a record of a suite says, as tables."""
    title = f"{data['suite']}: {SUITES[data['suite']].about}"
    if data["suite"] == "startup":
        return startup_tables(data)
    if data["suite"] == "gemm":
        return [gemm_table(title, data)] if data["rows"] else []
    if data["suite"] == "e2e":
        return model_tables(title, data)
    if data["suite"] == "parallel":
        return [parallel_table(title, data)] if data["rows"] else []
    found = shapes(data, anchors)
    if not found:
        return []
    if data["suite"] == "accuracy":
        return [accuracy_table(title, found)]
    if data["suite"] == "matrix":
        return matrix_tables(found, data["skipped"])
    if data["suite"] in ("varlen", "paged"):
        return packed_tables(title, found, data["meta"]["method"]["mode"])
    return [timing_table(title, found, data["meta"]["method"]["mode"])]


def impls_of(found: list[Shape]) -> list[str]:
    return list(dict.fromkeys(impl for shape in found for impl in shape.rows))


def short_name(case: Case) -> str:
    lengths = _sequences(case) if isinstance(case, PackedCase) else case.seqlen_q
    return f"{case.head_dim} {case.mask} {lengths}"


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
    impls = impls_of(found)
    timed = mode != "host"
    mixed = len({shape.case.dtype for shape in found}) > 1
    headers = ["head_dim", "mask", "S", "batch", "heads", *(["dtype"] if mixed else [])]
    headers += [f"{impl}, {unit}" for impl in impls]
    rows = []
    for shape in found:
        case = shape.case
        cells = [str(case.head_dim), case.mask, _length(case), str(case.batch), _heads(case)]
        cells += [SHORT[case.dtype]] if mixed else []
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
    if any(shape.case.features for shape in found):
        headers.append("time over plain")
        rows = [(*row, cell) for row, cell in zip(rows, _over_plain(found), strict=True)]
    notes = [*summary(found), *(unanchored(found) if mode != "wall" else [])] if timed else []
    if decode:
        notes += _picked(found, "backend")
    return Table(title, tuple(headers), tuple(rows), (*notes, *_picked(found, "backward")))


def packed_tables(title: str, found: list[Shape], mode: str) -> list[Table]:
    """A table for each pass over packed sequences, or one of those in pages: everybody's speed, and FlashCore's over
    the best peer's and over that of its own dense call."""
    groups = {name: [s for s in found if s.case.backward == (name == "backward")] for name in ("forward", "backward")}
    return [_packed_table(f"{title}: {name}", group, mode) for name, group in groups.items() if group]


def _packed_table(title: str, found: list[Shape], mode: str) -> Table:
    paged = found[0].case.page_size
    unit, column, digits = ("TB/s", "tbps", 2) if paged else ("TFLOP/s", "tflops", 0)
    if mode == "wall":
        unit, column, digits = "ms", "ms_p50", 2
    impls = impls_of(found)
    rows = []
    for shape in found:
        case, ours = shape.case, shape.ours or {}
        cells = [str(case.head_dim), case.mask, _heads(case), _sequences(case)]
        cells += [str(case.page_size), f"{1e3 * ours['ms_p50']:.1f}" if ours else ""] if paged else []
        for impl in impls:
            row = shape.rows.get(impl)
            cells.append("" if row is None else f"{row[column]:.{digits}f}" if "ms_p50" in row else "failed")
        cells += [f"{x:.2f}" if x else "" for x in (shape.ratio, shape.over_dense)]
        cells += [f"{ours['std_pct']:.1f}", f"{ours['rel_err']:.2e}"] if ours else ["", ""]
        rows.append(tuple(cells))
    headers = ["head_dim", "mask", "heads", "sequences", *(["page", "flashcore, us"] if paged else [])]
    headers += [f"{impl}, {unit}" for impl in impls]
    headers += ["over best peer", "over dense", "std %", "rel. error"]
    notes = [*summary(found), *over_dense(found), *_without_packed_fa3(found)]
    return Table(title, tuple(headers), tuple(rows), (*notes, *_picked(found, "backend"), *_picked(found, "backward")))


def _sequences(case: PackedCase) -> str:
    """How many there are of which lengths, queries x keys where these differ."""
    return f"{case.batch} of {_length(case) if case.lengths == 'equal' else case.lengths}"


def _without_packed_fa3(found: list[Shape]) -> list[str]:
    """A sentence on the shapes whose ratio says nothing about FlashAttention-3."""
    without = [
        shape.case.name
        for shape in found
        if shape.ratio is not None and "ms_p50" not in shape.rows.get("fa3-varlen", {})
    ]
    if not without:
        return []
    which = "any shape" if len(without) == len(found) else ", ".join(without)
    return [f"FlashAttention-3's packed op was not measured for {which}: the best peer there is another one."]


def over_dense_table(title: str, found: list[Shape]) -> Table:
    """What packing or pages cost: a row per shape that FlashCore's dense call computes, too."""
    rows = []
    for shape in found:
        if shape.over_dense:
            case = shape.case
            cells = [str(case.head_dim), case.mask, _heads(case), _sequences(case)]
            cells += ["backward" if case.backward else "forward", str(case.page_size or "")]
            cells += [f"{1e3 * shape.rows[impl]['ms_p50']:.1f}" for impl in ("flashcore", "flashcore-dense")]
            rows.append((*cells, f"{shape.over_dense:.2f}"))
    headers = ("head_dim", "mask", "heads", "sequences", "pass", "page", "us", "dense, us", "speed over dense")
    return Table(title, headers, tuple(rows), tuple(over_dense(found)))


def _over_plain(found: list[Shape]) -> list[str]:
    """FlashCore's time of each shape with features over that of the same shape without, where both were measured."""
    plain = {shape.case: shape.ours["ms_p50"] for shape in found if shape.ours and not shape.case.features}
    cells = []
    for shape in found:
        base = plain.get(replace(shape.case.plain, label=""))
        known = shape.case.features and shape.ours and base
        cells.append(f"{shape.ours['ms_p50'] / base:.2f}" if known else "")
    return cells


def _picked(found: list[Shape], field: str) -> list[str]:
    """Which "backend" or "backward" pass `flashcore` stands for: a plan's backward need not be FlashCore's own."""
    picked = [shape.ours[field] for shape in found if shape.ours and field in shape.ours]
    counts = (f"{name} ({picked.count(name)} shapes)" for name in dict.fromkeys(picked))
    what = "backend" if field == "backend" else "backward pass"
    return [f"The {what} that FlashCore's plan picked: {', '.join(counts)}."] if picked else []


def compact_table(title: str, found: list[Shape]) -> Table:
    """TFLOP/s and, in parentheses, the ratio to the best peer: a row per head_dim and mask, a column per length."""
    lengths = sorted({shape.case.seqlen_q for shape in found})
    cells: dict[tuple, dict[int, str]] = {}
    for shape in found:
        text = "failed"
        if shape.ours:
            text = f"{shape.ours['tflops']:.0f}" + (f" ({shape.ratio:.2f})" if shape.ratio is not None else "")
        cells.setdefault((shape.case.head_dim, shape.case.mask), {})[shape.case.seqlen_q] = text
    rows = [
        (f"{head_dim} {mask}", *(by_length.get(length, "") for length in lengths))
        for (head_dim, mask), by_length in cells.items()
    ]
    headers = ("head_dim, mask", *(f"S = {length}" for length in lengths))
    return Table(title, headers, tuple(rows), tuple(summary(found)))


def accuracy_table(title: str, found: list[Shape]) -> Table:
    impls = impls_of(found)
    rows = []
    for shape in found:
        case = shape.case
        cells = [str(case.head_dim), case.mask, _length(case), case.dtype, case.inputs]
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
        title = f"matrix: {label} ({size}, {case.mask}, {SHORT[case.dtype]})"
        if shape is found[-1]:
            notes += _left_out("Not measured at any shape", [s for s in skipped if "case" not in s])
        tables.append(Table(title, headers, tuple(rows), tuple(notes)))
    return tables


def _left_out(what: str, skipped: list[dict]) -> list[str]:
    reasons = [f"{entry['impl']} ({entry['reason']})" for entry in skipped]
    return [f"{what}: {', '.join(reasons)}."] if reasons else []


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


def parallel_table(title: str, data: dict) -> Table:
    """One row per length and phase: everybody's milliseconds, and how much faster FlashCore's best is than others."""
    grouped: dict[tuple, dict[str, dict]] = {}
    for row in data["rows"]:
        key = (f"{row['head_dim']}", f"{row['heads']}:{row['kv_heads']}", f"{row['seqlen_q']}", row["phase"])
        grouped.setdefault(key, {})[row["impl"]] = row
    impls = list(dict.fromkeys(row["impl"] for row in data["rows"]))
    rows = []
    for key, by_impl in grouped.items():
        ms = {impl: row["ms_p50"] for impl, row in by_impl.items() if "ms_p50" in row}
        ours = min((ms[impl] for impl in ("ring", "ulysses") if impl in ms), default=None)
        cells = [f"{ms[impl]:.2f}" if impl in ms else "failed" if impl in by_impl else "" for impl in impls]
        over = [f"{ms[other] / ours:.2f}" if ours and other in ms else "" for other in ("one-gpu", "context-parallel")]
        rows.append((*key, *cells, *over))
    failures = [f"FAILED: {row['impl']}: {row['failed']}" for row in data["rows"] if "failed" in row]
    headers = ("head_dim", "heads", "S", "phase", *(f"{impl}, ms" for impl in impls))
    return Table(title, (*headers, "over one GPU", "over context_parallel"), tuple(rows), tuple(failures))


# --- whole models


def model_tables(title: str, data: dict) -> list[Table]:
    """Tokens/s, attention's share, peak memory and distances, a row per case."""
    grouped: dict[tuple, dict[str, dict]] = {}
    for row in data["rows"]:
        key = (row["model"], row["phase"], row["tokens"], row["new_tokens"])
        grouped.setdefault(key, {})[row["impl"]] = row
    if not grouped:
        return []
    impls = list(dict.fromkeys(row["impl"] for row in data["rows"]))

    def table(name: str, show: Callable[[dict], str], more: dict[str, Callable[[dict], str]], notes=()) -> Table:
        rows = []
        for (model, phase, tokens, new_tokens), by_impl in grouped.items():
            what = f"{tokens} + {new_tokens}" if new_tokens else str(tokens)
            cells = [show(by_impl[impl]) if impl in by_impl else "" for impl in impls]
            rows.append((model, phase, what, *cells, *(extra(by_impl) for extra in more.values())))
        return Table(name, ("model", "phase", "tokens", *impls, *more), tuple(rows), tuple(notes))

    def number(key: str, digits: int) -> Callable[[dict], str]:
        return lambda row: f"{row[key]:.{digits}f}" if key in row else "failed" if "failed" in row else ""

    def distance(row: dict) -> str:
        if "rel_err" not in row:
            return "reference" if row.get("reference") else "failed" if "failed" in row else ""
        equal = f", {row['tokens_equal']} of {row['new_tokens']} tokens" if "tokens_equal" in row else ""
        return f"{row['rel_err']:.2e}{equal}" + (" failed" if "failed" in row else "")

    failures = [
        f"FAILED: {row['impl']} on {row['model']}-{row['phase']}-{row['tokens']}: {row['failed']}"
        for row in data["rows"]
        if "failed" in row
    ]
    absent = [
        f"Not measured: {entry['impl']} on {entry['case']}: {entry['reason']}."
        for entry in data["skipped"]
        if "impl" in entry and "case" in entry
    ]
    return [
        table(
            f"{title}: tokens/s",
            number("tokens_per_s", 0),
            {"over the faster SDPA": _over_sdpa, "std %": _spread},
            (*absent, *failures),
        ),
        table("Attention's share of the device's time, %", number("attention_pct", 1), {"backend": _backend}),
        *pace_tables(data["rows"]),
        table("Peak memory, GiB", number("peak_gib", 1), {}),
        table("Relative error of logits, or of gradients; generated tokens before the first other one", distance, {}),
    ]


def pace_tables(rows: Sequence[dict]) -> list[Table]:
    """One row per generation and implementation, and who waited for the host; none without generations."""
    paced = [row for row in rows if "token_ms" in row]
    if not paced:
        return []
    keys = "first_token_ms", "token_ms", "step_device_ms"
    cells = tuple((row["model"], row["impl"], *(f"{row[key]:.2f}" for key in keys)) for row in paced)
    bound = [f"{row['impl']} on {row['model']}" for row in paced if row["launch_bound"]]
    note = (
        f"Launch-bound, the device works for less than {100 * LAUNCH_BOUND:.0f} % of a token's time and then waits for "
        f"the host: {', '.join(bound)}."
    )
    headers = ("model", "implementation", "first token, ms", "each further token, ms", "of which the device works, ms")
    return [Table("Generation: the pace of tokens", headers, cells, (note,) if bound else ())]


def _over_sdpa(by_impl: dict[str, dict]) -> str:
    speeds = {impl: row["tokens_per_s"] for impl, row in by_impl.items() if "tokens_per_s" in row}
    peers = [speeds[impl] for impl in ("cudnn", "fa2", "sdpa") if impl in speeds]
    return f"{speeds['flashcore'] / max(peers):.3f}" if peers and "flashcore" in speeds else ""


def _spread(by_impl: dict[str, dict]) -> str:
    row = by_impl.get("flashcore", {})
    return f"{row['std_pct']:.1f}" if row.get("samples", 1) > 1 else ""


def _backend(by_impl: dict[str, dict]) -> str:
    row = by_impl.get("flashcore", {})
    return ", ".join(filter(None, (row.get("backend"), row.get("backward") and f"backward {row['backward']}")))
