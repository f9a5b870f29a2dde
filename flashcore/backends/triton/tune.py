"""Find the fastest tiles on the GPU at hand: ``python -m flashcore.backends.triton.tune --help``.

Candidates are first compiled and checked, in several processes at once (each ends up in Triton's cache on disk): on a
small problem against float64; and on one that gives every SM several tiles, against FlashAttention-2 and, bit for bit,
against their own repetitions. Only those that are right are then timed, one after the other, until the time is up.
``--install`` writes the winners to the user's own table, which `configure` prefers to the built-in one.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashcore import env, gradients
from flashcore.backends import reference
from flashcore.backends import triton as backend
from flashcore.backends.triton import attention
from flashcore.backends.triton.configs import (
    MAX_SPLITS,
    TABLES,
    Tile,
    TritonConfig,
    choose,
    choose_splits,
    user_key,
    write_user_table,
)
from flashcore.problem import AttentionProblem

KERNELS = ("forward", "dq", "dkdv")
MATMULS = {"forward": 2, "dq": 3, "dkdv": 4}  # that each kernel does, counted with 2 FLOP per multiply-add
SEQLENS = (512, 2048, 16384)
DEVICE = "cuda"
REPEATS = 10  # of a candidate under stress
TOKENS = 16384
WIDTH = 2048  # heads x head_dim
SMALL_SHAPES = ((1, 8, 512, 64), (8, 16, 512, 64), (1, 32, 1024, 128), (1, 16, 4096, 128))  # (B, H, S, D)
DECODE_SHAPES = ((8, 8192, 32, 8, 128), (1, 131072, 32, 8, 128), (1, 8192, 32, 8, 64))  # (B, Sk, H, Hk, D)


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


def _hopper(*tiles: tuple) -> list[Tile]:
    """Tiles as (tile_m, tile_n, warps, stages, flags), with the flags of `short`."""
    return [
        Tile(
            m, n, warps, stages, "L" in flags, "T" in flags, "Q" in flags, int(flags.partition("R")[2] or 0) or None
        )
        for m, n, warps, stages, flags in tiles
    ]  # fmt: skip


# By registers and shared memory as `compile.resources` reports them for sm_90: no candidate spills much. Those
# that a run found far behind (docs/log/0013) are left out. One stage means one buffer: programs of 64 rows then fit an
# SM in twos and threes, and fill each other's waits for memory.
HOPPER = {
    ("forward", 64): _hopper(
        (128, 64, 8, 3, "T"), (128, 64, 8, 3, "LTR128"), (64, 64, 4, 3, "LT"), (64, 128, 4, 2, "LT"),
        (64, 64, 4, 2, "T"), (64, 64, 4, 3, "T"), (64, 128, 4, 2, "T"), (128, 128, 8, 3, "T"),
    ),
    ("forward", 128): _hopper(
        (64, 64, 4, 2, "LT"), (128, 128, 8, 2, "LT"), (64, 64, 4, 2, "T"), (128, 64, 8, 3, "LTQ"),
        (64, 64, 4, 1, "T"), (64, 128, 4, 1, "T"), (64, 64, 4, 2, "LTR160"),
    ),
    ("forward", 256): _hopper(
        (128, 64, 8, 2, "LT"), (64, 32, 4, 2, "LT"), (128, 64, 8, 2, "T"), (64, 64, 4, 1, "T"),
    ),
    ("dq", 64): _hopper(
        (128, 64, 8, 3, "T"), (64, 64, 4, 3, "T"), (64, 64, 4, 2, "T"), (128, 64, 8, 4, "T"), (64, 128, 4, 2, "T"),
    ),
    ("dq", 128): _hopper(
        (64, 64, 4, 2, "T"), (128, 64, 8, 3, "T"), (64, 64, 4, 1, "T"), (64, 64, 4, 1, "TR168"), (64, 128, 4, 1, "T"),
        (128, 64, 8, 1, "T"),
    ),
    ("dq", 256): _hopper(
        (128, 32, 8, 2, "T"), (64, 32, 4, 1, "T"), (128, 64, 8, 1, "T"), (64, 64, 4, 2, "T"), (64, 64, 4, 1, "T"),
    ),
    ("dkdv", 64): _hopper(
        (64, 64, 4, 3, "T"), (64, 64, 4, 2, "T"), (64, 64, 4, 3, "TR168"), (64, 64, 4, 2, "TR168"), (32, 64, 4, 3, "T"),
        (64, 64, 4, 4, "T"), (64, 128, 8, 3, "T"),
    ),
    ("dkdv", 128): _hopper(
        (64, 64, 4, 2, "T"), (64, 64, 4, 1, "T"), (32, 64, 4, 3, "T"), (32, 64, 4, 2, "T"), (32, 64, 4, 3, "LT"),
        (32, 128, 8, 3, "T"), (64, 128, 8, 2, "LT"),
    ),
    ("dkdv", 256): _hopper(
        (64, 64, 8, 2, "T"), (64, 64, 8, 1, "T"), (32, 64, 8, 1, "T"), (32, 64, 8, 2, "LT"),
    ),
}  # fmt: skip


# 38 to 102 KiB of shared memory at head_dim 128: two to five programs per SM, 48 KiB or more on their way to it.
DECODE = [
    Tile(16, n, warps, stages, "L" in flags, "T" in flags)
    for n, warps, stages, flags in (
        (64, 4, 3, "T"), (128, 4, 2, "T"), (64, 2, 3, "T"), (64, 4, 2, "T"), (32, 2, 4, "T"), (64, 4, 4, "T"),
        (128, 8, 2, "T"), (64, 4, 3, "LT"), (64, 2, 2, "T"), (128, 4, 3, "T"), (64, 4, 3, ""), (32, 4, 4, ""),
    )
]  # fmt: skip
TRIALS = ("decode", "small", "gqa", "order")  # the first words of what a trial is called
PROGRAMS_PER_SM = (1, 2, 3, 4, 6, 8)  # that splits make of a decoding problem


def candidates(kernel: str, head_dim: int, arch: tuple[int, int]) -> list[Tile]:
    """What to try: a list of its own for Hopper; elsewhere every tile that some table has, deeper and shallower too."""
    if arch == (9, 0):
        return HOPPER[kernel, head_dim]
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
        seqlen, heads, heads_k, head_dim, head_dim, causal, head_dim**-0.5, needs_grad=True,
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
        config = replace(self.config, **{kernel: tile})
        return replace(config, splits=1) if kernel == "forward" else config

    def call(self, kernel: str, tile: Tile) -> Callable[[], object]:
        """A launch of one kernel with one tile. For dkdv the row statistics are there already."""
        config = self.with_tile(kernel, tile)
        q, k, v, out, lse, dout = self.q, self.k, self.v, self.out, self.lse, self.dout
        if kernel == "forward":
            return partial(attention.forward, self.problem, config, q, k, v)
        stats = attention.empty_stats(self.problem, config, q)
        dq = torch.empty_like(q)
        if kernel == "dq":
            return partial(attention.launch_dq, self.problem, tile, q, k, v, out, dout, lse, stats, dq)
        attention.launch_dq(self.problem, config.dq, q, k, v, out, dout, lse, stats, dq)
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        return partial(attention.launch_dkdv, self.problem, tile, q, k, v, dout, stats, dk, dv)


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


def graph_microseconds(call: Callable[[], object]) -> float:
    """Device time of one call inside a CUDA graph, L2 warm."""
    return 1e3 * triton.testing.do_bench_cudagraph(call, rep=5, return_mode="median")


def time_jobs(jobs: list[Job], seqlens: tuple[int, ...], deadline: float) -> Iterator[dict]:
    """A record per job and length, as long as there is time; and PyTorch's FlashAttention-2."""
    groups = defaultdict(list)
    for job in jobs:
        groups[job.group[1:]].append(job)
    for seqlen in sorted(seqlens, key=lambda s: s != 2048):
        for (head_dim, causal), members in groups.items():
            if time.monotonic() > deadline:
                return
            heads = WIDTH // head_dim
            problem = problem_for(head_dim, causal, TOKENS // seqlen, seqlen, heads, heads)
            tensors = Tensors(problem)
            flops = 2 * problem.batch * heads * seqlen**2 * head_dim / (2 if causal else 1)  # of one product
            common = {"head_dim": head_dim, "causal": causal, "seqlen": seqlen}
            for direction, call in _flash_attention_2(tensors).items():
                ms = milliseconds(call)
                products = 2 if direction == "forward" else 5
                yield common | {
                    "kernel": direction,
                    "tile": "fa2",
                    "ms": ms,
                    "tflops": products * flops / ms / 1e9,
                }
            for job in members:
                ms = milliseconds(tensors.call(job.kernel, job.tile))
                record = common | {"kernel": job.kernel, "tile": short(job.tile), "ms": ms}
                yield record | {"tflops": MATMULS[job.kernel] * flops / ms / 1e9}


def _flash_attention_2(t: Tensors) -> dict[str, Callable[[], object]]:
    return {
        "forward": _fa2_forward(t.problem, t.q, t.k, t.v),
        "backward": partial(gradients.torch_flash, t.problem, t.q, t.k, t.v, t.out, t.lse, t.dout),
    }


def _fa2_forward(problem: AttentionProblem, q, k, v) -> Callable[[], object]:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))

    def forward():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=problem.causal)

    return forward


