"""``flashcore cache``: the compiled kernels on disk."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from flashcore.cli.console import console, fail


def cache(clear: Annotated[bool, typer.Option("--clear", help="Delete every compiled kernel.")] = False) -> None:
    """Where compiled kernels are kept, how many and how large."""
    if clear:
        from flashcore.backends.hopper import jit

        if (found := jit.disk_cache()) is None:
            raise fail("the disk cache is off or not writable")
        found.clear()
    known = facts()
    for name, value in known.items():
        if name != "error":
            console().print(f"{name:<10} {'-' if value is None else value}", markup=False)
    if error := known.get("error"):
        raise fail(error)


def facts() -> dict[str, Any]:
    """What is known of the cache; with "error", a sentence, where not all of it can be found out."""
    from flashcore import env

    known: dict[str, Any] = {"path": None, "enabled": None, "writable": None, "entries": None, "bytes": None}
    try:
        path = env.cache_dir()
        known["path"] = str(path)
        known["enabled"] = env.cache_enabled()
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        known["writable"] = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
        known["entries"] = known["bytes"] = 0
        if known["enabled"] and path.exists():
            from flashcore.backends.hopper import jit

            if found := jit.disk_cache():
                known["entries"] = len(found)
                known["bytes"] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    except Exception as error:  # no home, a switch that is none, no right to look, no NVRTC: what does not work
        known["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return known
