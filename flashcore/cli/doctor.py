"""``flashcore doctor``: what this machine has, and which backends can use it."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer

from flashcore.cli.console import console


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for a bug report.")] = False) -> None:
    """What this machine has, which backends it can use, and why not the others."""
    facts = diagnose()
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    out = console()
    for section, values in facts.items():
        out.print(f"[bold]{section}[/]")
        for name, value in values.items():
            out.print(f"  {name:<20} {'-' if value is None else value}", markup=False)


def diagnose() -> dict[str, dict]:
    """Everything ``doctor`` says. No probe raises: what does not work is the answer."""
    from flashcore import disk
    from flashcore.bench import machine

    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(("FLASHCORE_", "CUDA_"))}
    return {"machine": machine.describe(), "backends": backends(), "cache": disk.facts(), "variables": variables}


def backends() -> dict[str, str]:
    """``usable``, or why not, by backend."""
    try:
        from flashcore import backends
    except Exception as error:  # without torch, say
        return {"all": f"{type(error).__name__}: {error}"}
    verdicts = {}
    for name in backends.ATTENTION.providers:
        try:
            verdicts[name] = backends.ATTENTION.load(name).unavailable() or "usable"
        except Exception as error:
            verdicts[name] = f"{type(error).__name__}: {error}"
    return verdicts
