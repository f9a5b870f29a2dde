"""What the commands share: consoles, progress, errors, tables."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from flashcore.bench.tables import Table as BenchTable


def console(stderr: bool = False) -> Console:
    """A console that does not squeeze tables into 80 columns when the output goes to a file."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 180, highlight=False)


def progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console(stderr=True), transient=True)


def fail(message: str) -> typer.Exit:
    """Say why a command cannot go on. The caller raises what comes back: exit code 2."""
    console(stderr=True).print(message, style="red", markup=False)
    return typer.Exit(2)


def show(found: BenchTable) -> None:
    table = Table(title=found.title, title_justify="left", title_style="bold")
    for i, header in enumerate(found.headers):
        table.add_column(header, justify="left" if i < 2 else "right", overflow="fold")
    for row in found.rows:
        table.add_row(*row)
    out = console()
    out.print(table)
    for note in found.notes:
        out.print(note, style="red" if note.startswith("FAILED") else None, markup=False)


def need_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise fail("plots need matplotlib: pip install 'flashcore-attention[bench]'")


def default_results() -> Path:
    """The clone's results if FlashCore runs from a clone, else a folder of the current directory."""
    from flashcore.bench import record

    return record.RESULTS if record.BENCHMARKS.is_dir() else Path("benchmarks/results")


def sizes(shape: str, names: str) -> list[int]:
    """The sizes of these names, as ``--shape`` gives them."""
    try:
        found = [int(part) for part in shape.split(",")]
    except ValueError:
        found = []
    if len(found) != len(names.split(",")) or min(found) < 0:
        raise fail(f"--shape {shape!r} is not {names}")
    return found


ATTENTION = "batch,seqlen_q,seqlen_k,heads_q,heads_k,head_dim"
