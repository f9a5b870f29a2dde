"""Find the fastest tiles on the GPU at hand: ``python -m flashcore.backends.triton.tune --help``.

Candidates are first compiled and checked, in several processes at once (each ends up in Triton's cache on disk): on a
small problem against float64; and on one that gives every SM several tiles, against FlashAttention-2 and, bit for bit,
against their own repetitions. Only those that are right are then timed, one after the other, what matters most first,
until the time is up. (Decoding, small grids and the host's time depend on more than a tile: ``flashcore bench`` has
suites for them.) ``--json`` keeps everything, with the winners by kind of problem and class of lengths; ``--rows``
makes rows of the built-in table from such a file; ``--install`` writes the winners to the user's own table, which
`configure` prefers.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashcore import env
from flashcore.backends import reference, torch_flash
from flashcore.backends import triton as backend
from flashcore.backends.triton import attention
from flashcore.backends.triton.compile import compile_kernel
from flashcore.backends.triton.configs import (
    TABLES,
    Tile,
    TritonConfig,
    choose,
    user_key,
    write_user_table,
)
from flashcore.mask import CAUSAL, FULL
from flashcore.problem import AttentionProblem

MATMULS = {"forward": 2, "dq": 3, "dkdv": 4, "dk": 3, "dv": 2}  # of each kernel, 2 FLOP per multiply-add
SEQLENS = (2048, 16384, 512, 1024, 4096, 8192)  # in this order
# Of lengths, both ends included.
CLASSES = {"short": (0, 1024), "middle": (2048, 4096), "long": (8192, math.inf)}
WORTH_A_ROW = 1.03  # how much faster a tile must be in one class to have a row there
DEVICE = "cuda"
REPEATS = 10  # of a candidate under stress
TOKENS = 16384
WIDTH = 2048  # heads x head_dim


@dataclass(frozen=True)
class Job:
    """One candidate for one kind of problem."""

    kernel: str
    head_dim: int
    causal: bool
    tile: Tile

    @property
    def group(self) -> tuple[str, int, bool]:
        return self.kernel, self.head_dim, self.causal


def short(tile: Tile) -> str:
    """128x64 w8 s3 LTQR128: tile, warps, stages, and L(ookahead), T(MA), Q (in registers), R(egisters at most)."""
    on = (tile.lookahead, tile.tma, tile.q_registers)
    flags = "".join(letter for letter, flag in zip("LTQ", on, strict=True) if flag)
    flags += f"R{tile.registers}" if tile.registers else ""
    return f"{tile.tile_m}x{tile.tile_n} w{tile.warps} s{tile.stages} {flags}".strip()


def parsed(text: str) -> Tile:
    """The tile that `short` wrote like this."""
    m, n, warps, stages, flags, registers = re.fullmatch(
        r"(\d+)x(\d+) w(\d+) s(\d+) ?([LTQ]*)(?:R(\d+))?", text
    ).groups()
    on = ("L" in flags, "T" in flags, "Q" in flags)
    return Tile(int(m), int(n), int(warps), int(stages), *on, int(registers) if registers else None)


def _tiles(text: str) -> list[Tile]:
    return [parsed(one.strip()) for one in text.split(",")]


# By what docs/log/0013 and 0016 found, and where they say nothing by registers and shared memory as `compile.resources`
# reports them for sm_90: none spills much. One stage means one buffer: programs of 64 rows then fit an SM in twos and
# threes, and fill each other's waits for memory.
HOPPER = {
    ("forward", 64): _tiles(
        "64x128 w4 s2 T, 128x64 w8 s3 T, 64x64 w4 s3 LT, 64x128 w4 s2 LT, 64x64 w4 s2 T, 64x128 w4 s1 T, "
        "64x128 w4 s1 TR128, 64x256 w4 s1 T, 64x64 w4 s1 T, 128x128 w8 s1 TR128"
    ),
    ("forward", 128): _tiles(
        "64x64 w4 s2 LT, 64x128 w4 s1 T, 64x128 w4 s1 TR168, 64x64 w4 s1 TR128, 64x32 w4 s3 LT, 64x256 w4 s1 T, "
        "128x128 w8 s2 LT, 64x64 w4 s3 T"
    ),
    ("forward", 256): _tiles(
        "128x64 w8 s2 LT, 128x64 w8 s2 T, 64x32 w4 s2 LT, 64x128 w4 s1 T, 128x128 w8 s1 T"
    ),
    ("dq", 64): _tiles(
        "128x64 w8 s3 T, 64x64 w4 s3 T, 64x64 w4 s2 T, 128x64 w8 s4 T, 64x64 w4 s1 T, 64x128 w4 s1 T"
    ),
    ("dq", 128): _tiles("64x64 w4 s2 T, 128x64 w8 s3 T, 64x64 w4 s1 TR168, 64x128 w4 s1 T, 64x32 w4 s3 T"),
    ("dq", 256): _tiles("128x32 w8 s3 T, 64x64 w4 s2 T, 64x32 w4 s3 T, 128x16 w8 s6 T"),
    ("dkdv", 64): _tiles(
        "64x64 w4 s3 TR168, 64x64 w4 s4 T, 64x64 w4 s3 T, 64x64 w4 s4 TR168, 32x64 w4 s3 T, 32x64 w4 s4 T, "
        "64x64 w4 s1 TR168"
    ),
    ("dkdv", 128): _tiles("64x64 w4 s2 T, 32x64 w4 s3 T, 32x64 w4 s4 T, 32x64 w4 s3 LT"),
    ("dkdv", 256): _tiles("64x64 w8 s2 T"),
    ("dk", 256): _tiles("32x128 w8 s3 T, 64x64 w4 s2 T, 32x64 w4 s3 T, 16x128 w8 s6 T"),
    ("dv", 256): _tiles("64x128 w8 s2 LT, 64x128 w8 s2 T, 32x128 w8 s3 LT, 32x128 w8 s4 LT, 32x64 w4 s2 T"),
}


def candidates(kernel: str, head_dim: int, arch: tuple[int, int]) -> list[Tile]:
    """What to try: a list of its own for Hopper; elsewhere every tile that some table has, deeper and shallower too."""
    if arch == (9, 0):
        return HOPPER.get((kernel, head_dim), [])
    rows = {
        row.tile
        for table in TABLES.values()
        for row in table
        if (row.kernel, row.head_dim) == (kernel, head_dim)
    }
    plain = {
        replace(tile, lookahead=False, tma=tile.tma and arch >= (9, 0)) for tile in rows if tile.tile_m > 16
    }
    return sorted(
        {replace(tile, stages=stages) for tile in plain for stages in (tile.stages, tile.stages + 1)},
        key=short,
    )


def problem_for(
    head_dim: int, causal: bool, batch: int, seqlen: int, heads: int, heads_k: int
) -> AttentionProblem:
    properties = torch.cuda.get_device_properties(0)
    return AttentionProblem(
        "bfloat16", "cuda", (properties.major, properties.minor), properties.multi_processor_count, batch, seqlen,
        seqlen, heads, heads_k, head_dim, head_dim, CAUSAL if causal else FULL, head_dim**-0.5, needs_grad=True,
    )  # fmt: skip


class Tensors:
    """Everything that the kernels of one problem read and write, N(0, 1) and allocated once."""

    def __init__(self, problem: AttentionProblem):
        dtype = getattr(torch, problem.dtype)
        self.problem = problem
        self.q, self.k, self.v, self.dout = (
            torch.randn(shape, device=DEVICE).to(dtype)
            for shape in (problem.q_shape, problem.k_shape, problem.v_shape, problem.out_shape)
        )
        self.config = choose(problem)
        self.out, self.lse = attention.forward(problem, self.config, self.q, self.k, self.v)

    def with_tile(self, kernel: str, tile: Tile) -> TritonConfig:
        if kernel == "forward":
            return replace(self.config, forward=tile, splits=1)
        if kernel == "dkdv":
            return replace(self.config, dkdv=tile, dv=None)
        return replace(self.config, **{{"dq": "dq", "dk": "dkdv", "dv": "dv"}[kernel]: tile})

    def call(self, kernel: str, tile: Tile) -> Callable[[], object]:
        """A launch of one kernel with one tile. For dK and dV the row statistics are there already."""
        config = self.with_tile(kernel, tile)
        problem, q, k, v, out, lse, dout = (
            self.problem, self.q, self.k, self.v, self.out, self.lse, self.dout,
        )  # fmt: skip
        if kernel == "forward":
            return partial(attention.prepare_forward(problem, config), q, k, v, problem.scale)
        align = attention.alignment(config)
        stats = torch.empty(attention.stats_shape_of(problem, config), dtype=torch.float32, device=DEVICE)
        dq = torch.empty_like(q)
        launch = attention.prepare_dq(problem, config.dq, align)
        fill = partial(launch, q, k, v, out, dout, lse, lse, stats, dq, problem.scale)
        if kernel == "dq":
            return fill
        fill()
        launch = attention.prepare_dkdv(problem, tile, align, config.dq, dk=kernel != "dv", dv=kernel != "dk")
        return partial(launch, q, k, v, dout, stats, torch.empty_like(k), torch.empty_like(v), problem.scale)


# --- is a candidate right?


def check(job: Job) -> str | None:
    """Compile a candidate and compare it with float64 and with itself; None if it is right, else what is wrong."""
    try:
        torch.manual_seed(0)
        return _against_float64(job) or _under_stress(job)
    except Exception as error:  # any candidate may fail to compile; the others go on
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:160]}"


def _results(job: Job, tensors: Tensors) -> dict[str, torch.Tensor]:
    """What the candidate computes, written over NaN."""
    problem, config = tensors.problem, tensors.with_tile(job.kernel, job.tile)
    inputs = tensors.q, tensors.k, tensors.v
    with _poisoned():
        if job.kernel == "forward":
            return dict(zip(("out", "lse"), attention.forward(problem, config, *inputs), strict=True))
        grads = attention.backward(problem, config, *inputs, tensors.out, tensors.lse, tensors.dout)
    return dict(zip(("dq", "dk", "dv"), grads, strict=True))


def _poisoned() -> AbstractContextManager:
    """Make ``torch.empty`` return NaN: what a kernel leaves out shows."""
    empty = torch.empty
    return mock.patch.object(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(math.nan))


def _against_float64(job: Job) -> str | None:
    """A small problem, with tiles that end beyond it."""
    tensors = Tensors(problem_for(job.head_dim, job.causal, 2, 333, 4, 4))
    exact, rounded = (
        _by_reference(tensors.problem, dtype, tensors.q, tensors.k, tensors.v, tensors.dout)
        for dtype in (torch.float64, None)
    )
    for name, result in _results(job, tensors).items():
        if name == "lse":
            continue
        error = (result.double() - exact[name]).norm() / exact[name].norm()
        allowed = 3 * (rounded[name].double() - exact[name]).norm() / exact[name].norm() + 1e-4
        if not error <= allowed:
            return f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"
    return None


def _under_stress(job: Job) -> str | None:
    """Several tiles per SM, side by side and under each other's memory traffic; the same bits each time.

    What depends on timing shows here, and hardly on small problems (docs/log/0009). Tiles end beyond the problem.
    """
    heads = WIDTH // job.head_dim
    tensors = Tensors(problem_for(job.head_dim, job.causal, 4, 2047, heads, heads))
    first = _results(job, tensors)
    other_bits = 0
    for _ in range(REPEATS - 1):
        again = _results(job, tensors)
        other_bits += not all(torch.equal(first[name], again[name]) for name in first)
    if other_bits:  # or NaN, which is equal to nothing
        return f"other bits in {other_bits} of {REPEATS - 1} repetitions"
    flash = _flash_attention_2(tensors)
    if job.kernel == "forward":
        expected = {"out": flash["forward"]().transpose(1, 2)}
    else:
        expected = dict(zip(("dq", "dk", "dv"), flash["backward"](), strict=True))
    for name, other in expected.items():
        rows = other.float().norm(dim=-1)
        error = ((first[name].float() - other.float()).norm(dim=-1) / (rows + 0.2 * rows.max())).max().item()
        if not error <= 0.1:
            return f"{name}: a row is off by {error:.2f}"
    return None


def _by_reference(
    problem: AttentionProblem, dtype: torch.dtype | None, q, k, v, dout
) -> dict[str, torch.Tensor]:
    """Output and gradients by the reference backend, computed in `dtype`; None: in bfloat16, unfused."""
    dtype = dtype or q.dtype
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in (q, k, v))
    if dtype is torch.float64:
        out, _ = reference.forward(replace(problem, dtype="float64"), None, q, k, v)
    else:
        out = torch.nn.functional.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), is_causal=problem.causal
        ).transpose(1, 2)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout.to(dtype))
    return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}


def checked(check: Callable, jobs: list, pool: Executor) -> tuple[list, dict]:
    """The jobs that are right, and what is wrong with the others."""
    verdicts = dict(zip(jobs, pool.map(check, jobs), strict=True))
    return [job for job in jobs if verdicts[job] is None], {job: why for job, why in verdicts.items() if why}


# --- how fast is it?


def milliseconds(call: Callable[[], object], rep: float = 40) -> float:
    """Median device time, L2 flushed before each call."""
    return triton.testing.do_bench(call, warmup=10, rep=rep, return_mode="median")


def time_jobs(jobs: list[Job], seqlens: Sequence[int], deadline: float) -> Iterator[dict]:
    """A record per job and length, as long as there is time; and PyTorch's FlashAttention-2."""
    groups = defaultdict(list)
    for job in jobs:
        groups[job.group[1:]].append(job)
    for seqlen in seqlens:
        for (head_dim, causal), members in groups.items():
            if time.monotonic() > deadline:
                return
            heads = WIDTH // head_dim
            problem = problem_for(head_dim, causal, TOKENS // seqlen, seqlen, heads, heads)
            tensors = Tensors(problem)
            flops = 2 * problem.batch * heads * seqlen**2 * head_dim / (2 if causal else 1)  # of one product
            calls = [
                (direction, "fa2", 2 if direction == "forward" else 5, call)
                for direction, call in _flash_attention_2(tensors).items()
            ]
            calls += [
                (job.kernel, short(job.tile), MATMULS[job.kernel], tensors.call(job.kernel, job.tile))
                for job in members
            ]
            for kernel, tile, products, call in calls:
                ms = milliseconds(call)
                yield {
                    "kernel": kernel, "head_dim": head_dim, "causal": causal, "seqlen": seqlen, "tile": tile,
                    "ms": ms, "tflops": products * flops / ms / 1e9,
                }  # fmt: skip


def _flash_attention_2(t: Tensors) -> dict[str, Callable[[], object]]:
    q, k, v = (x.transpose(1, 2) for x in (t.q, t.k, t.v))

    def forward():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=t.problem.causal)

    return {
        "forward": forward,
        "backward": partial(torch_flash.backward, t.problem, None, t.q, t.k, t.v, t.out, t.lse, t.dout, None),
    }


