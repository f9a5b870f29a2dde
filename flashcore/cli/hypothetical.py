"""Options of the commands about calls that nobody makes: dtypes and architectures by name."""

from __future__ import annotations

import re

from flashcore.cli.console import fail


def dtype_of(name: str, option: str = "--dtype"):
    from flashcore.problem import DTYPES

    named = {name: kind for kind, name in DTYPES.items()}
    if name not in named:
        raise fail(f"{option} {name!r} is not one of {', '.join(named)}")
    return named[name]


def arch_of(arch: str | None) -> tuple[int, int] | None:
    if arch is None:
        return None
    match = re.fullmatch(r"(\d{1,3})\.(\d{1,3})", arch)
    if match is None:
        raise fail(f"--arch {arch!r} is not a compute capability such as 9.0")
    return int(match[1]), int(match[2])
