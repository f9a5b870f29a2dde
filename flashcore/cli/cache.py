"""``flashcore cache``: the compiled kernels on disk."""

from __future__ import annotations

from typing import Annotated

import typer

from flashcore.cli.console import console, fail


def cache(clear: Annotated[bool, typer.Option("--clear", help="Delete every compiled kernel.")] = False) -> None:
    """Where compiled kernels are kept, how many and how large."""
    from flashcore import disk

    if clear:
        from flashcore.backends.hopper import jit

        if (found := jit.disk_cache()) is None:
            raise fail("the disk cache is off")
        found.clear()
    known = disk.facts()
    for name, value in known.items():
        if name != "problem":
            console().print(f"{name:<10} {'-' if value is None else value}", markup=False)
    if problem := known["problem"]:
        raise fail(problem)
