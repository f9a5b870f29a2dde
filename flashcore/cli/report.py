"""``flashcore report``: the records and the documents that show them."""

from __future__ import annotations

from typing import Annotated

import typer

from flashcore.cli.console import console, fail, need_matplotlib


def report(
    update: Annotated[bool, typer.Option("--update", help="Rewrite the documents' tables and plots.")] = False,
) -> None:
    """Say which records there are, whether the kernels have changed since, and whether the documents show them.

    Exits with 1 if a document does not show what the records say.
    """
    from flashcore.bench import record
    from flashcore.bench.documents import Documents, not_recorded

    documents = Documents()
    if not (documents.root / "README.md").exists():
        raise fail("report works on a clone: there is no README.md beside this package")
    out = console()
    for gpu, suites in documents.results.items():
        for name, data in suites.items():
            meta = data["meta"]
            state = "current" if record.is_current(data) else "the kernel sources have changed since"
            failed = sum("failed" in row for row in data["rows"])
            out.print(
                f"{gpu}/{name}: {meta['date']}, commit {(meta['commit'] or 'unknown')[:12]}, {len(data['rows'])} rows"
                f"{f', {failed} failed' if failed else ''}: {state}",
                markup=False,
            )
            if absent := record.missing(data):
                out.print(f"{gpu}/{name}: without {len(absent)} of its cases: {', '.join(absent)}", markup=False)
        for name in not_recorded(suites):
            out.print(f"{gpu}/{name}: not recorded", markup=False)
    for gpu in documents.cards_without():
        out.print(f"{gpu}: no records", markup=False)
    for path in documents.unfinished:
        out.print(f"{path.relative_to(documents.root)}: a run that ended early; it replaced nothing", markup=False)
    if not documents.results:
        out.print("no records yet: flashcore bench --suite forward makes one")
    if update:
        if documents.results:
            need_matplotlib()
        for path in documents.update():
            out.print(f"wrote {path.relative_to(documents.root)}")
    stale = documents.stale()
    for path in stale:
        out.print(f"out of date: {path.relative_to(documents.root)}", style="red")
    raise typer.Exit(1 if stale else 0)