# --- the report


Rates = dict[str, dict[tuple[bool, int], float]]  # tile -> (causal, seqlen) -> TFLOP/s


def rates(records: list[dict]) -> dict[tuple[str, int], Rates]:
    """By kernel and head_dim."""
    found: dict[tuple[str, int], Rates] = defaultdict(lambda: defaultdict(dict))
    for r in records:
        found[r["kernel"], r["head_dim"]][r["tile"]][r["causal"], r["seqlen"]] = r["tflops"]
    return found


def ranked(tiles: Rates, kinds: Iterable[tuple[bool, int]]) -> list[tuple[float, str]]:
    """(geometric mean of the rates over these kinds of problem, tile), best first; tiles timed in all of them."""
    kinds = list(kinds)
    means = [
        (math.exp(sum(math.log(by_kind[kind]) for kind in kinds) / len(kinds)), tile)
        for tile, by_kind in tiles.items()
        if tile != "fa2" and kinds and all(kind in by_kind for kind in kinds)
    ]
    return sorted(means, reverse=True)


def kinds_timed(tiles: Rates) -> list[tuple[bool, int]]:
    return sorted({kind for by_kind in tiles.values() for kind in by_kind})


def winners(records: list[dict]) -> list[dict]:
    """The fastest tile of each kernel by head_dim, mask and class of lengths, and its rate over the second's."""
    found = []
    for (kernel, head_dim), tiles in sorted(rates(records).items()):
        for causal in (False, True):
            for name, (least, most) in CLASSES.items():
                kinds = [k for k in kinds_timed(tiles) if k[0] == causal and least <= k[1] <= most]
                best = ranked(tiles, kinds)
                if best:
                    found.append({
                        "kernel": kernel, "head_dim": head_dim, "causal": causal, "lengths": name,
                        "tile": best[0][1], "tflops": best[0][0],
                        "over_second": best[0][0] / best[1][0] if len(best) > 1 else None,
                    })  # fmt: skip
    return found


