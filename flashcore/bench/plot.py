"""Plots out of records."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from flashcore.bench.cases import OURS
from flashcore.bench.shapes import Shape, shapes
from flashcore.bench.tables import impls_of


def drawable(data: dict) -> bool:
    """Whether a record has anything to draw: the speed of attention over its length, where sequences have one."""
    return any("tflops" in row and "head_dim" in row and "lengths" not in row for row in data["rows"])


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
    title = data["meta"]["gpu"] or "CPU"
    figure.legend(handles.values(), handles, loc="upper center", ncols=len(handles), frameon=False, title=title)
    figure.tight_layout(rect=(0, 0, 1, 0.91))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Description": plot_key(data, anchors)})
    pyplot.close(figure)


def _plot_panel(axis, panel: list[Shape]) -> None:
    impls = impls_of(panel)
    for impl in sorted(impls, key=lambda name: (name in OURS, name)):  # ours are drawn last, on top
        points = [(s.case.seqlen_q, s.rows[impl]["tflops"]) for s in panel if "tflops" in s.rows.get(impl, {})]
        if points:
            style = {"color": "black", "linewidth": 2.2} if impl == "flashcore" else {"linewidth": 1.2}
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=impl, **style)
    if any(s.estimated_ms for s in panel):
        best = [(s.case.seqlen_q, s.case.tflops(s.best_ms)) for s in panel if s.best_ms]
        axis.plot(*zip(*best, strict=True), "--", color="gray", label="best peer (estimated)")
    axis.set_xscale("log", base=2)
    axis.set_xticks([s.case.seqlen_q for s in panel], [_thousands(s.case.seqlen_q) for s in panel])
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)


def _thousands(seqlen: int) -> str:
    return f"{seqlen // 1024}K" if seqlen >= 1024 else str(seqlen)


def plot_key(data: dict, anchors: dict[tuple, dict]) -> str:
    """Names what a plot shows: the GPU, the rows, and the estimates that the anchors add."""
    shown = [data["meta"]["gpu"], data["rows"], [shape.anchor for shape in shapes(data, anchors)]]
    return "flashcore-data-" + hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()
