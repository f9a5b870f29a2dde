"""What each unit of the chip must do, from published rates, held against recorded times of the forward kernel."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from flashcore.bench.cases import Case
from flashcore.bench.shapes import Shape
from flashcore.bench.tables import Table, short_name

# Per SM and clock. Matrix products: NVIDIA H100 white paper (989.4 TFLOP/s dense at 132 SMs and 1830 MHz). The others:
# CUDA C++ Programming Guide, throughput of native arithmetic instructions at compute capability 9.0, its four warp
# schedulers, and its 32 banks of 4 bytes.
MMA_FLOPS = 4096
EXP_RESULTS = 16
FMA_RESULTS = 128
ALU_RESULTS = 64
ISSUED_LANES = 4 * 32
SMEM_BYTES = 32 * 4
# Bytes per second: NVIDIA's data sheets of the SXM modules.
HBM_BYTES = {"h100": 3.35e12, "h200": 4.8e12}

# Instructions per score of the softmax (device/attention/softmax.cuh): scale and offset, sum; half of a three-operand
# maximum, half of a rounding of two; the exponential.
FMA_PER_SCORE, ALU_PER_SCORE, EXP_PER_SCORE = 2, 0.5 + 0.5, 1
ROOFLINE_LENGTHS = (512, 1024, 4096, 16384)
UNITS = ("tensor pipe", "exp pipe", "FMA pipe", "ALU pipe", "issue slots", "shared memory")


def block_cycles(rows: int, tile_n: int, head_dim: int) -> dict[str, float]:
    """Cycles that each unit of an SM is busy with ``rows`` queries (64 per warpgroup) and a block of ``tile_n`` keys.

    Q K^T reads both operands from shared memory, P V only V: P comes from registers. Every warpgroup reads K and V for
    itself. Issue slots count the softmax's arithmetic; addresses, barriers and rescales come on top.
    """
    scores = rows * tile_n
    smem = rows / 64 * (2 * 64 * head_dim + 2 * 2 * tile_n * head_dim)
    return {
        "tensor pipe": 4 * scores * head_dim / MMA_FLOPS,
        "exp pipe": EXP_PER_SCORE * scores / EXP_RESULTS,
        "FMA pipe": FMA_PER_SCORE * scores / FMA_RESULTS,
        "ALU pipe": ALU_PER_SCORE * scores / ALU_RESULTS,
        "issue slots": (FMA_PER_SCORE + ALU_PER_SCORE + EXP_PER_SCORE) * scores / ISSUED_LANES,
        "shared memory": smem / SMEM_BYTES,
    }


@dataclass(frozen=True)
class Work:
    """What the kernel does for a case with a tile, in all."""

    blocks: int  # of 64 queries and tile_n keys that warpgroups multiply
    l2_bytes: int  # of Q, K and V that tiles read
    hbm_bytes: int  # of Q, K, V and O, each once


def work(case: Case, tile_m: int, tile_n: int) -> Work:
    """Counted as the kernel walks: each warpgroup's 64 rows up to the last block of keys that any of them sees."""
    blocks = loaded = 0
    for first in range(0, case.seqlen_q, tile_m):
        each = [_blocks(case, row, tile_n) for row in range(first, first + tile_m, 64)]
        blocks += sum(each)
        loaded += max(each)
    heads = case.batch * case.heads
    row_bytes = 2 * case.head_dim
    q = heads * case.seqlen_q * row_bytes
    kv = 2 * case.batch * case.kv_heads * case.seqlen_k * row_bytes
    return Work(heads * blocks, heads * loaded * 2 * tile_n * row_bytes + q, 2 * q + kv)


def _blocks(case: Case, first_row: int, tile_n: int) -> int:
    """Blocks of keys for 64 rows, at least 1; rows past the end take part in one."""
    if first_row >= case.seqlen_q:
        return 1
    last = (
        min(case.seqlen_k, first_row + 64 + case.seqlen_k - case.seqlen_q) if case.causal else case.seqlen_k
    )
    return max(1, -(-last // tile_n))


def _tile(row: dict) -> tuple[int, int]:
    tile_m, tile_n = re.search(r"tile (\d+) x (\d+)", row["config"]).groups()
    return int(tile_m), int(tile_n)


def _measured(found: Sequence[Shape]) -> list[Shape]:
    """Those that the Hopper kernel computed, and whose clock is known."""
    return [s for s in found if s.ours and s.ours.get("backend") == "hopper" and "sm_mhz" in s.ours]


def block_table(gpu: str, found: Sequence[Shape]) -> Table:
    """Cycles per block of the tiles that a record's kernels have."""
    tiles = sorted({(shape.case.head_dim, *_tile(shape.ours)) for shape in _measured(found)})
    rows = []
    for head_dim, tile_m, tile_n in tiles:
        cycles = block_cycles(tile_m, tile_n, head_dim)
        rows.append((str(head_dim), f"{tile_m} x {tile_n}", *(f"{cycles[unit]:.0f}" for unit in UNITS)))
    title = f"{gpu}: cycles that each unit of an SM needs for one block of keys"
    return Table(title, ("head_dim", "tile", *UNITS), tuple(rows))


def roofline_table(gpu: str, found: Sequence[Shape], sm_count: int, hbm: float | None) -> Table:
    """Per recorded shape: the SM clock at which a unit with nothing else to wait for would take the measured time.

    The unit with the highest such clock is the bound; how far it lies below the clock that the SMs had is what is lost.
    (Not percent of the recorded clock: that is read beside the kernels, and a GPU at its power cap changes it.)
    """
    rows = []
    for shape in _measured(found):
        case, ours = shape.case, shape.ours
        if case.seqlen_q not in ROOFLINE_LENGTHS:
            continue
        tile_m, tile_n = _tile(ours)
        us = 1e3 * ours["ms_p50"]
        done = work(case, tile_m, tile_n)
        cycles = block_cycles(64, tile_n, case.head_dim)
        useful = case.flops / (done.blocks * 4 * 64 * tile_n * case.head_dim)
        cells = [short_name(case), f"{tile_m} x {tile_n}", f"{us:.0f}"]
        cells += [f"{done.blocks * cycles[unit] / sm_count / us:.0f}" for unit in UNITS]
        cells += [f"{ours['sm_mhz']:.0f}", f"{100 * useful:.0f}"]
        cells += ["-" if hbm is None else f"{100 * done.hbm_bytes / hbm / us * 1e6:.0f}"]
        cells += [f"{done.l2_bytes / us / 1e6:.1f}"]
        rows.append(tuple(cells))
    headers = ("head_dim, mask, S", "tile", "us", *(f"{unit}, MHz" for unit in UNITS))
    headers += ("clock read, MHz", "useful products, %", "HBM, %", "L2 to SMs, TB/s")
    title = f"{gpu}: the clock at which each unit alone would take the measured time"
    return Table(title, headers, tuple(rows))