def against_fa2(records: list[dict]) -> list[dict]:
    """Per shape, how many times FlashAttention-2's time the fastest tiles take, and which: dV together or apart."""
    best: dict[tuple, tuple[float, str]] = {}
    for r in records:
        key = (r["head_dim"], r["causal"], r["seqlen"], r["kernel"], r["tile"] == "fa2")
        best[key] = min(best.get(key, (math.inf, "")), (r["ms"], r["tile"]))
    found = []
    for shape in sorted({key[:3] for key in best}):

        def ms(kernel: str, fa2: bool = False, shape: tuple = shape) -> float:
            return best.get((*shape, kernel, fa2), (math.inf, ""))[0]

        apart = ms("dk") + ms("dv")
        found.append({
            "head_dim": shape[0], "causal": shape[1], "seqlen": shape[2],
            "forward": ms("forward", True) / ms("forward"),
            "backward": ms("backward", True) / (ms("dq") + min(ms("dkdv"), apart)),
            "dv": "apart" if apart < ms("dkdv") else "with dk",
        })  # fmt: skip
    return found


def report(records: list[dict], most: int = 4) -> str:
    """The best candidates per kind of problem, and how they compare with FlashAttention-2."""
    lines = []
    for (kernel, head_dim), tiles in sorted(rates(records).items()):
        for causal in (False, True):
            kinds = [k for k in kinds_timed(tiles) if k[0] == causal]
            lengths = [length for _, length in kinds]
            lines.append(f"{kernel} d{head_dim} {'causal' if causal else 'full'}, TFLOP/s at S = {lengths}")
            shown = [tile for _, tile in ranked(tiles, kinds)[:most]] + ["fa2"] * ("fa2" in tiles)
            lines += [
                f"  {t:<22}" + "".join(f"{tiles[t].get(k, math.nan):7.0f}" for k in kinds) for t in shown
            ]
    lines.append("time of fa2 over that of the fastest tiles: forward, backward")
    for r in against_fa2(records):
        mask = "causal" if r["causal"] else "full  "
        shape = f"  d{r['head_dim']:<4}{mask} S={r['seqlen']:<6}"
        lines.append(f"{shape} {r['forward']:.2f} {r['backward']:.2f} dv {r['dv']}")
    return "\n".join(lines)


