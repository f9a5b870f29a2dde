"""Kernel variants of the Hopper backend: what a variant is, which one a problem gets, and why.

Pure arithmetic: needs neither torch nor CUDA. A config becomes `struct Config` in front of the kernel source
(:mod:`flashcore.backends.hopper.jit`), so each field is spelled as the device code spells it.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import numpy

from flashcore.problem import AttentionProblem
from flashcore.score import PLAIN, Score
from flashcore.sequences import DENSE

SMEM_LIMIT = 227 * 1024  # bytes of shared memory one CTA may have on sm_90
REGISTER_FILE = 64 * 1024  # 32-bit registers of one SM

ELEMENTS = {"bfloat16": "Bf16", "float16": "Fp16"}
# Consumer warpgroups: registers per thread of (producer, consumer). One of each needs no redistribution; the others
# redistribute what they were launched with, which is a multiple of 8 for each thread.
_REGISTERS = {1: (255, 255), 2: (40, 232), 3: (32, 160), 4: (32, 112)}


@dataclass(frozen=True)
class ForwardConfig:
    """One variant of ``device/attention/forward_sm90.cuh``."""

    dtype: str  # "bfloat16" | "float16"
    head_dim: int  # of the tile, a multiple of 16; shorter heads are filled with zeros by TMA
    head_dim_v: int  # the same of V and O
    bounded_left: bool  # whether the mask hides keys far to the left
    bounded_right: bool  # whether it hides keys to the right
    tile_n: int  # keys per block
    consumers: int  # consumer warpgroups, 64 query rows each
    stages: int  # ring slots, each one block of K or of V
    q_buffers: int  # 2: the next tile starts under the end of this one
    turns: bool  # warpgroups take turns at issuing matrix products
    one_tile: bool = False  # for launches with a CTA for every tile: half the code, and none of it for a second tile
    key_parts: int = 1  # 2: two warpgroups have the same 64 query rows and every other block of keys
    score: Score = PLAIN  # what becomes of scores; without shapes
    packed: bool = False  # sequences of any lengths in one tensor, which the kernel learns when it runs
    wait_limit: int = 0  # > 0: a barrier wait traps after so many tries (development)
    why: str = field(default="", compare=False)  # the reason of the table row it came from

    source: ClassVar[str] = "attention/forward_sm90.cuh"
    entry: ClassVar[str] = "attention_forward_sm90"

    @property
    def tile_m(self) -> int:
        """Query rows per CTA tile."""
        return 64 * self.row_groups

    @property
    def row_groups(self) -> int:
        """Sets of 64 query rows in a tile."""
        return self.consumers // self.key_parts

    @property
    def threads(self) -> int:
        return 128 * (self.consumers + 1)

    @property
    def producer_registers(self) -> int:
        return _REGISTERS[self.consumers][0]

    @property
    def consumer_registers(self) -> int:
        return _REGISTERS[self.consumers][1]

    @property
    def longest_first(self) -> bool:
        """Whether tiles differ so much in keys that long ones are dealt out first, and with short ones."""
        return self.bounded_right and not self.bounded_left

    @property
    def o_in_ring(self) -> bool:
        """Whether outputs wait for the copy engine in slots of the ring, not in the Q buffers of their tiles."""
        return self.q_buffers == 1 and not self.one_tile

    @property
    def smem_bytes(self) -> int:
        """``sizeof(ForwardSmem<Config>)``, which the kernel asserts."""
        # Bytes; chunks of 64 elements, the last one maybe partly used.
        row, row_v = (-(-d // 64) * 128 for d in (self.head_dim, self.head_dim_v))
        q = self.q_buffers * self.tile_m * (row if self.o_in_ring else max(row, row_v))
        kv = self.key_parts * self.stages * self.tile_n * max(row, row_v)
        barriers = 8 * 2 * (self.key_parts * self.stages + self.q_buffers * self.row_groups)
        return -(-(q + kv + barriers) // 1024) * 1024

    def infeasible(self) -> str | None:
        """Why this config cannot be a kernel; None if it can."""
        registers = 128 * (self.producer_registers + self.consumers * self.consumer_registers)
        if self.dtype not in ELEMENTS:
            return f"dtype {self.dtype} is neither bfloat16 nor float16"
        for name in ("head_dim", "head_dim_v"):
            if getattr(self, name) % 16 or not 16 <= getattr(self, name) <= 256:
                return f"{name} {getattr(self, name)} is not a multiple of 16 up to 256"
        if self.tile_n % 16 or not 16 <= self.tile_n <= 256:
            return f"tile_n {self.tile_n} is not a multiple of 16 up to 256"
        if self.smem_bytes > SMEM_LIMIT:
            return f"{self.smem_bytes} bytes of shared memory exceed {SMEM_LIMIT}"
        if registers > REGISTER_FILE:
            return f"{registers} registers exceed {REGISTER_FILE}"
        if self.turns and self.consumers == 1:
            return "one warpgroup cannot take turns"
        if self.key_parts > 1 and not (self.one_tile and self.key_parts == self.consumers == 2):
            return "keys are shared out between the two warpgroups of a CTA with one tile"
        if self.packed and self.one_tile:
            return "how many tiles packed sequences have is known only when the kernel runs"
        chunks, chunks_v = (-(-d // 64) for d in (self.head_dim, self.head_dim_v))
        if self.o_in_ring and self.tile_n * max(chunks, chunks_v) < 64 * chunks_v:
            return f"a slot of {self.tile_n} rows cannot hold a warpgroup's output"
        if self.stages < (self.consumers + 2 if self.o_in_ring else 3):
            return f"{self.stages} stages cannot hold a K, a V and, with one Q buffer, every warpgroup's output"
        return None

    def constants(self) -> dict[str, int | bool]:
        """Name and value of every constant of the device-side ``struct Config``."""
        derived = (
            "tile_m", "row_groups", "threads", "producer_registers", "consumer_registers", "longest_first",
            "smem_bytes",
        )  # fmt: skip
        names = [f.name for f in fields(self) if f.name not in ("dtype", "score", "why")] + list(derived)
        return {name: getattr(self, name) for name in names}

    @property
    def element(self) -> str:
        """The device-side element type."""
        return ELEMENTS[self.dtype]

    def __str__(self) -> str:
        mask = "window" if self.bounded_left else "causal" if self.bounded_right else "full"
        head_dims = str(self.head_dim) + (f"/{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        return (
            f"{self.dtype} head_dim {head_dims} {mask}: tile {self.tile_m} x {self.tile_n}, "
            f"{self.consumers} consumer warpgroups, {self.stages} stages, {self.q_buffers} Q buffers"
            + (", turns" if self.turns else "")
            + (", one tile a CTA" if self.one_tile else "")
            + (", keys in two parts" if self.key_parts == 2 else "")
            + (", packed" if self.packed else "")
            + (f", {self.score}" if self.score != PLAIN else "")
        )


@dataclass(frozen=True)
class ForwardRow:
    """A row of the table: a tile, what it costs, and when it is the one to take."""

    head_dim: int
    tile_n: int
    consumers: int
    stages: int
    q_buffers: int
    turns: bool
    weight: float  # time per query row and key, relative to the head_dim's other rows, where each does its best
    why: str
    key_parts: int = 1  # 2: only for launches with a CTA for every tile

    def config(
        self, dtype: str, causal: bool = False, one_tile: bool = False, *, window: bool = False,
        head_dims: tuple[int, int] | None = None, score: Score = PLAIN, packed: bool = False,
    ) -> ForwardConfig:  # fmt: skip
        """The variant with these facts. Values wider than the row's heads leave fewer buffers and stages."""
        head_dim, head_dim_v = head_dims or (self.head_dim, self.head_dim)
        one_tile = one_tile or self.key_parts > 1
        config = ForwardConfig(
            dtype, head_dim, head_dim_v, window, causal, self.tile_n, self.consumers, self.stages,
            1 if one_tile else self.q_buffers, self.turns, one_tile, self.key_parts, score, packed, why=self.why,
        )  # fmt: skip
        while config.smem_bytes > SMEM_LIMIT and config.q_buffers > 1:
            config = replace(config, q_buffers=config.q_buffers - 1)
        while config.smem_bytes > SMEM_LIMIT and config.stages > 3:
            config = replace(config, stages=config.stages - 1)
        return config


