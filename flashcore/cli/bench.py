"""``flashcore bench``: FlashCore beside its peers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashcore.cli import compile
from flashcore.cli.console import console, default_results, fail, need_matplotlib, progress, show

if TYPE_CHECKING:
    from flashcore.bench.record import Keeper


def bench(
    suite: Annotated[list[str], typer.Option(help="Suites to run, or 'all'.")] = ["quick"],  # noqa: B006
    impl: Annotated[list[str] | None, typer.Option(help="Implementations, instead of the suite's own choice.")] = None,
    case: Annotated[str | None, typer.Option(help="Only cases whose name matches this regular expression.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write <gpu>/<suite>.json.")] = None,
    plot: Annotated[bool, typer.Option(help="Also draw TFLOP/s over sequence length, beside the record.")] = False,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds in which implementations take turns.")] = 5,
    round_ms: Annotated[float, typer.Option(min=1, help="Milliseconds per implementation and round.")] = 40.0,
    rest_ms: Annotated[float, typer.Option(min=0, help="Idle milliseconds of a GPU before each case.")] = 2000.0,
    seed: Annotated[int, typer.Option(help="Of the order in which implementations take turns.")] = 0,
    commit: Annotated[
        str | None, typer.Option(envvar="FLASHCORE_COMMIT", help="What to record as commit, where there is no clone.")
    ] = None,
    fa3_so: Annotated[
        Path | None, typer.Option(envvar="FLASHCORE_FA3_SO", help="Shared object with vLLM's FA3 op, for fa3-varlen.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Put a run of some cases into the record, instead of replacing it.")
    ] = False,
    list_all: Annotated[bool, typer.Option("--list", help="Only list suites, cases and implementations.")] = False,
) -> None:
    """Measure FlashCore beside its peers: check each against float64, time them in turns, record the result.

    Without --case and --impl the record goes to benchmarks/results; a partial run is only recorded with --out or
    --merge, which adds it to the record that is there if that was made on the same machine with the same software and
    sources. What was measured is written after each case; until a run is complete, a record that it replaces stays, and
    the new one is called <suite>.partial.json. Exits with 1 if an implementation of FlashCore's failed.
    """
    from flashcore.bench import record, suites
    from flashcore.bench.cases import OURS, SUITES
    from flashcore.bench.machine import slug
    from flashcore.bench.peers import LIBRARIES, PEERS
    from flashcore.bench.plot import drawable
    from flashcore.bench.plot import plot as draw
    from flashcore.bench.shapes import load_anchors
    from flashcore.bench.tables import tables
    from flashcore.bench.timing import Effort

    if list_all:
        _list_bench(SUITES, PEERS)
        return
    names = list(SUITES) if "all" in suite else suite
    for given, known, what in ((names, SUITES, "suite"), (impl or [], PEERS, "implementation")):
        if unknown := [name for name in given if name not in known]:
            raise fail(f"no such {what}: {', '.join(unknown)} (there are: {', '.join(known)})")
    if plot:
        need_matplotlib()
    if fa3_so is not None:
        LIBRARIES["fa3-varlen"] = str(fa3_so)

    partial = bool(case or impl)
    failed = False
    for name in names:
        chosen = SUITES[name]
        cases = [one for one in chosen.cases if case is None or re.search(case, one.name)]
        if chosen.cases and not cases:
            raise fail(f"no case of suite {name} matches {case!r}; --list shows them")
        keeper = record.Keeper(out or default_results(), merge) if out or merge or not partial else None
        with progress() as bar, _explained(keeper):
            task = bar.add_task(name, total=None if name == "startup" else len(cases), completed=-1)

            def on_case(what: str, bar=bar, task=task, name=name) -> None:
                bar.update(task, description=f"{name}: {what}", advance=1)

            effort = Effort(rounds=rounds, round_ms=round_ms, rest_ms=rest_ms, seed=seed)
            data = suites.run(chosen, cases, impl, effort, commit, on_case, *([keeper] if keeper else []))
        gpu = slug(data["meta"]["gpu"])
        anchors = load_anchors(gpu)
        for table in tables(data, anchors):
            show(table)
        _show_skipped(data["skipped"])
        failed |= any("failed" in row and row["impl"] in OURS for row in data["rows"])
        if name == "quick":
            _show_compiled()
        if keeper is not None:
            with _explained(keeper):
                data = keeper.finish(data, [one.name for one in cases])
            console().print(f"recorded in {keeper.path}")
            if plot and drawable(data):
                draw(data, anchors, keeper.path.with_suffix(".png"))
                console().print(f"plotted in {keeper.path.with_suffix('.png')}")
    raise typer.Exit(1 if failed else 0)


@contextmanager
def _explained(keeper: Keeper | None) -> Iterator[None]:
    """Say why a record cannot be merged, and what is left of a run that somebody stops."""
    from flashcore.bench.record import MergeError

    try:
        yield
    except MergeError as error:
        raise fail(f"cannot merge into {keeper.path}: {error}") from None
    except KeyboardInterrupt:
        if keeper is not None and keeper.written:
            console(stderr=True).print(f"stopped; what was measured is in {keeper.growing}", markup=False)
        raise


def _list_bench(suites: dict, peers: dict) -> None:
    out = console()
    for suite in suites.values():
        out.print(f"[bold]{suite.name}[/]: {suite.about}")
        for case in suite.cases:
            out.print(f"  {case.name}")
    out.print("[bold]implementations[/]")
    for peer in peers.values():
        out.print(f"  {peer.name}: {peer.about} ({peer.unavailable() or 'usable'})")


def _show_skipped(skipped: Sequence[dict]) -> None:
    reasons: dict[tuple[str, str], int] = {}
    for entry in skipped:
        key = (entry.get("impl", ""), entry["reason"])
        reasons[key] = reasons.get(key, 0) + ("case" in entry)
    for (impl, reason), count in reasons.items():
        where = f" ({count} cases)" if count else ""
        console().print(f"skipped {impl}{where}: {reason}", style="dim", markup=False)


def _show_compiled() -> None:
    """Compile every declared kernel, as ``flashcore compile`` does: it needs NVRTC, but no GPU."""
    reason = compile.nvrtc_missing()
    if reason:
        console().print(f"kernels not compiled: {reason}", style="dim", markup=False)
        return
    compile.show_kernels(compile.compile_all(compile.declared(None), None))