def table_rows(records: list[dict]) -> str:
    """Rows for `configs.TABLES`: the best tile over all masks and lengths; in comments what is faster in one class."""
    lines = []
    found = rates(records)
    for (kernel, head_dim), tiles in sorted(found.items()):
        kinds = kinds_timed(tiles)
        best = ranked(tiles, kinds)
        if not best:
            continue
        tile = parsed(best[0][1])
        flags = "".join(
            f", {name}=True" for name in ("lookahead", "tma", "q_registers") if getattr(tile, name)
        )
        flags += f", registers={tile.registers}" if tile.registers else ""
        built = f"Tile({tile.tile_m}, {tile.tile_n}, {tile.warps}, {tile.stages}{flags})"
        row_kernel = "dkdv" if kernel == "dk" else kernel
        comment = f"  # {best[0][0]:.0f} TFLOP/s" + (
            f", next {best[1][1]} {best[1][0]:.0f}" if best[1:] else ""
        )
        lines.append(
            f'Row("{row_kernel}", {head_dim}, _16bit, {built}, {_kib(kernel, head_dim, tile)}, "..."),{comment}'
        )
        for r in winners([r for r in records if (r["kernel"], r["head_dim"]) == (kernel, head_dim)]):
            least, most = CLASSES[r["lengths"]]
            here = [k for k in kinds if k[0] == r["causal"] and least <= k[1] <= most]
            gain = r["tflops"] / dict((t, rate) for rate, t in ranked(tiles, here))[best[0][1]]
            if gain > WORTH_A_ROW:
                mask = "causal" if r["causal"] else "full"
                lines.append(
                    f"#   {mask}, {r['lengths']} ({least} to {most}): {r['tile']} is {gain:.3f} times as fast"
                )
    for head_dim in sorted({d for kernel, d in found if kernel == "dk"}):
        apart = [r for r in against_fa2(records) if r["head_dim"] == head_dim and r["dv"] == "apart"]
        shapes = [r for r in against_fa2(records) if r["head_dim"] == head_dim]
        lines.append(
            f"# head_dim {head_dim}: dk and dv apart are faster than dkdv in {len(apart)} of {len(shapes)} shapes"
        )
    return "\n".join(lines)