# What the ends of a tile in a window cost, in blocks.
_EXPOSED_BLOCKS = 1

_TWO_PARTS = "64 rows put the most SMs to work, and two warpgroups share their keys"

# The row whose busiest CTA has the least to do is taken (:func:`choose_forward`). Measurements: docs/log/0003, 0012.
FORWARD_TABLE: tuple[ForwardRow, ...] = (
    ForwardRow(64, 128, 3, 6, 2, True, 1.0, "three warpgroups keep the exponential units busy"),
    ForwardRow(64, 64, 4, 12, 2, False, 1.04, "256 rows divide short sequences; 64 keys follow the diagonal"),
    ForwardRow(64, 128, 2, 7, 3, True, 1.3, "128 rows where larger tiles would leave SMs idle"),
    ForwardRow(64, 128, 2, 4, 1, False, 1.3, _TWO_PARTS, key_parts=2),
    ForwardRow(128, 80, 3, 5, 2, True, 1.0, "192 query rows per pass over K and V"),
    ForwardRow(128, 128, 2, 4, 3, True, 1.07, "128 x 128 divides the usual lengths and the diagonal; a third Q buffer "
               "hides the load of Q from short tiles"),
    ForwardRow(128, 128, 2, 3, 1, False, 1.07, _TWO_PARTS, key_parts=2),
    ForwardRow(192, 96, 2, 4, 1, True, 1.0, "the widest block of which two K and two V fit beside Q"),
    ForwardRow(256, 64, 2, 5, 1, True, 1.0, "small blocks follow the diagonal and leave room for a fifth slot"),
    ForwardRow(256, 64, 2, 3, 1, False, 1.0, _TWO_PARTS, key_parts=2),
)  # fmt: skip


