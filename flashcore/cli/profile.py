"""``flashcore profile``: kernels under Nsight Compute."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from flashcore.cli.console import ATTENTION, console, default_results, fail, progress, show, sizes
from flashcore.cli.hypothetical import dtype_of


def profile(
    suite: Annotated[str, typer.Option(help="The suite that --case chooses from.")] = "forward",
    case: Annotated[str | None, typer.Option(help="Cases whose name matches this regular expression.")] = None,
    shape: Annotated[str | None, typer.Option(help=ATTENTION)] = None,
    causal: Annotated[bool, typer.Option(help="With --shape: hide the future.")] = False,
    dtype: Annotated[str, typer.Option(help="With --shape: bfloat16 or float16")] = "bfloat16",
    impl: Annotated[str, typer.Option(help="The implementation whose longest kernel is shown.")] = "flashcore",
    ncu: Annotated[Path | None, typer.Option(help="Nsight Compute's command line, if it is not found.")] = None,
    prepare: Annotated[bool, typer.Option("--prepare", help="Only print the commands, to be run elsewhere.")] = False,
    read: Annotated[Path | None, typer.Option(help="Only show the log that such a command left.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write <gpu>/profile.json.")] = None,
    commit: Annotated[str | None, typer.Option(envvar="FLASHCORE_COMMIT", help="What to record as commit.")] = None,
) -> None:
    """Profile kernels with Nsight Compute: busy units, memory, and why warps wait; or say what is missing for it.

    Without --case and --shape a fixed choice of cases is profiled and recorded in benchmarks/results; others are only
    recorded with --out.
    """
    from flashcore.bench import profile as profiling
    from flashcore.bench import record
    from flashcore.bench.peers import PEERS
    from flashcore.errors import EnvironmentProblem

    try:
        if read is not None:
            show(profiling.table(profiling.read(read.read_text(errors="replace"))))
            return
        if impl not in PEERS:
            raise fail(f"no such implementation: {impl} (there are: {', '.join(PEERS)})")
        cases = _cases(suite, case, shape, causal, dtype)
        found = profiling.find_ncu(ncu)
        if prepare:
            for one in cases:
                print(profiling.prepared(found, one, impl))
            return
        if reason := profiling.missing(found):
            raise fail(
                f"cannot profile: {reason}. For another machine, --prepare prints the command, --read shows its log."
            )
        with progress() as bar:
            task = bar.add_task("profile", total=len(cases), completed=-1)

            def on_case(name: str) -> None:
                bar.update(task, description=f"profile: {name}", advance=1)

            data = profiling.run(cases, impl, found, commit, on_case)
    except EnvironmentProblem as error:
        raise fail(f"cannot profile: {error}") from None
    show(profiling.table(data["rows"]))
    if out is not None or (case is None and shape is None and impl == "flashcore"):
        path = record.path_for(data, out or default_results())
        record.write(data, path)
        console().print(f"recorded in {path}")


def _cases(suite: str, pattern: str | None, shape: str | None, causal: bool, dtype: str) -> list:
    from flashcore.bench import profile as profiling
    from flashcore.bench.cases import SUITES, Case
    from flashcore.problem import AttentionProblem

    if shape is not None:
        batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim = sizes(shape, ATTENTION)
        q, k = (batch, seqlen_q, heads, head_dim), (batch, seqlen_k, kv_heads, head_dim)
        AttentionProblem.hypothetical(q, k, dtype=dtype_of(dtype), arch=(9, 0))  # as the call would check them
        return [Case(batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim, causal, dtype)]
    if pattern is None:
        return list(profiling.CASES)
    if suite not in SUITES:
        raise fail(f"no such suite: {suite} (there are: {', '.join(SUITES)})")
    if SUITES[suite].mode == "e2e":
        raise fail("suite e2e has whole models; profile one of their layers by its shape")
    if not (found := [one for one in SUITES[suite].cases if re.search(pattern, one.name)]):
        raise fail(f"no case of suite {suite} matches {pattern!r}; flashcore bench --list shows them")
    if backward := [one.name for one in found if isinstance(one, Case) and one.backward]:
        raise fail(f"{backward[0]} cannot be profiled: only forward passes can, yet")
    return found