def _kib(kernel: str, head_dim: int, tile: Tile) -> int:
    """Shared memory of a program for sm_90; compiles it, which takes no GPU."""
    problem = AttentionProblem(
        "bfloat16", "cuda", (9, 0), 132, 2, 2048, 2048, 4, 4, head_dim, head_dim, CAUSAL,
        head_dim**-0.5,
    )
    return math.ceil(compile_kernel(kernel, problem, tile, (9, 0)).metadata.shared / 1024)


def installed(records: list[dict]) -> dict[str, Tile | None]:
    """The tiles with the best geometric mean over the lengths, by user_key. dV apart where that is faster."""
    found: dict[str, Tile | None] = {}
    by_kernel = rates(records)
    for head_dim in sorted({head_dim for _, head_dim in by_kernel}):
        for causal in (False, True):
            best = {}
            for kernel in MATMULS:
                tiles = by_kernel.get((kernel, head_dim), {})
                order = ranked(tiles, [k for k in kinds_timed(tiles) if k[0] == causal])
                if order:
                    best[kernel] = order[0]
            problem = problem_for(head_dim, causal, 1, 1, 1, 1)
            for kernel in ("forward", "dq"):
                if kernel in best:
                    found[user_key(kernel, problem)] = parsed(best[kernel][1])

            def cost(*kernels: str, best: dict = best) -> float:
                return sum(MATMULS[k] / best[k][0] if k in best else math.inf for k in kernels)

            if cost("dk", "dv") < cost("dkdv"):
                found[user_key("dkdv", problem)] = parsed(best["dk"][1])
                found[user_key("dv", problem)] = parsed(best["dv"][1])
            elif "dkdv" in best:
                found[user_key("dkdv", problem)] = parsed(best["dkdv"][1])
                found[user_key("dv", problem)] = None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="flashcore.backends.triton.tune", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--seconds", type=float, default=150, help="stop timing this long after the start (default 150)"
    )
    parser.add_argument("--kernels", default=",".join(MATMULS), help=f"some of {','.join(MATMULS)}")
    parser.add_argument("--head-dims", default="256,128,64", help="some of 64,128,256, in this order")
    parser.add_argument(
        "--processes", type=int, default=min(14, os.cpu_count() or 1), help="that compile and check"
    )
    parser.add_argument("--json", type=Path, help="where to write all records and the winners")
    parser.add_argument(
        "--rows", type=Path, help="time nothing: print rows of the table from this --json file"
    )
    parser.add_argument(
        "--install", action="store_true", help="prefer the winners from now on, for this user"
    )
    arguments = parser.parse_args()
    if arguments.rows:
        document = json.loads(arguments.rows.read_text())
        print(report(document["rows"]))
        print(table_rows(document["rows"]))
        return
    if reason := backend.unavailable():
        raise SystemExit(f"nothing to tune: {reason}")

    start = time.monotonic()
    deadline = start + arguments.seconds
    arch = torch.cuda.get_device_capability()
    jobs = [
        Job(kernel, head_dim, causal, tile)
        for kernel in arguments.kernels.split(",")
        for head_dim in map(int, arguments.head_dims.split(","))
        for causal in (True, False)
        for tile in candidates(kernel, head_dim, arch)
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=context) as pool:
        right, wrong = checked(check, jobs, pool)
    print(f"{len(right)} of {len(jobs)} candidates compiled and right, in {time.monotonic() - start:.0f} s", flush=True)
    left_out = [
        f"{job.kernel} d{job.head_dim} causal={job.causal} {short(job.tile)}: {why}"
        for job, why in wrong.items()
    ]
    print("".join(f"  left out: {line}\n" for line in left_out), end="", flush=True)
    records = list(time_jobs(right, SEQLENS, deadline))
    if time.monotonic() > deadline:
        print("the time was up before everything was timed")
    if arguments.json:
        meta = {
            "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
            "seconds": time.monotonic() - start,
        }  # fmt: skip
        document = {
            "meta": meta, "winners": winners(records), "against_fa2": against_fa2(records), "left_out": left_out,
            "rows": records,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    print(report(records))
    if arguments.install:
        path = env.cache_dir() / backend.USER_TABLE
        try:
            write_user_table(path, installed(records))
        except OSError as error:
            raise SystemExit(f"not installed: {error}") from None
        print(f"written: {path}")


if __name__ == "__main__":
    main()
