"""The ``flashcore`` command: measure, look at an installation, compile ahead of time, explain a plan.

Heavy imports (torch, CUDA) happen inside the commands that need them, so that ``--help`` is quick and ``doctor``
answers on a machine where they are broken.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from flashcore import __version__

app = typer.Typer(
    help="FlashCore: measure, diagnose, compile ahead of time, explain.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"flashcore {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _console(stderr: bool = False) -> Console:
    """A console that does not squeeze tables into 80 columns when the output goes to a file."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 180, highlight=False)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=_console(stderr=True), transient=True)


def _fail(message: str) -> typer.Exit:
    _console(stderr=True).print(message, style="red", markup=False)
    return typer.Exit(2)


def _need_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise _fail("plots need matplotlib: pip install 'flashcore-attention[bench]'")


def _show(found: Any) -> None:
    """Print a bench.report.Table."""
    table = Table(title=found.title, title_justify="left", title_style="bold")
    for i, header in enumerate(found.headers):
        table.add_column(header, justify="left" if i < 2 else "right", overflow="fold")
    for row in found.rows:
        table.add_row(*row)
    console = _console()
    console.print(table)
    for note in found.notes:
        console.print(note, style="red" if note.startswith("FAILED") else None, markup=False)


# --- bench


@app.command()
def bench(
    suite: Annotated[list[str], typer.Option(help="Suites to run, or 'all'.")] = ["quick"],  # noqa: B006
    impl: Annotated[list[str] | None, typer.Option(help="Implementations, instead of the suite's own choice.")] = None,
    case: Annotated[str | None, typer.Option(help="Only cases whose name matches this regular expression.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write <gpu>/<suite>.json.")] = None,
    plot: Annotated[bool, typer.Option(help="Also draw TFLOP/s over sequence length, beside the record.")] = False,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds in which implementations take turns.")] = 5,
    round_ms: Annotated[float, typer.Option(min=1, help="Milliseconds per implementation and round.")] = 40.0,
    rest_ms: Annotated[float, typer.Option(min=0, help="Idle milliseconds of a GPU before each case.")] = 2000.0,
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
    sources. Exits with 1 if an implementation of FlashCore's failed.
    """
    from flashcore.bench import record, report, suites
    from flashcore.bench.cases import OURS, SUITES
    from flashcore.bench.machine import slug
    from flashcore.bench.peers import LIBRARIES, PEERS
    from flashcore.bench.timing import Effort

    if list_all:
        _list_bench(SUITES, PEERS)
        return
    names = list(SUITES) if "all" in suite else suite
    for given, known, what in ((names, SUITES, "suite"), (impl or [], PEERS, "implementation")):
        if unknown := [name for name in given if name not in known]:
            raise _fail(f"no such {what}: {', '.join(unknown)} (there are: {', '.join(known)})")
    if plot:
        _need_matplotlib()
    if fa3_so is not None:
        LIBRARIES["fa3-varlen"] = str(fa3_so)

    partial = bool(case or impl)
    failed = False
    for name in names:
        chosen = SUITES[name]
        cases = [one for one in chosen.cases if case is None or re.search(case, one.name)]
        if chosen.cases and not cases:
            raise _fail(f"no case of suite {name} matches {case!r}; --list shows them")
        with _progress() as progress:
            task = progress.add_task(name, total=len(cases) or None, completed=-1)

            def on_case(what: str, progress=progress, task=task, name=name) -> None:
                progress.update(task, description=f"{name}: {what}", advance=1)

            effort = Effort(rounds=rounds, round_ms=round_ms, rest_ms=rest_ms)
            data = suites.run(chosen, cases, impl, effort, commit, on_case)
        gpu = slug(data["meta"]["gpu"])
        anchors = report.load_anchors(gpu)
        for table in report.tables(data, anchors):
            _show(table)
        _show_skipped(data["skipped"])
        failed |= any("failed" in row and row["impl"] in OURS for row in data["rows"])
        if name == "quick":
            _show_compiled()
        if out is not None or merge or not partial:
            path = record.path_for(data, out or _default_results())
            if merge and path.exists():
                try:
                    data = record.merge(record.read(path), data, [one.name for one in cases])
                except ValueError as error:
                    raise _fail(f"cannot merge into {path}: {error}") from None
            record.write(data, path)
            _console().print(f"recorded in {path}")
            if plot and any("tflops" in row and "head_dim" in row for row in data["rows"]):
                report.plot(data, anchors, path.with_suffix(".png"))
                _console().print(f"plotted in {path.with_suffix('.png')}")
    raise typer.Exit(1 if failed else 0)


def _default_results() -> Path:
    """The clone's results if FlashCore runs from a clone, else a folder of the current directory."""
    from flashcore.bench import record

    return record.RESULTS if record.BENCHMARKS.is_dir() else Path("benchmarks/results")


def _list_bench(suites: dict, peers: dict) -> None:
    console = _console()
    for suite in suites.values():
        console.print(f"[bold]{suite.name}[/]: {suite.about}")
        for case in suite.cases:
            console.print(f"  {case.name}")
    console.print("[bold]implementations[/]")
    for peer in peers.values():
        console.print(f"  {peer.name}: {peer.about} ({peer.unavailable() or 'usable'})")


def _show_skipped(skipped: Sequence[dict]) -> None:
    reasons: dict[tuple[str, str], int] = {}
    for entry in skipped:
        key = (entry.get("impl", ""), entry["reason"])
        reasons[key] = reasons.get(key, 0) + ("case" in entry)
    for (impl, reason), count in reasons.items():
        where = f" ({count} cases)" if count else ""
        _console().print(f"skipped {impl}{where}: {reason}", style="dim", markup=False)


def _show_compiled() -> None:
    """Compile every declared kernel, as ``flashcore compile`` does: it needs NVRTC, but no GPU."""
    reason = _nvrtc_missing()
    if reason:
        _console().print(f"kernels not compiled: {reason}", style="dim", markup=False)
        return
    _show_kernels(_compile_all(_declared(None), None))


# --- compile


@app.command(name="compile")
def compile_command(
    head_dim: Annotated[list[int] | None, typer.Option(help="Only attention kernels that serve this head_dim.")] = None,
    all_kernels: Annotated[bool, typer.Option("--all", help="Every declared kernel (the default).")] = False,
    arch: Annotated[str, typer.Option(help="Architecture to compile for.")] = "sm_90a",
    jobs: Annotated[int | None, typer.Option(min=1, help="Threads; as many as there are CPUs by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compile kernels into the disk cache ahead of their first use. Needs NVRTC, but no GPU and no driver."""
    if reason := _nvrtc_missing():
        raise _fail(f"cannot compile: {reason}")
    from flashcore.backends.hopper import jit

    if arch != jit.ARCH:
        raise _fail(f"no kernels for {arch} (there are kernels for {jit.ARCH})")
    if all_kernels and head_dim:
        raise _fail("--all and --head-dim contradict each other")
    kernels = _compile_all(_declared(head_dim), jobs)
    if as_json:
        print(json.dumps(kernels, indent=1))
    else:
        _show_kernels(kernels)
        cache = jit.disk_cache()
        _console().print(f"cache: {cache.path}" if cache else "cache: off or not writable, nothing was kept on disk")


def _nvrtc_missing() -> str | None:
    try:
        from flashcore.backends.hopper import jit

        jit.nvrtc_version()
    except Exception as error:  # a missing library shows itself as any of several types
        return f"NVRTC is not usable ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return None


def _declared(head_dims: Sequence[int] | None) -> list[tuple[str, Any]]:
    from flashcore.backends.hopper import configs, decode_configs, gemm_configs

    declared = configs.declared_configs()
    if not head_dims:
        return declared + decode_configs.declared_configs() + gemm_configs.declared_configs()
    wanted = {configs.padded_head_dim(head_dim) for head_dim in head_dims}
    found = [(name, config) for name, config in declared if config.head_dim in wanted]
    if missing := wanted - {config.head_dim for _, config in found}:
        raise _fail(f"no kernel serves head_dim {', '.join(map(str, sorted(missing)))}")
    return found + decode_configs.declared_configs(sorted({d for d in head_dims if d % 8 == 0}))


def _compile_all(declared: Sequence[tuple[str, Any]], jobs: int | None) -> list[dict]:
    """Compile in threads, which NVRTC runs side by side. One dict per kernel, in the order given."""
    from flashcore.backends.hopper import jit
    from flashcore.errors import CompileError

    done: dict[str, dict] = {}
    with _progress() as progress, ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        task = progress.add_task("compiling", total=len(declared))
        futures = {pool.submit(jit.compile_kernel, config): name for name, config in declared}
        for future in as_completed(futures):
            name = futures[future]
            try:
                kernel = future.result()
            except CompileError as error:
                pool.shutdown(cancel_futures=True)
                raise _fail(f"{name}: {error}") from None
            done[name] = {
                "kernel": name,
                "seconds": round(kernel.seconds, 3),
                "from_cache": kernel.from_cache,
                "registers": kernel.registers,
                "spill_bytes": kernel.spill_bytes,
                "smem_bytes": kernel.smem_bytes,
                "warnings": list(kernel.warnings),
            }
            progress.update(task, advance=1, description=f"compiled {name}")
    return [done[name] for name, _ in declared]


def _show_kernels(kernels: Sequence[dict]) -> None:
    table = Table(title="kernels", title_justify="left", title_style="bold")
    for header in ("kernel", "source", "seconds", "registers", "spilled bytes", "shared memory, bytes", "warnings"):
        table.add_column(header, justify="left" if header in ("kernel", "source") else "right")
    for kernel in kernels:
        source = f"{kernel['from_cache']} cache" if kernel["from_cache"] else "compiled"
        numbers = (kernel["registers"], kernel["spill_bytes"], kernel["smem_bytes"], len(kernel["warnings"]))
        table.add_row(kernel["kernel"], source, f"{kernel['seconds']:.2f}", *map(str, numbers))
    _console().print(table)


# --- doctor and cache


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for a bug report.")] = False) -> None:
    """What this machine has, which backends it can use, and why not the others."""
    facts = diagnose()
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    console = _console()
    for section, values in facts.items():
        console.print(f"[bold]{section}[/]")
        for name, value in values.items():
            console.print(f"  {name:<20} {'-' if value is None else value}", markup=False)


def diagnose() -> dict[str, dict]:
    """Everything ``doctor`` says. No probe raises: what does not work is the answer."""
    from flashcore.bench import machine

    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(("FLASHCORE_", "CUDA_"))}
    return {"machine": machine.describe(), "backends": _backends(), "cache": _cache(), "variables": variables}


def _backends() -> dict[str, str]:
    """``usable``, or why not, by backend."""
    try:
        from flashcore import backends
    except Exception as error:  # without torch, say
        return {"all": f"{type(error).__name__}: {error}"}
    verdicts = {}
    for name in backends.BACKENDS:
        try:
            verdicts[name] = backends.load(name).unavailable() or "usable"
        except Exception as error:
            verdicts[name] = f"{type(error).__name__}: {error}"
    return verdicts


def _cache() -> dict[str, Any]:
    from flashcore import env

    facts: dict[str, Any] = {"path": None, "enabled": None, "writable": None, "entries": None, "bytes": None}
    with suppress(Exception):
        path = env.cache_dir()
        facts["path"] = str(path)
        facts["enabled"] = env.cache_enabled()
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        facts["writable"] = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
        facts["entries"] = facts["bytes"] = 0
        if facts["enabled"] and path.exists():
            from flashcore.backends.hopper import jit

            if cache := jit.disk_cache():
                facts["entries"] = len(cache)
                facts["bytes"] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return facts


@app.command()
def cache(clear: Annotated[bool, typer.Option("--clear", help="Delete every compiled kernel.")] = False) -> None:
    """Where compiled kernels are kept, how many and how large."""
    if clear:
        from flashcore.backends.hopper import jit

        if (found := jit.disk_cache()) is None:
            raise _fail("the disk cache is off or not writable")
        found.clear()
    for name, value in _cache().items():
        _console().print(f"{name:<10} {value}", markup=False)


# --- explain

_ATTENTION = "batch,seqlen_q,seqlen_k,heads_q,heads_k,head_dim"


@app.command()
def explain(
    shape: Annotated[str, typer.Option(help="batch,seqlen_q,seqlen_k,heads_q,heads_k,head_dim")],
    causal: Annotated[bool, typer.Option(help="Hide the future.")] = False,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32 or float64")] = "bfloat16",
    scale: Annotated[float | None, typer.Option(help="Of the scores; head_dim ** -0.5 by default.")] = None,
    grad: Annotated[bool, typer.Option(help="As if an input required a gradient.")] = False,
    lse: Annotated[bool, typer.Option(help="As if the LSE were asked for.")] = False,
    backend: Annotated[str, typer.Option(help="auto, or a backend's name")] = "auto",
    arch: Annotated[
        str | None, typer.Option(help="Plan for a GPU of this compute capability, such as 9.0, with all libraries.")
    ] = None,
) -> None:
    """Print the plan for a call of attention: backend, tile config, backward pass, and why not the others.

    No tensor is made and nothing is launched. With --arch no GPU is needed either.
    """
    from flashcore.errors import FlashCoreError
    from flashcore.plan import plan

    sizes = _sizes(shape, _ATTENTION)
    try:
        problem = _problem(sizes, dtype, causal, scale, grad, lse, arch)
        chosen = plan(problem, backend, anywhere=arch is not None)
    except FlashCoreError as error:
        raise _fail(str(error)) from None
    print(chosen)


@app.command()
def explain_matmul(
    shape: Annotated[str, typer.Option(help="m,n,k of (m, k) @ (k, n); swiglu makes n / 2 columns")],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32 or float64")] = "bfloat16",
    out_dtype: Annotated[str | None, typer.Option(help="float32, or as the inputs by default")] = None,
    activation: Annotated[str | None, typer.Option(help="gelu, silu or swiglu")] = None,
    bias: Annotated[bool, typer.Option(help="Add a bias.")] = False,
    weight: Annotated[bool, typer.Option(help="b is the transpose of a linear layer's (n, k) weight.")] = False,
    arch: Annotated[
        str | None, typer.Option(help="Plan for a GPU of this compute capability, such as 9.0, with all libraries.")
    ] = None,
) -> None:
    """Print the plan for a matrix product: backend, tile config and schedule. No tensor is made."""
    from dataclasses import replace

    import torch

    from flashcore.errors import FlashCoreError
    from flashcore.gemm import plan_gemm
    from flashcore.gemm_problem import GemmProblem

    m, n, k = _sizes(shape, "m,n,k")
    one = torch.empty(1, dtype=_dtype(dtype), device=_device(arch))
    try:
        problem = GemmProblem.from_tensors(
            one.expand(m, k), one.expand(k, n), out_dtype=_dtype(out_dtype, "--out-dtype") if out_dtype else None,
            bias=one.expand(n) if bias else None, activation=activation,
        )  # fmt: skip
    except FlashCoreError as error:
        raise _fail(str(error)) from None
    problem = replace(problem, b_mn_major=not weight)  # what an expanded element's strides do not say
    print(plan_gemm(_elsewhere(problem, arch), anywhere=arch is not None))


def _sizes(shape: str, names: str) -> list[int]:
    """The sizes of these names, as ``--shape`` gives them."""
    try:
        sizes = [int(part) for part in shape.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != len(names.split(",")) or min(sizes) < 0:
        raise _fail(f"--shape {shape!r} is not {names}")
    return sizes


def _dtype(name: str, option: str = "--dtype"):
    from flashcore.problem import DTYPES

    named = {name: kind for kind, name in DTYPES.items()}
    if name not in named:
        raise _fail(f"{option} {name!r} is not one of {', '.join(named)}")
    return named[name]


def _device(arch: str | None) -> str:
    """Where hypothetical tensors are: all their elements are one that exists."""
    import torch

    return "cuda" if arch is None and torch.cuda.is_available() else "cpu"


def _elsewhere(problem, arch: str | None):
    """The problem on a GPU of this compute capability, if one is given."""
    from dataclasses import replace

    if arch is None:
        return problem
    match = re.fullmatch(r"(\d+)\.(\d+)", arch)
    if match is None:
        raise _fail(f"--arch {arch!r} is not a compute capability such as 9.0")
    # 132 multiprocessors: the H100 SXM and the H200
    return replace(problem, device="cuda", arch=(int(match[1]), int(match[2])), sm_count=132)


def _problem(sizes, dtype, causal, scale, grad, lse, arch):
    """The problem of these sizes on this machine's device, or on a GPU of ``arch``. Checked as real tensors are."""
    from dataclasses import replace

    import torch

    from flashcore.problem import AttentionProblem

    batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim = sizes
    one = torch.empty(1, dtype=_dtype(dtype), device=_device(arch))
    q = one.expand(batch, seqlen_q, heads_q, head_dim)
    k = one.expand(batch, seqlen_k, heads_k, head_dim)
    problem = AttentionProblem.from_tensors(q, k, k, causal=causal, scale=scale, return_lse=lse)
    return _elsewhere(replace(problem, needs_grad=grad), arch)


# --- profile


@app.command()
def profile(
    suite: Annotated[str, typer.Option(help="The suite that --case chooses from.")] = "forward",
    case: Annotated[str | None, typer.Option(help="Cases whose name matches this regular expression.")] = None,
    shape: Annotated[str | None, typer.Option(help="batch,seqlen_q,seqlen_k,heads_q,heads_k,head_dim")] = None,
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
            _show(profiling.table(profiling.read(read.read_text())))
            return
        if impl not in PEERS:
            raise _fail(f"no such implementation: {impl} (there are: {', '.join(PEERS)})")
        cases = _profiled_cases(suite, case, shape, causal, dtype)
        found = profiling.find_ncu(ncu)
        if prepare:
            for one in cases:
                print(profiling.prepared(found, one, impl))
            return
        if reason := profiling.missing(found):
            raise _fail(
                f"cannot profile: {reason}. For another machine, --prepare prints the command, --read shows its log."
            )
        with _progress() as progress:
            task = progress.add_task("profile", total=len(cases), completed=-1)

            def on_case(name: str) -> None:
                progress.update(task, description=f"profile: {name}", advance=1)

            data = profiling.run(cases, impl, found, commit, on_case)
    except (EnvironmentProblem, OSError) as error:
        raise _fail(f"cannot profile: {error}") from None
    _show(profiling.table(data["rows"]))
    if out is not None or (case is None and shape is None and impl == "flashcore"):
        path = record.path_for(data, out or _default_results())
        record.write(data, path)
        _console().print(f"recorded in {path}")


def _profiled_cases(suite: str, pattern: str | None, shape: str | None, causal: bool, dtype: str) -> list:
    from flashcore.bench import profile as profiling
    from flashcore.bench.cases import SUITES, Case

    if shape is not None:
        batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim = _sizes(shape, _ATTENTION)
        return [Case(batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim, causal, dtype)]
    if pattern is None:
        return list(profiling.CASES)
    if suite not in SUITES:
        raise _fail(f"no such suite: {suite} (there are: {', '.join(SUITES)})")
    if SUITES[suite].mode == "e2e":
        raise _fail("suite e2e has whole models; profile one of their layers by its shape")
    if SUITES[suite].op == "attention_bwd":
        raise _fail("suite backward cannot be profiled: only forward passes can, yet")
    if not (found := [one for one in SUITES[suite].cases if re.search(pattern, one.name)]):
        raise _fail(f"no case of suite {suite} matches {pattern!r}; flashcore bench --list shows them")
    return found


# --- report


@app.command()
def report(
    update: Annotated[bool, typer.Option("--update", help="Rewrite the documents' tables and plots.")] = False,
) -> None:
    """Say which records there are, whether the kernels have changed since, and whether the documents show them.

    Exits with 1 if a document does not show what the records say.
    """
    from flashcore.bench import record
    from flashcore.bench.report import Documents, not_recorded

    documents = Documents()
    if not (documents.root / "README.md").exists():
        raise _fail("report works on a clone: there is no README.md beside this package")
    console = _console()
    for gpu, suites in documents.results.items():
        for name, data in suites.items():
            meta = data["meta"]
            current = meta["kernel_digest"] == record.kernel_digest(name)
            state = "current" if current else "the kernel sources have changed since"
            failed = sum("failed" in row for row in data["rows"])
            console.print(
                f"{gpu}/{name}: {meta['date']}, commit {(meta['commit'] or 'unknown')[:12]}, {len(data['rows'])} rows"
                f"{f', {failed} failed' if failed else ''}: {state}",
                markup=False,
            )
        for name in not_recorded(suites):
            console.print(f"{gpu}/{name}: not recorded", markup=False)
    if not documents.results:
        console.print("no records yet: flashcore bench --suite forward makes one")
    if update:
        if documents.results:
            _need_matplotlib()
        for path in documents.update():
            console.print(f"wrote {path.relative_to(documents.root)}")
    stale = documents.stale()
    for path in stale:
        console.print(f"out of date: {path.relative_to(documents.root)}", style="red")
    raise typer.Exit(1 if stale else 0)

