"""Kernel variants of the Hopper backward pass: what a variant is, which one a problem gets, and why.

Pure arithmetic, like configs.py. A backward pass is three kernels that agree on the tile of queries: the numbers of
every row, the products, and dQ: up to head_dim 128 it is only rounded there, beyond it is a product of its own.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from flashcore.backends.hopper.configs import REGISTER_FILE, SMEM_LIMIT
from flashcore.problem import AttentionProblem
from flashcore.score import PLAIN, Score

_ELEMENTS = {"bfloat16": "Bf16", "float16": "Fp16"}
_CONSUMERS = 2  # warpgroups
_MASKS = {"full": (False, False), "causal": (False, True), "window": (True, True)}  # bounded on the left, on the right
_L2_BYTES = 32 << 20  # of the L2 cache, for what the CTAs of a section share
DS_BYTES = 1 << 30  # of dS at a time


_DS_TILE = 64 * 64 * 2  # bytes


def _constants(config: Any, more: tuple[str, ...]) -> dict[str, int | bool]:
    """Name and value of every constant of the device-side ``struct Config``: the fields, and those class attributes."""
    names = [f.name for f in fields(config) if f.name not in ("dtype", "score", "why")] + list(more)
    return {name: getattr(config, name) for name in names}


def _head_dims(config: Any) -> str:
    return f"head_dim {config.head_dim}" + (f"/{config.head_dim_v}" if config.head_dim_v != config.head_dim else "")


def _score_name(config: Any) -> str:
    return "" if config.score == PLAIN else f" {config.score}"


def _mask_name(config: Any) -> str:
    return "window" if config.bounded_left else "causal" if config.bounded_right else "full"


@dataclass(frozen=True)
class BackwardConfig:
    """One variant of ``device/attention/backward_sm90.cuh``."""

    dtype: str  # "bfloat16" | "float16"
    head_dim: int  # of the tile: 64 or 128; shorter heads are filled with zeros by TMA
    bounded_left: bool  # the mask hides keys to the left of some queries
    bounded_right: bool  # ... to the right: a causal mask or a window
    tile_m: int  # queries per step
    stages: int  # ring slots, each one tile of Q and of dO
    dq_buffers: int  # dQ tiles on their way to global memory
    packed: bool = False  # sequences of any lengths in one tensor, which the kernel learns when it runs
    wait_limit: int = 0  # > 0: a wait traps after so many tries (development)
    why: str = field(default="", compare=False)  # the reason of the table row it came from

    source: ClassVar[str] = "attention/backward_sm90.cuh"
    entry: ClassVar[str] = "attention_backward_sm90"
    tile_n: ClassVar[int] = 128  # keys of a CTA, 64 for each consumer warpgroup
    threads: ClassVar[int] = 128 * (_CONSUMERS + 1)
    producer_registers: ClassVar[int] = 24
    consumer_registers: ClassVar[int] = 240

    @property
    def smem_bytes(self) -> int:
        """``sizeof(BackwardSmem<Config>)``, which the kernel asserts."""
        row = -(-self.head_dim // 64) * 128  # bytes; chunks of 64 elements
        kv = 2 * self.tile_n * row
        ring = self.stages * 2 * self.tile_m * row
        ds = 2 * self.tile_n * -(-self.tile_m // 64) * 128
        dq = self.dq_buffers * _CONSUMERS * 64 * 64 * 4
        rows = self.stages * (2 * self.tile_m + 4) * 4
        barriers = 8 * (2 * self.stages + 4 + 4 * self.dq_buffers)
        return -(-(kv + ring + ds + dq + rows + barriers) // 1024) * 1024

    def infeasible(self) -> str | None:
        """Why this config cannot be a kernel; None if it can."""
        registers = 128 * (self.producer_registers + _CONSUMERS * self.consumer_registers)
        if self.dtype not in _ELEMENTS:
            return f"dtype {self.dtype} is neither bfloat16 nor float16"
        if self.head_dim not in (64, 128):
            return f"head_dim {self.head_dim} is neither 64 nor 128"
        if self.tile_m * self.head_dim != 64 * 128:
            return f"a dQ tile of {self.tile_m} x {self.head_dim} is not 64 x 64 for each of two warpgroups"
        if self.stages < 2:
            return f"{self.stages} stages: the next Q arrives while this one is still needed"
        if self.dq_buffers < 1:
            return "no buffer for dQ"
        if self.smem_bytes > SMEM_LIMIT:
            return f"{self.smem_bytes} bytes of shared memory exceed {SMEM_LIMIT}"
        if registers > REGISTER_FILE:
            return f"{registers} registers exceed {REGISTER_FILE}"
        return None

    def constants(self) -> dict[str, int | bool]:
        """Name and value of every constant of the device-side ``struct Config``."""
        return _constants(self, ("tile_n", "threads", "producer_registers", "consumer_registers", "smem_bytes"))

    @property
    def element(self) -> str:
        """The device-side element type."""
        return _ELEMENTS[self.dtype]

    def __str__(self) -> str:
        return (
            f"{self.dtype} head_dim {self.head_dim} {_mask_name(self)}: tile {self.tile_m} x "
            f"{self.tile_n}, {self.stages} stages, {self.dq_buffers} dQ buffers, ordered sums"
            + (", packed" if self.packed else "")
        )


@dataclass(frozen=True)
class WideConfig:
    """One variant of ``device/attention/backward_wide_sm90.cuh``."""

    dtype: str
    head_dim: int  # of the tile, like the next one: a row of WIDE_TABLE
    head_dim_v: int
    bounded_left: bool
    bounded_right: bool
    wait_limit: int = 0
    score: Score = PLAIN  # without its sink, which the LSE has
    why: str = field(default="", compare=False)

    differentiates: ClassVar[bool] = True  # the score
    packed: ClassVar[bool] = False
    source: ClassVar[str] = "attention/backward_wide_sm90.cuh"
    entry: ClassVar[str] = "attention_backward_wide_sm90"
    tile_m: ClassVar[int] = 64
    tile_n: ClassVar[int] = 64  # keys of a CTA: one consumer warpgroup has their dV, the other their dK
    stages: ClassVar[int] = 2
    threads: ClassVar[int] = 128 * (_CONSUMERS + 1)
    producer_registers: ClassVar[int] = 24
    consumer_registers: ClassVar[int] = 240

    @property
    def smem_bytes(self) -> int:
        """``sizeof(WideSmem<Config>)``, which the kernel asserts."""
        q, v = 64 * self.head_dim * 2, 64 * self.head_dim_v * 2
        ds, p, rows, barriers = 2 * _DS_TILE, 64 * 64 * 4, self.stages * 132 * 4, 8 * (2 * self.stages + 8)
        return -(-(2 * max(q, v) + self.stages * (q + v) + ds + p + rows + barriers) // 1024) * 1024

    def constants(self) -> dict[str, int | bool]:
        more = (
            "packed", "tile_m", "tile_n", "stages", "threads", "producer_registers", "consumer_registers", "smem_bytes",
        )  # fmt: skip
        return _constants(self, more)

    @property
    def element(self) -> str:
        return _ELEMENTS[self.dtype]

    def __str__(self) -> str:
        return (
            f"{self.dtype} {_head_dims(self)} {_mask_name(self)}{_score_name(self)}: "
            f"tile {self.tile_m} x {self.tile_n}, {self.stages} stages, dS in memory, dQ a product of its own"
        )


@dataclass(frozen=True)
class ProductConfig:
    """One variant of ``device/attention/backward_product_sm90.cuh``."""

    dtype: str
    head_dim: int
    bounded_left: bool
    bounded_right: bool
    rounds: bool = False  # whether the sums of a launch may go on in the next one
    wait_limit: int = 0

    source: ClassVar[str] = "attention/backward_product_sm90.cuh"
    entry: ClassVar[str] = "attention_backward_product_sm90"
    tile_m: ClassVar[int] = 64
    tile_n: ClassVar[int] = 64
    groups: ClassVar[int] = 2  # query tiles of a CTA, which share a tile of K; three would leave too few registers
    stages: ClassVar[int] = 4
    threads: ClassVar[int] = 128 * (2 + 1)
    producer_registers: ClassVar[int] = 40
    consumer_registers: ClassVar[int] = 232

    @property
    def smem_bytes(self) -> int:
        """``sizeof(ProductSmem<Config>)``, which the kernel asserts."""
        slot = 64 * self.head_dim * 2 + self.groups * _DS_TILE
        return -(-(self.stages * slot + 8 * 2 * self.stages) // 1024) * 1024

    def constants(self) -> dict[str, int | bool]:
        more = (
            "tile_m", "tile_n", "groups", "stages", "threads", "producer_registers", "consumer_registers", "smem_bytes",
        )  # fmt: skip
        return _constants(self, more)

    @property
    def element(self) -> str:
        return _ELEMENTS[self.dtype]


@dataclass(frozen=True)
class RowsConfig:
    """One variant of ``device/attention/backward_rows_sm90.cuh``."""

    dtype: str
    head_dim: int  # of the tile
    tile_m: int
    packed: bool = False

    source: ClassVar[str] = "attention/backward_rows_sm90.cuh"
    entry: ClassVar[str] = "attention_backward_rows_sm90"
    threads: ClassVar[int] = 256
    smem_bytes: ClassVar[int] = 0

    def constants(self) -> dict[str, int | bool]:
        return _constants(self, ("threads",))

    @property
    def element(self) -> str:
        return _ELEMENTS[self.dtype]


@dataclass(frozen=True)
class DqConfig:
    """One variant of ``device/attention/backward_dq_sm90.cuh``."""

    dtype: str
    tile_m: int
    packed: bool = False

    source: ClassVar[str] = "attention/backward_dq_sm90.cuh"
    entry: ClassVar[str] = "attention_backward_dq_sm90"
    threads: ClassVar[int] = 256
    smem_bytes: ClassVar[int] = 2 * 64 * 64 * 2

    def constants(self) -> dict[str, int | bool]:
        return _constants(self, ("threads",))

    @property
    def element(self) -> str:
        return _ELEMENTS[self.dtype]


@dataclass(frozen=True)
class BackwardRow:
    """A row of the table."""

    head_dim: int
    tile_m: int
    stages: int
    dq_buffers: int
    why: str

    def config(self, dtype: str, left: bool, right: bool, packed: bool = False) -> BackwardConfig:
        return BackwardConfig(
            dtype, self.head_dim, left, right, self.tile_m, self.stages, self.dq_buffers, packed, why=self.why
        )


BACKWARD_TABLE: tuple[BackwardRow, ...] = (
    BackwardRow(64, 128, 2, 2, "128 queries a step halve the steps; a third slot of the ring would not fit"),
    BackwardRow(128, 64, 3, 1, "64 queries a step leave registers for dK and dV; a third slot hides the loads"),
)  # fmt: skip


# Head dimensions of tiles whose dK and dV are in two warpgroups.
WIDE_TABLE: dict[int, str] = {
    64: "a changed score's slope, or a head_dim of V of its own: the fused kernel has neither",
    128: "a changed score's slope, or a head_dim of V of its own: the fused kernel has neither",
    192: "dQ would leave no registers for dK and dV; a quarter less to load and to multiply than 256",
    256: "dQ would leave no registers for dK and dV",
}


def rejects(problem: AttentionProblem) -> str | None:
    """The one feature of the problem that the backward kernels lack; None if they have all."""
    if problem.dtype not in _ELEMENTS:
        return f"dtype {problem.dtype} is neither bfloat16 nor float16"
    for name, head_dim in (("head_dim", problem.head_dim), ("head_dim_v", problem.head_dim_v)):
        if head_dim > max(WIDE_TABLE):
            return f"{name} {head_dim} > {max(WIDE_TABLE)}"
        if head_dim % 8:
            return f"{name} {head_dim} is not a multiple of 8"
    if problem.packed and not is_fused(problem):
        return "packed sequences, and a changed score, a head_dim of V of its own, or one beyond 128"
    return None


def is_fused(problem: AttentionProblem) -> bool:
    """Whether the fused kernel takes a problem that the wide one takes as well."""
    plain = problem.score.change is None and problem.head_dim_v == problem.head_dim
    return plain and problem.head_dim <= BACKWARD_TABLE[-1].head_dim


def choose_backward(problem: AttentionProblem) -> BackwardConfig | WideConfig:
    """The config for a problem that :func:`rejects` accepts."""
    if (reason := rejects(problem)) is not None:
        raise LookupError(f"the backward kernels do not take this problem: {reason}")
    mask = problem.visible.bounded_left, problem.visible.bounded_right
    if is_fused(problem):
        row = next(row for row in BACKWARD_TABLE if problem.head_dim <= row.head_dim)
        return row.config(problem.dtype, *mask, problem.packed)
    head_dim, head_dim_v = (
        next(row for row in WIDE_TABLE if n <= row) for n in (problem.head_dim, problem.head_dim_v)
    )
    score = replace(problem.score.structure, sink=None)
    return WideConfig(problem.dtype, head_dim, head_dim_v, *mask, score=score, why=WIDE_TABLE[head_dim])


def wide_rounds(config: WideConfig, problem: AttentionProblem) -> list[tuple[range, range]]:
    """The key heads and key tiles of each launch: as many as the memory for dS holds, whole heads if it holds one."""
    heads, tiles = problem.batch * problem.heads_k, n_blocks(config, problem)
    column = problem.group_size * m_blocks(config, problem) * _DS_TILE  # bytes of one key tile
    heads_at_once = min(max(1, DS_BYTES // (column * tiles)), heads)
    tiles_at_once = min(max(1, DS_BYTES // column), tiles)
    return [
        (range(head, min(head + heads_at_once, heads)), range(tile, min(tile + tiles_at_once, tiles)))
        for head in range(0, heads, heads_at_once)
        for tile in range(0, tiles, tiles_at_once)
    ]


def m_begin(config: BackwardConfig | WideConfig, problem: AttentionProblem, n: int) -> int:
    """The first query tile that sees key tile `n` (``KeyTile``)."""
    return problem.visible.first_query(n * config.tile_n) // config.tile_m


def m_end(config: BackwardConfig | WideConfig, problem: AttentionProblem, n: int) -> int:
    """One past the last query tile that sees key tile `n`."""
    last = problem.visible.last_query(min((n + 1) * config.tile_n, problem.seqlen_k) - 1)
    return m_begin(config, problem, n) if last < 0 else last // config.tile_m + 1


def m_blocks(config: BackwardConfig | WideConfig, problem: AttentionProblem) -> int:
    """Tiles of queries; of packed sequences places for them (``Rows::first_tile``)."""
    if problem.packed:
        return problem.queries.total // config.tile_m + problem.batch
    return -(-problem.seqlen_q // config.tile_m)


def n_blocks(config: BackwardConfig | WideConfig, problem: AttentionProblem) -> int:
    """The same of keys."""
    if problem.packed:
        return problem.keys.total // config.tile_n + problem.batch
    return -(-problem.seqlen_k // config.tile_n)


def section(config: BackwardConfig | WideConfig, problem: AttentionProblem) -> int:
    """Key heads whose tiles are dealt out together: as many as the L2 cache holds Q, dO and the sums of dQ of, of one
    query head each: those of a group are walked side by side, so that less of each is needed at a time."""
    row = config.head_dim * (2 + 2 + 4)
    if problem.packed:  # one sequence after the other
        rows = min(problem.seqlen_q, -(-problem.queries.total // problem.batch))
        return min(max(1, _L2_BYTES // (row * rows)), problem.heads_k)
    heads = _L2_BYTES // (row * m_blocks(config, problem) * config.tile_m)
    return min(max(1, heads), problem.batch * problem.heads_k)


def deal_key_tiles(config: BackwardConfig | WideConfig, problem: AttentionProblem) -> list[tuple[int, int]]:
    """The (batch-head, key tile) of every CTA, in the order in which they start: ``KeyTile`` in Python."""
    heads, blocks, size = problem.batch * problem.heads_k, n_blocks(config, problem), section(config, problem)
    tiles = []
    for cta in range(heads * blocks):
        first = cta // (size * blocks) * size
        here, rank = min(size, heads - first), cta % (size * blocks)
        tiles.append((first + rank % here, rank // here))
    return tiles


def walk(config: BackwardConfig | WideConfig, problem: AttentionProblem, n: int) -> list[tuple[int, int]]:
    """The (head of the group, query tile) steps of key tile `n`, in order: ``QueryWalk`` in Python."""
    down = range(m_end(config, problem, n) - 1, m_begin(config, problem, n) - 1, -1)
    return [(head, m) for m in down for head in range(problem.group_size)]


def declared_backward_configs() -> list[tuple[str, BackwardConfig]]:
    """Every variant that :func:`choose_backward` can return for head_dim up to 128, with a name."""
    configs = []
    for row, mask, dtype in itertools.product(BACKWARD_TABLE, _MASKS, _ELEMENTS):
        name = f"backward-{row.head_dim}-{row.tile_m}x128-{mask}-{dtype}"
        configs.append((name, row.config(dtype, *_MASKS[mask])))
    return configs


def declared_wide_configs() -> list[tuple[str, WideConfig]]:
    """The same of wide heads, without a score and with V as wide as K."""
    return [
        (f"backward-{head_dim}-64x64-{mask}-{dtype}", WideConfig(dtype, head_dim, head_dim, *_MASKS[mask], why=why))
        for (head_dim, why), mask, dtype in itertools.product(WIDE_TABLE.items(), _MASKS, _ELEMENTS)
        if head_dim > BACKWARD_TABLE[-1].head_dim
    ]