@dataclass(frozen=True)
class Trial:
    """One way to compute one problem: the choices around the tile, on grids that do not fill the GPU."""

    what: str
    how: str
    problem: AttentionProblem
    config: TritonConfig
    graph: bool = False  # time it inside a CUDA graph

    def tensors(self) -> tuple[torch.Tensor, ...]:
        p = self.problem
        return tuple(torch.randn(s, device=DEVICE).bfloat16() for s in (p.q_shape, p.k_shape, p.v_shape))


def trials() -> list[Trial]:
    """Decoding, small grids, and the packing of grouped heads."""
    found = []
    for batch, seqlen, heads, heads_k, head_dim in DECODE_SHAPES:
        problem = replace(
            problem_for(head_dim, True, batch, seqlen, heads, heads_k), seqlen_q=1, needs_grad=False
        )
        what = f"decode {(batch, seqlen, heads, heads_k, head_dim)}"
        for tile in DECODE:
            chosen = choose_splits(batch * heads_k, math.ceil(seqlen / tile.tile_n), problem.sm_count, tile)
            full = {max(1, n * problem.sm_count // (batch * heads_k)) for n in PROGRAMS_PER_SM}
            for splits in sorted({min(MAX_SPLITS, splits) for splits in full | {chosen}}):
                config = replace(choose(problem), forward=tile, splits=splits, pack_gqa=True)
                how = f"{short(tile)} /{splits}" + (" (table)" if config == choose(problem) else "")
                found.append(Trial(what, how, problem, config, graph=True))
    for batch, heads, seqlen, head_dim in SMALL_SHAPES:
        for causal in (False, True):
            problem = problem_for(head_dim, causal, batch, seqlen, heads, heads)
            what = f"small {(batch, heads, seqlen, head_dim)} {'causal' if causal else 'full'}"
            tiles = [
                Tile(64, 64, 4, 3, tma=True),
                Tile(32, 64, 4, 3, tma=True),
                Tile(64, 128, 4, 2, tma=True),
            ]
            tiles += HOPPER["forward", head_dim][:10]
            for tile in dict.fromkeys(tiles):
                few = batch * heads * math.ceil(seqlen / tile.tile_m) < problem.sm_count
                for splits in (1, 2, 4) if few and tile.tile_m >= 64 else (1,):
                    config = replace(choose(problem), forward=tile, splits=splits)
                    found.append(Trial(what, f"{short(tile)} /{splits}", problem, config, graph=True))
    for head_dim in (64, 128):
        heads = WIDTH // head_dim
        for batch, seqlen in ((8, 2048), (1, 16384)):
            problem = problem_for(head_dim, True, batch, seqlen, heads, heads // 4)
            for pack in (False, True):
                config = replace(choose(problem), pack_gqa=pack)
                found.append(Trial(f"gqa 4:1 causal d{head_dim} s{seqlen}", f"pack={pack}", problem, config))
    return found


def check_trial(trial: Trial) -> str | None:
    """Compile and run a trial once; None if its output is that of the table's own config."""
    try:
        torch.manual_seed(0)
        inputs = trial.tensors()
        out, lse = attention.forward(trial.problem, trial.config, *inputs)
        plain = Tile(64, 64, 4, 2) if trial.problem.head_dim <= 64 else Tile(64, 32, 4, 2)
        config = replace(choose(trial.problem), forward=plain, splits=1, pack_gqa=False)
        expected, expected_lse = attention.forward(trial.problem, config, *inputs)
        error = (out.double() - expected.double()).norm() / expected.double().norm()
        lse_error = (lse - expected_lse).abs().max()
        if not (error < 1e-2 and lse_error < 1e-3):
            return f"relative error {error:.2e}, lse {lse_error:.2e}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:160]}"
    return None


def time_trials(trials: list[Trial], deadline: float) -> Iterator[dict]:
    """A record per trial, as long as there is time; FlashAttention-2 beside those in a CUDA graph."""
    seen = set()
    for trial in trials:
        if time.monotonic() > deadline:
            return
        problem = trial.problem
        q, k, v = trial.tensors()
        call = partial(attention.forward, problem, trial.config, q, k, v)
        record = {"what": trial.what, "how": trial.how}
        if trial.graph and problem.seqlen_q == problem.seqlen_k and trial.what not in seen:
            seen.add(trial.what)
            yield {"what": trial.what, "how": "fa2", "us": graph_microseconds(_fa2_forward(problem, q, k, v))}
        us = graph_microseconds(call) if trial.graph else 1e3 * milliseconds(call)
        yield record | {"us": us, "tbps": 2 * k.numel() * k.element_size() / us / 1e6}


def time_order_and_host(deadline: float) -> Iterator[dict]:
    """The order of heads, with the table's tiles, and the host's time per call."""
    by_table = attention.heads_per_section
    for head_dim in (64, 128):
        for batch, seqlen in ((8, 2048), (1, 16384)):
            if time.monotonic() > deadline:
                return
            tensors = Tensors(
                problem_for(head_dim, True, batch, seqlen, WIDTH // head_dim, WIDTH // head_dim)
            )
            for section in ("L2", 1):
                attention.heads_per_section = by_table if section == "L2" else lambda problem, heads: 1
                for kernel in KERNELS:
                    us = 1e3 * milliseconds(tensors.call(kernel, getattr(tensors.config, kernel)))
                    yield {
                        "what": f"{kernel} causal d{head_dim} s{seqlen}",
                        "how": f"section={section}",
                        "us": us,
                    }
            attention.heads_per_section = by_table
    tensors = Tensors(problem_for(64, False, 1, 64, 2, 2))
    for name, tma in (("TMA", True), ("pointers", False)):
        config = tensors.with_tile("forward", Tile(64, 64, 4, 2, tma=tma))
        call = partial(backend.forward, tensors.problem, config, tensors.q, tensors.k, tensors.v)
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(300):
            call()
        yield {"what": "host time per call", "how": name, "us": (time.perf_counter() - start) / 300 * 1e6}
        torch.cuda.synchronize()


# --- the report


def report(records: list[dict], small: list[dict], most: int = 4) -> str:
    """The best candidates per kind of problem, and how their sum compares with FlashAttention-2."""
    lines = []
    seqlens = sorted({r["seqlen"] for r in records})
    times = defaultdict(dict)  # (kernel, head_dim, causal) -> tile -> seqlen -> record
    for r in records:
        times[r["kernel"], r["head_dim"], r["causal"]].setdefault(r["tile"], {})[r["seqlen"]] = r
    for (kernel, head_dim, causal), tiles in sorted(times.items()):
        lines.append(
            f"{kernel} d{head_dim} {'causal' if causal else 'full'}, TFLOP/s at S = {', '.join(map(str, seqlens))}"
        )
        ranked = sorted(tiles.items(), key=lambda item: -_mean(item[1]))
        shown = [item for item in ranked if item[0] != "fa2"][:most] + [
            item for item in ranked if item[0] == "fa2"
        ]
        for tile, by_seqlen in shown:
            cells = "".join(
                f"{by_seqlen[s]['tflops']:7.0f}" if s in by_seqlen else "      -" for s in seqlens
            )
            lines.append(f"  {tile:<22}{cells}")
    lines.append("fastest tiles of each length against fa2: forward, backward (dq + dkdv)")
    for head_dim in sorted({r["head_dim"] for r in records}):
        for causal in (False, True):
            cells = []
            for seqlen in seqlens:
                best = {k: _fastest(times[k, head_dim, causal], seqlen) for k in KERNELS}
                fa2 = {
                    k: times[k, head_dim, causal].get("fa2", {}).get(seqlen, {}).get("ms")
                    for k in ("forward", "backward")
                }
                forward = fa2["forward"] / best["forward"] if fa2["forward"] and best["forward"] else math.nan
                both = best["dq"] and best["dkdv"] and best["dq"] + best["dkdv"]
                backward = fa2["backward"] / both if fa2["backward"] and both else math.nan
                cells.append(f"S={seqlen} {forward:.2f} {backward:.2f}")
            lines.append(f"  d{head_dim} {'causal' if causal else 'full  '}  " + "   ".join(cells))
    by_what = defaultdict(list)
    for r in small:
        by_what[r["what"]].append(r)
    for what, tried in by_what.items():
        tried.sort(key=lambda r: r["us"])
        shown = tried[:5] + [r for r in tried[5:] if r["how"] == "fa2" or "table" in r["how"]]
        cells = (
            f"{r['how']} {r['us']:.1f} us" + (f" {r['tbps']:.2f} TB/s" if "tbps" in r else "") for r in shown
        )
        lines.append(f"{what}: " + " | ".join(cells))
    return "\n".join(lines)


def _mean(by_seqlen: dict[int, dict]) -> float:
    return math.exp(sum(math.log(r["tflops"]) for r in by_seqlen.values()) / len(by_seqlen))


def _fastest(tiles: dict[str, dict[int, dict]], seqlen: int) -> float | None:
    return min(
        (by[seqlen]["ms"] for tile, by in tiles.items() if tile != "fa2" and seqlen in by), default=None
    )


def winners(jobs: list[Job], records: list[dict]) -> dict[str, Tile]:
    """The tile with the best geometric mean over the lengths, by user_key."""
    rates = defaultdict(dict)
    for r in records:
        rates[r["kernel"], r["head_dim"], r["causal"], r["tile"]][r["seqlen"]] = r
    best: dict[tuple, tuple[float, Tile]] = {}
    for job in jobs:
        measured = rates.get((*job.group, short(job.tile)))
        if measured and _mean(measured) > best.get(job.group, (0.0,))[0]:
            best[job.group] = _mean(measured), job.tile
    return {
        user_key(kernel, problem_for(head_dim, causal, 1, 1, 1, 1)): tile
        for (kernel, head_dim, causal), (_, tile) in best.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="flashcore.backends.triton.tune", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--seconds", type=float, default=140, help="stop timing this long after the start (default 140)"
    )
    parser.add_argument("--kernels", default=",".join(KERNELS), help="some of forward,dq,dkdv")
    parser.add_argument("--head-dims", default="256,128,64", help="some of 64,128,256, in this order")
    parser.add_argument(
        "--seqlens", default=",".join(map(str, SEQLENS)), help=f"that divide {TOKENS} (default %(default)s)"
    )
    parser.add_argument(
        "--processes", type=int, default=min(14, os.cpu_count() or 1), help="that compile and check"
    )
    parser.add_argument("--json", type=Path, help="where to write all records")
    parser.add_argument(
        "--install", action="store_true", help="prefer the winners from now on, for this user"
    )
    parser.add_argument(
        "--trials",
        default=",".join(TRIALS),
        help="other choices to time afterwards: none, or some of %(default)s",
    )
    arguments = parser.parse_args()
    reason = backend.unavailable()
    if reason or backend.interpreted():
        raise SystemExit(f"nothing to tune: {reason or 'kernels run in the interpreter'}")

    seqlens = tuple(map(int, arguments.seqlens.split(",")))
    deadline = time.monotonic() + arguments.seconds
    arch = torch.cuda.get_device_capability()
    jobs = [
        Job(kernel, head_dim, causal, tile)
        for kernel in arguments.kernels.split(",")
        for head_dim in map(int, arguments.head_dims.split(","))
        for causal in (True, False)
        for tile in candidates(kernel, head_dim, arch)
    ]
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=context) as pool:
        right, wrong = checked(check, jobs, pool)
        chosen = [trial for trial in trials() if trial.what.split()[0] in arguments.trials.split(",")]
        right_trials, wrong_trials = checked(check_trial, chosen, pool)
    done = f"{len(right)} of {len(jobs)} candidates and {len(right_trials)} trials"
    print(f"{done} compiled and right, in {time.monotonic() - start:.0f} s", flush=True)
    left_out = [
        f"{job.kernel} d{job.head_dim} causal={job.causal} {short(job.tile)}: {why}"
        for job, why in wrong.items()
    ]
    left_out += [f"{trial.what} {trial.how}: {why}" for trial, why in wrong_trials.items()]
    print("".join(f"  left out: {line}\n" for line in left_out), end="")
    records = list(time_jobs(right, seqlens, deadline))
    small = list(time_trials(right_trials, deadline))
    if "order" in arguments.trials.split(","):
        small += time_order_and_host(deadline)
    if arguments.json:
        meta = {
            "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
            "seconds": time.monotonic() - start,
        }  # fmt: skip
        document = {"meta": meta, "left_out": left_out, "rows": records, "small": small}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    print(report(records, small))
    if arguments.install:
        path = env.cache_dir() / backend.USER_TABLE
        write_user_table(path, winners(right, records))
        print(f"written: {path}")


if __name__ == "__main__":
    main()