def row_head_dim(head_dim: int, head_dim_v: int) -> int:
    """The head_dim of the rows that serve a problem: the next multiple of 64."""
    return -(-max(head_dim, head_dim_v) // 64) * 64


def tile_head_dim(head_dim: int) -> int:
    """The head_dim of a tile: the next multiple of 16, what a matrix product reduces at a time."""
    return -(-head_dim // 16) * 16


def choose_forward(problem: AttentionProblem) -> ForwardConfig:
    """The config for a problem that the backend accepts: that of the row with the least work for its busiest CTA."""
    best, best_time = None, math.inf
    for row, config, one_tile in _variants_for(problem):
        tiles = -(-problem.seqlen_q // config.tile_m) * problem.batch * problem.heads_q
        if config.one_tile and tiles > problem.sm_count:
            continue
        blocks = -(-float(blocks_per_cta(config, problem).max()) // config.key_parts)
        time = blocks * config.tile_n * 64 * config.consumers * row.weight
        if time < best_time:
            best, best_time = one_tile if tiles <= problem.sm_count else config, time
    if best is None:
        raise LookupError(f"no row of FORWARD_TABLE serves head_dim {problem.head_dim}, {problem.head_dim_v}")
    return best


def choose_packed(problem: AttentionProblem) -> ForwardConfig:
    """The config for packed sequences: the row with the least work for its busiest CTA, were they all of one length."""
    alike = of_one_length(problem)

    def time(variant: tuple[ForwardRow, ForwardConfig, ForwardConfig]) -> float:
        row, config, _ = variant
        busiest = min(packed_blocks(config, alike, paired) for paired in (False, True))
        return busiest * config.tile_n * config.tile_m * row.weight

    return min((one for one in _variants_for(problem) if not one[1].one_tile), key=time)[1]


def packed_pairs(config: ForwardConfig, problem: AttentionProblem) -> bool:
    """Whether the units of packed sequences under a causal mask are two tiles (``AttentionParams.paired``)."""
    alike = of_one_length(problem)
    return packed_blocks(config, alike, True) < packed_blocks(config, alike, False)


def packed_blocks(config: ForwardConfig, alike: AttentionProblem, paired: bool) -> float:
    """Key blocks of the busiest CTA, were packed sequences these dense ones (``PackedTileScheduler``)."""
    blocks, heads, ctas = _tile_blocks(config, alike), alike.heads_q, max(1, alike.sm_count)
    if config.bounded_left:
        blocks = blocks + _EXPOSED_BLOCKS
    if len(blocks) * heads * alike.batch > 32 * ctas:
        return float(blocks.sum() * heads * alike.batch / ctas)
    if not config.longest_first:
        units = numpy.tile(blocks, heads)
    elif paired:
        both = blocks[::-1][numpy.arange(len(blocks)) // 2] + blocks[numpy.arange(len(blocks)) // 2]
        units = numpy.concatenate([numpy.tile(both, heads // 2), blocks[::-1] if heads % 2 else blocks[:0]])
    else:
        units = numpy.repeat(blocks[::-1], heads)
    units = numpy.tile(units, alike.batch)
    rounds = numpy.zeros((-(-len(units) // ctas), ctas))
    rounds.reshape(-1)[: len(units)] = units
    if config.longest_first and not paired:
        rounds[1::2] = rounds[1::2, ::-1].copy()
    return float(rounds.sum(axis=0).max())


def of_one_length(problem: AttentionProblem) -> AttentionProblem:
    """As many dense sequences in as many rows."""
    length_q, length_k = (
        max(1, min(longest, -(-rows.total // problem.batch)))
        for rows, longest in ((problem.queries, problem.seqlen_q), (problem.keys, problem.seqlen_k))
    )
    return replace(problem, queries=DENSE, keys=DENSE, seqlen_q=length_q, seqlen_k=length_k)


def _variants_for(problem: AttentionProblem) -> tuple[tuple[ForwardRow, ForwardConfig, ForwardConfig], ...]:
    """The rows that serve a problem, with their configs: for any launch, and for one with a CTA for every tile."""
    visible = problem.visible
    return _variants(
        problem.dtype, row_head_dim(problem.head_dim, problem.head_dim_v), visible.bounded_right, visible.bounded_left,
        (tile_head_dim(problem.head_dim), tile_head_dim(problem.head_dim_v)), problem.kernel_score, problem.packed,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _variants(
    dtype: str, head_dim: int, causal: bool, window: bool, head_dims: tuple[int, int], score: Score, packed: bool
) -> tuple[tuple[ForwardRow, ForwardConfig, ForwardConfig], ...]:
    rows = [row for row in FORWARD_TABLE if row.head_dim == head_dim]
    facts = dict(window=window, head_dims=head_dims, score=score, packed=packed)
    found = ((row, *(row.config(dtype, causal, one_tile, **facts) for one_tile in (False, True))) for row in rows)
    return tuple(variant for variant in found if variant[1].infeasible() is None)


def tile_blocks(config: ForwardConfig, problem: AttentionProblem) -> list[int]:
    """Key blocks of a head's tiles (``TileScheduler::set``)."""
    return _tile_blocks(config, problem).tolist()


def _tile_blocks(config: ForwardConfig, problem: AttentionProblem) -> numpy.ndarray:
    visible = problem.visible
    m_blocks = -(-problem.seqlen_q // config.tile_m)
    if not config.bounded_left and not config.bounded_right:
        return numpy.full(m_blocks, -(-problem.seqlen_k // config.tile_n))
    # With a right bound the tiles end with the last row.
    first_row = -(-problem.seqlen_q // 64) * 64 - m_blocks * config.tile_m if config.bounded_right else 0
    rows = numpy.arange(first_row, first_row + m_blocks * config.tile_m, config.tile_m)
    ends = numpy.maximum(1, -(-visible.end(rows + config.tile_m - 1) // config.tile_n))
    if not config.bounded_left:
        return ends
    return ends - numpy.minimum(visible.begin(rows) // config.tile_n, ends - 1)


def blocks_per_cta(config: ForwardConfig, problem: AttentionProblem) -> numpy.ndarray:
    """Key blocks that each CTA processes; the mean for all where a CTA has so many tiles that they even out."""
    blocks, heads = _tile_blocks(config, problem), problem.batch * problem.heads_q
    m_blocks, tiles = len(blocks), len(blocks) * problem.batch * problem.heads_q
    ctas = min(tiles, problem.sm_count)
    if config.bounded_left:  # its first product of scores and its last one of values hide nothing
        units = m_blocks - window_ramp(config, problem) // 2
        rounds = -(-units * heads // ctas)
        return numpy.full(ctas, rounds * (blocks.max() + _EXPOSED_BLOCKS))
    if not config.longest_first:
        return -(-(tiles - numpy.arange(ctas)) // ctas) * blocks[0]
    if tiles > 32 * ctas:
        return numpy.full(ctas, blocks.sum() * heads / ctas)
    return dealt_blocks(blocks, heads, paired_heads(config, problem, ctas), ctas)


def dealt_blocks(blocks: numpy.ndarray, heads: int, paired: int, ctas: int) -> numpy.ndarray:
    """The sums over each CTA's tiles (:func:`deal_tiles`) of their blocks."""
    m_blocks, rest = len(blocks), heads - paired
    backwards, rank = blocks[::-1], numpy.arange(m_blocks) // 2
    units = paired // 2 * m_blocks
    rounds = numpy.zeros((-(-(units + rest * m_blocks) // ctas), ctas), blocks.dtype)
    tiles = rounds.reshape(-1)
    tiles[:units].reshape(-1, m_blocks)[:] = backwards[rank] + blocks[rank]
    tiles[units : units + rest * m_blocks].reshape(m_blocks, rest)[:] = backwards[:, None]
    first = -(-units // ctas)
    rounds[first::2] = rounds[first::2, ::-1]
    return rounds.sum(axis=0)


def window_ramp(config: ForwardConfig, problem: AttentionProblem) -> int:
    """How many tiles of a head, from its first on, go out two at a time (``AttentionParams.paired``)."""
    if config.one_tile:
        return 0
    return int(_tile_blocks(config, problem).argmax())


def deal_window_tiles(m_blocks: int, heads: int, ramp: int, ctas: int, cta: int) -> list[tuple[int, int]]:
    """The (batch-head, m_block) tiles of one CTA in a window, in order: ``TileScheduler`` in Python."""
    whole = m_blocks - ramp
    units = whole + (ramp + 1) // 2
    tiles: list[tuple[int, int]] = []
    for i in range(cta, heads * units, ctas):
        head, j = divmod(i, units)
        tiles.append((head, m_blocks - 1 - j))
        if j >= whole and 2 * (j - whole) + 1 < ramp:
            tiles.append((head, j - whole))
    return tiles


def paired_heads(config: ForwardConfig, problem: AttentionProblem, ctas: int) -> int:
    """How many (batch, head) pairs go out in units of two tiles (``AttentionParams.paired``).

    As many as fill whole rounds of units over the CTAs but one; the tiles of the rest even out the ends.
    """
    if not config.longest_first:
        return 0
    m_blocks = -(-problem.seqlen_q // config.tile_m)
    heads = problem.batch * problem.heads_q
    rounds = m_blocks * -(-heads // 2) // ctas - 1
    return min(2 * (max(0, rounds) * ctas // m_blocks), heads // 2 * 2)


def deal_tiles(m_blocks: int, heads: int, paired: int, ctas: int, cta: int) -> list[tuple[int, int]]:
    """The (batch-head, m_block) tiles of one CTA under a causal mask, in order: ``TileScheduler`` in Python."""
    units, rest = paired // 2 * m_blocks, heads - paired
    full_rounds = -(-units // ctas)
    tiles: list[tuple[int, int]] = []
    for turn in itertools.count():
        i = turn * ctas + cta
        if i < units:
            head, rank = i // m_blocks * 2, i % m_blocks
            tiles += [(head + rank % 2, m_blocks - 1 - rank // 2), (head + 1 - rank % 2, rank // 2)]
            continue
        reverse = turn >= full_rounds and (turn - full_rounds) % 2 == 0
        rank = (turn * ctas + ctas - 1 - cta if reverse else i) - units
        if rank >= rest * m_blocks:
            return tiles
        tiles.append((paired + rank % rest, m_blocks - 1 - rank // rest))


def declared_configs() -> list[tuple[str, ForwardConfig]]:
    """Every variant of plain scores that :func:`choose_forward` can return for head_dims of the table, with a name.

    Those of other head_dims and scores are compiled when they are met.
    """
    configs = []
    masks = {"full": (False, False), "causal": (True, False), "window": (True, True)}
    for row, mask, one_tile, dtype in itertools.product(FORWARD_TABLE, masks, (False, True), ELEMENTS):
        causal, window = masks[mask]
        config = row.config(dtype, causal, one_tile, window=window)
        if config.one_tile == one_tile:
            kind = "-two-parts" if config.key_parts > 1 else "-one-tile" if one_tile else ""
            configs.append((f"forward-{row.head_dim}-{row.consumers}x{row.tile_n}-{mask}{kind}-{dtype}", config))
    return configs
