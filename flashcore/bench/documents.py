"""Records in the documentation.

A document holds blocks between ``<!-- flashcore report: NAME -->`` and ``<!-- flashcore report end -->``;
:func:`update` fills them, :func:`stale` says which no longer show what the records say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flashcore.bench import profile, record, roofline
from flashcore.bench.cases import ADVERSARIAL, SUITES
from flashcore.bench.machine import slug
from flashcore.bench.plot import drawable, plot, plot_key
from flashcore.bench.shapes import load_anchors, shapes
from flashcore.bench.tables import accuracy_table, compact_table, over_dense_table, tables

ROOT = record.PACKAGE.parent
NOTHING = "No measurement has been recorded yet.\n"
CARDS = tuple(roofline.HBM_BYTES)  # whose records the documents are to show, beside those of any other


def not_recorded(recorded: Iterable[str]) -> list[str]:
    """The suites that have no record on a GPU which has some. `quick` is for any machine and publishes nothing."""
    return [name for name in SUITES if name not in recorded and name != "quick"]


def provenance(data: dict) -> str:
    """What was measured, where and when, and whether that still is what the code computes with."""
    meta = data["meta"]
    where = f"{meta['gpu']}, {meta['power_limit_w']} W cap, driver {meta['driver']}"
    software = f"torch {meta['torch']}, cuDNN {meta['cudnn']}, NVRTC {meta['nvrtc']}, cuda.core {meta['cuda_core']}"
    software += "".join(f", {peer} {version}" for peer, version in meta.get("peers", {}).items())
    commit = (meta["commit"] or "unknown")[:12] + (" with local changes" if meta["dirty"] else "")
    older = "" if record.is_current(data) else " **Of older kernels:** their sources have changed since."
    return (
        f"Measured {meta['date'][:10]} on {where}; {software}; FlashCore {meta['flashcore']}, commit {commit}, "
        f"kernel sources {meta['kernel_digest'][:12]}.{older}"
    )


def incomplete(data: dict) -> list[str]:
    """A paragraph on the cases that a record is without, if there are any."""
    absent = record.missing(data)
    return [f"Not measured yet: {', '.join(absent)}.\n"] if absent else []


@dataclass(frozen=True)
class Documents:
    """A clone's records and the documents that show them."""

    root: Path = ROOT

    @property
    def results(self) -> dict[str, dict[str, dict]]:
        return record.read_all(self.root / "benchmarks" / "results")

    def cards_without(self, suite: str | None = None) -> list[str]:
        """Those of CARDS that have no record of the suite, or none at all."""
        recorded = {gpu: suites for gpu, suites in self.results.items() if suite is None or suite in suites}
        return [card for card in CARDS if card not in recorded]

    @property
    def unfinished(self) -> list[Path]:
        """What runs left that ended before they could replace a record."""
        return sorted((self.root / "benchmarks" / "results").glob("*/*.partial.json"))

    def anchors(self, gpu: str) -> dict[tuple, dict]:
        return load_anchors(gpu, self.root / "benchmarks")

    def plot_path(self, gpu: str) -> Path:
        return self.root / "docs" / "img" / f"forward-{gpu}.png"

    def blocks(self) -> dict[Path, dict[str, str]]:
        """What each block of each document should say."""
        performance, numerics = (self.root / "docs" / name for name in ("performance.md", "numerics.md"))
        return {
            self.root / "README.md": {"forward": self._forward_block()},
            self.root / "docs" / "benchmarks.md": {"tables": self._tables_block()},
            **({performance: self._performance_blocks()} if performance.exists() else {}),
            **({numerics: {"adversarial": self._adversarial_block()}} if numerics.exists() else {}),
        }

    def _unrecorded(self, suite: str | None = None) -> list[str]:
        """A paragraph on the cards that the records are without, if there are any of either."""
        cards = self.cards_without(suite) if self.results else []
        return [f"Not recorded on the {' and the '.join(map(str.upper, cards))} yet.\n"] if cards else []

    def _forward_block(self) -> str:
        parts = []
        for gpu, suites in self.results.items():
            if data := suites.get("forward"):
                image = self.plot_path(gpu).relative_to(self.root).as_posix()
                if drawable(data):
                    parts.append(f"![TFLOP/s over sequence length on {data['meta']['gpu']}]({image})\n")
                title = f"{data['meta']['gpu']}: FlashCore forward, TFLOP/s (in parentheses: over the best peer)"
                parts.append(compact_table(title, shapes(data, self.anchors(gpu))).markdown())
                parts += [*incomplete(data), provenance(data) + "\n"]
        return "\n".join(parts + self._unrecorded("forward")) or NOTHING

    def _adversarial_block(self) -> str:
        parts = []
        for gpu, suites in self.results.items():
            if data := suites.get("accuracy"):
                found = [shape for shape in shapes(data, self.anchors(gpu)) if shape.case in ADVERSARIAL]
                if found:
                    title = f"{data['meta']['gpu']}: adversarial cases"
                    parts += [accuracy_table(title, found).markdown(), provenance(data) + "\n"]
        return "\n".join(parts + self._unrecorded("accuracy")) or NOTHING

    def _performance_blocks(self) -> dict[str, str]:
        """The generated blocks of docs/performance.md."""
        rates, profiled = [], []
        for gpu, suites in self.results.items():
            if data := suites.get("forward"):
                found = shapes(data, self.anchors(gpu))
                meta = data["meta"]
                hbm = roofline.HBM_BYTES.get(slug(meta["gpu"]))
                parts = (
                    roofline.block_table(meta["gpu"], found),
                    roofline.roofline_table(meta["gpu"], found, meta["sm_count"], hbm),
                )
                rates += [part.markdown() for part in parts] + [provenance(data) + "\n"]
            if data := suites.get(profile.SUITE):
                profiled.append(
                    profile.table(data["rows"], f"{data['meta']['gpu']}: what Nsight Compute counts").markdown()
                )
                profiled += [provenance(data) + "\n", f"Method: {data['meta']['method']['about']}.\n"]
        rates += self._unrecorded("forward")
        profiled += self._unrecorded(profile.SUITE)
        return {
            "roofline": "\n".join(rates) or NOTHING,
            "profile": "\n".join(profiled) or NOTHING,
            "packing": self._packing_block(),
        }

    def _packing_block(self) -> str:
        parts = []
        for name in ("varlen", "paged"):
            for gpu, suites in self.results.items():
                if data := suites.get(name):
                    title = f"{data['meta']['gpu']}: {name}, over the dense call"
                    parts.append(over_dense_table(title, shapes(data, self.anchors(gpu))).markdown())
                    parts += [*incomplete(data), provenance(data) + "\n"]
            parts += [f"**{name}.** {line}" for line in self._unrecorded(name)]
        return "\n".join(parts) or NOTHING

    def _tables_block(self) -> str:
        parts = self._unrecorded()
        for gpu, suites in self.results.items():
            if absent := not_recorded(suites):
                name = next(iter(suites.values()))["meta"]["gpu"]
                parts.append(f"Not recorded on {name}: {', '.join(absent)}.\n")
            for name in SUITES:
                if data := suites.get(name):
                    parts.append(f"### {data['meta']['gpu']}: {name}\n")
                    parts += [table.markdown() for table in tables(data, self.anchors(gpu))]
                    parts += [*incomplete(data), provenance(data) + "\n"]
                    parts.append(f"Method: {data['meta']['method']['about']}.\n")
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
        for gpu, data in self._stale_plots():
            plot(data, self.anchors(gpu), self.plot_path(gpu))
            written.append(self.plot_path(gpu))
        return written

    def stale(self) -> list[Path]:
        """The documents and plots that do not show what the records say."""
        found = [
            path
            for path, blocks in self.blocks().items()
            if any(replace_block(text := path.read_text(), name, body, path) != text for name, body in blocks.items())
        ]
        return found + [self.plot_path(gpu) for gpu, _ in self._stale_plots()]

    def _stale_plots(self) -> list[tuple[str, dict]]:
        drawn = [(gpu, suites["forward"]) for gpu, suites in self.results.items() if "forward" in suites]
        return [(gpu, data) for gpu, data in drawn if drawable(data) and not self._plot_is_current(gpu, data)]

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

