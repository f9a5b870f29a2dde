"""Who is the best peer: a record's rows by shape, and the earlier measurements that stand in for a missing peer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flashcore.bench import record
from flashcore.bench.cases import OURS, Case, PackedCase

CASE_FIELDS = ("dtype", "batch", "heads", "kv_heads", "seqlen_q", "seqlen_k", "head_dim", "causal", "inputs")
FEATURE_FIELDS = ("window", "softcap", "alibi", "sink", "lengths", "page_size")
SAME_ORDER = 2.0  # cuDNN's time in the anchors over that in a run, or its inverse, must be less


def load_anchors(gpu: str, benchmarks: Path = record.BENCHMARKS) -> dict[tuple, dict]:
    """Earlier measurements of all peers on this kind of GPU, by case; empty where there are none."""
    path = benchmarks / "anchors" / f"{gpu}.json"
    if not path.exists():
        return {}
    return {key(_anchor_row(row)): row for row in json.loads(path.read_text())["rows"]}


def _anchor_row(row: dict) -> dict:
    op = "attention_bwd" if row["suite"] == "backward" else "attention_fwd"
    lengths = {"seqlen_q": row["seqlen"], "seqlen_k": row["seqlen"]} if "seqlen" in row else {}
    return {**row, **lengths, "inputs": "normal", "op": op}


def key(row: dict) -> tuple:
    features = json.dumps({name: row[name] for name in FEATURE_FIELDS if name in row})
    return *(row[field] for field in CASE_FIELDS), features, row["op"] == "attention_bwd"


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
        """The best peer's time: measured in this run, or estimated, whichever is less."""
        times = [row["ms_p50"] for impl, row in self.rows.items() if impl not in OURS and "ms_p50" in row]
        return min([*times, *filter(None, [self.estimated_ms])], default=None)

    @property
    def estimated_ms(self) -> float | None:
        """This run's cuDNN scaled to the best peer of the anchors, where this run has no time of that peer."""
        if not self.anchored or "ms_p50" in self.rows.get(self.anchor["best"], {}):
            return None
        return self.rows["cudnn"]["ms_p50"] / self.anchor["cudnn_over_best"]

    @property
    def anchored(self) -> bool:
        """Whether the anchors speak for peers that this run may be without.

        Where cuDNN took a time of another order in the anchors' run, that measured something else: the host, at short
        calls.
        """
        cudnn = self.rows.get("cudnn", {}).get("ms_p50")
        if not cudnn or not self.anchor:
            return False
        return 1 / SAME_ORDER < self.anchor["ms"]["cudnn"] / cudnn < SAME_ORDER

    @property
    def ratio(self) -> float | None:
        """FlashCore's speed over the best peer's: above 1 is faster. None if either is unknown."""
        if self.ours is None or self.best_ms is None:
            return None
        return self.best_ms / self.ours["ms_p50"]

    @property
    def over_dense(self) -> float | None:
        """FlashCore's speed over that of its dense call on the same sequences. None if either is unknown."""
        dense = self.rows.get("flashcore-dense", {}).get("ms_p50")
        return dense / self.ours["ms_p50"] if dense and self.ours else None


def over_dense(found: list[Shape]) -> list[str]:
    """A sentence on what the ratios to FlashCore's dense call come to."""
    known = [(shape.over_dense, shape.case.name) for shape in found if shape.over_dense]
    if not known:
        return []
    mean, (least, worst) = geomean(ratio for ratio, _ in known), min(known)
    return [f"Speed over FlashCore's dense call, geometric mean: {mean:.2f}; lowest {least:.2f} ({worst})."]


def case_of(row: dict) -> Case:
    """The case that a recorded row of attention is about."""
    return (PackedCase if "lengths" in row else Case).of(row)


def shapes(data: dict, anchors: dict[tuple, dict]) -> list[Shape]:
    """The rows of a record, grouped by case, in the record's order."""
    grouped: dict[tuple, dict[str, dict]] = {}
    for row in data["rows"]:
        if "head_dim" in row:
            grouped.setdefault(key(row), {})[row["impl"]] = row
    return [
        Shape(case_of(next(iter(rows.values()))), rows, anchors.get(about)) for about, rows in grouped.items()
    ]


def unanchored(found: list[Shape]) -> list[str]:
    """A sentence on the shapes whose ratio says nothing about FlashAttention-3: neither the run nor an anchor has it.

    Its packed op is slower, and no stand-in.
    """
    compared = [shape for shape in found if shape.ratio is not None]
    without = [shape for shape in compared if not shape.anchored and "ms_p50" not in shape.rows.get("fa3", {})]
    if not without:
        return []
    which = "any shape" if len(without) == len(compared) else ", ".join(shape.case.name for shape in without)
    return [
        f"FlashAttention-3's dense path was not measured, and there is no anchor of it, for {which}: the best peer "
        "there is the best one in the table."
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
