"""``flashcore compile``: kernels into the disk cache, ahead of their first use."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Annotated, Any

import typer
from rich.table import Table

from flashcore.cli.console import console, fail, progress


def compile_kernels(
    head_dim: Annotated[list[int] | None, typer.Option(min=1, help="Only attention kernels for this head_dim.")] = None,
    all_kernels: Annotated[bool, typer.Option("--all", help="Every declared kernel (the default).")] = False,
    arch: Annotated[str, typer.Option(help="Architecture to compile for.")] = "sm_90a",
    jobs: Annotated[int | None, typer.Option(min=1, help="Threads; as many as there are CPUs by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compile kernels into the disk cache ahead of their first use. Needs NVRTC, but no GPU and no driver."""
    if reason := nvrtc_missing():
        raise fail(f"cannot compile: {reason}")
    from flashcore import env
    from flashcore.backends.hopper import jit

    if arch != jit.ARCH:
        raise fail(f"no kernels for {arch} (there are kernels for {jit.ARCH})")
    if all_kernels and head_dim:
        raise fail("--all and --head-dim contradict each other")
    env.cache_enabled()  # a switch that is none is refused even where no kernel asks the disk
    kernels = compile_all(declared(head_dim), jobs)
    if as_json:
        print(json.dumps(kernels, indent=1))
    else:
        show_kernels(kernels)
        console().print(f"cache: {where_kept()}", markup=False)


def where_kept() -> str:
    from flashcore import disk

    cache = disk.facts()
    if cache["enabled"] and cache["writable"] and not cache["problem"]:
        return cache["path"]
    return f"nothing was kept on disk: {cache['problem'] or 'it is off or not writable'}"


def nvrtc_missing() -> str | None:
    try:
        from flashcore.backends.hopper import jit

        jit.nvrtc_version()
    except Exception as error:  # a missing library shows itself as any of several types
        return f"NVRTC is not usable ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return None


def declared(head_dims: Sequence[int] | None) -> list[tuple[str, Any]]:
    """Name and config of every kernel, or of those that serve these head_dims."""
    from flashcore.backends.hopper import kernels

    if missing := [d for d in head_dims or () if not kernels.declared([d])]:
        raise fail(f"no kernel serves head_dim {', '.join(map(str, sorted(missing)))}")
    return kernels.declared(head_dims)


def compile_all(kernels: Sequence[tuple[str, Any]], jobs: int | None) -> list[dict]:
    """Compile in threads, which NVRTC runs side by side. One dict per kernel, in the order given."""
    from flashcore.backends.hopper import jit
    from flashcore.errors import CompileError

    done: dict[str, dict] = {}
    with progress() as bar, ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        task = bar.add_task("compiling", total=len(kernels))
        futures = {pool.submit(jit.compile_kernel, config): name for name, config in kernels}
        for future in as_completed(futures):
            name = futures[future]
            try:
                kernel = future.result()
            except CompileError as error:
                pool.shutdown(cancel_futures=True)
                raise fail(f"{name}: {error}") from None
            done[name] = {
                "kernel": name,
                "seconds": round(kernel.seconds, 3),
                "from_cache": kernel.from_cache,
                "registers": kernel.registers,
                "spill_bytes": kernel.spill_bytes,
                "smem_bytes": kernel.smem_bytes,
                "warnings": list(kernel.warnings),
            }
            bar.update(task, advance=1, description=f"compiled {name}")
    return [done[name] for name, _ in kernels]


def show_kernels(kernels: Sequence[dict]) -> None:
    table = Table(title="kernels", title_justify="left", title_style="bold")
    for header in ("kernel", "source", "seconds", "registers", "spilled bytes", "shared memory, bytes", "warnings"):
        table.add_column(header, justify="left" if header in ("kernel", "source") else "right")
    for kernel in kernels:
        source = f"{kernel['from_cache']} cache" if kernel["from_cache"] else "compiled"
        numbers = (kernel["registers"], kernel["spill_bytes"], kernel["smem_bytes"], len(kernel["warnings"]))
        table.add_row(kernel["kernel"], source, f"{kernel['seconds']:.2f}", *map(str, numbers))
    console().print(table)
