"""Kernel variants of the Hopper backward pass: what a variant is, which one a problem gets, and why.

Pure arithmetic, like configs.py. A backward pass is three kernels that agree on the tile of queries: the numbers of
every row, the products, and the rounding of dQ.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, fields
from typing import ClassVar

from flashcore.backends.hopper.configs import REGISTER_FILE, SMEM_LIMIT
from flashcore.problem import AttentionProblem

_ELEMENTS = {"bfloat16": "Bf16", "float16": "Fp16"}
_CONSUMERS = 2  # warpgroups
_MASKS = {"full": (False, False), "causal": (False, True), "window": (True, True)}  # bounded on the left, on the right
_L2_BYTES = 32 << 20  # of the L2 cache, for what the CTAs of a section share


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
        more = ("tile_n", "threads", "producer_registers", "consumer_registers", "smem_bytes")
        names = [f.name for f in fields(self) if f.name not in ("dtype", "why")] + list(more)
        return {name: getattr(self, name) for name in names}

    @property
    def element(self) -> str:
        """The device-side element type."""
        return _ELEMENTS[self.dtype]

    def __str__(self) -> str:
        mask = "window" if self.bounded_left else "causal" if self.bounded_right else "full"
        return (
            f"{self.dtype} head_dim {self.head_dim} {mask}: tile {self.tile_m} x "
            f"{self.tile_n}, {self.stages} stages, {self.dq_buffers} dQ buffers, ordered sums"
        )


@dataclass(frozen=True)
class RowsConfig:
    """One variant of ``device/attention/backward_rows_sm90.cuh``."""

    dtype: str
    head_dim: int  # of the tile
    tile_m: int

    source: ClassVar[str] = "attention/backward_rows_sm90.cuh"
    entry: ClassVar[str] = "attention_backward_rows_sm90"
    threads: ClassVar[int] = 256
    smem_bytes: ClassVar[int] = 0

    def constants(self) -> dict[str, int | bool]:
        return {"head_dim": self.head_dim, "tile_m": self.tile_m, "threads": self.threads}

    @property
    def element(self) -> str:
        return _ELEMENTS[self.dtype]


@dataclass(frozen=True)
class DqConfig:
    """One variant of ``device/attention/backward_dq_sm90.cuh``."""

    dtype: str
    tile_m: int

    source: ClassVar[str] = "attention/backward_dq_sm90.cuh"
    entry: ClassVar[str] = "attention_backward_dq_sm90"
    threads: ClassVar[int] = 256
    smem_bytes: ClassVar[int] = 2 * 64 * 64 * 2

    def constants(self) -> dict[str, int | bool]:
        return {"tile_m": self.tile_m, "threads": self.threads}

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

    def config(self, dtype: str, left: bool, right: bool) -> BackwardConfig:
        return BackwardConfig(
            dtype, self.head_dim, left, right, self.tile_m, self.stages, self.dq_buffers, why=self.why
        )


BACKWARD_TABLE: tuple[BackwardRow, ...] = (
    BackwardRow(64, 128, 2, 2, "128 queries a step halve the steps; a third slot of the ring would not fit"),
    BackwardRow(128, 64, 3, 1, "64 queries a step leave registers for dK and dV; a third slot hides the loads"),
)  # fmt: skip


def rejects(problem: AttentionProblem) -> str | None:
    """The one feature of the problem that the backward kernels lack; None if they have all."""
    if problem.dtype not in _ELEMENTS:
        return f"dtype {problem.dtype} is neither bfloat16 nor float16"
    if problem.head_dim > BACKWARD_TABLE[-1].head_dim:
        return f"head_dim {problem.head_dim} > {BACKWARD_TABLE[-1].head_dim}"
    if problem.head_dim % 8:
        return f"head_dim {problem.head_dim} is not a multiple of 8"
    return None


def choose_backward(problem: AttentionProblem) -> BackwardConfig:
    """The config for a problem that :func:`rejects` accepts."""
    if (reason := rejects(problem)) is not None:
        raise LookupError(f"the backward kernels do not take this problem: {reason}")
    row = next(row for row in BACKWARD_TABLE if problem.head_dim <= row.head_dim)
    return row.config(problem.dtype, problem.visible.bounded_left, problem.visible.bounded_right)


def m_begin(config: BackwardConfig, problem: AttentionProblem, n: int) -> int:
    """The first query tile that sees key tile `n` (``KeyTile``)."""
    if not config.bounded_right:
        return 0
    return max(0, n * config.tile_n - problem.visible.offset - problem.mask.right) // config.tile_m


def m_end(config: BackwardConfig, problem: AttentionProblem, n: int) -> int:
    """One past the last query tile that sees key tile `n`."""
    if not config.bounded_left:
        return m_blocks(config, problem)
    last = min((n + 1) * config.tile_n, problem.seqlen_k) - 1 - problem.visible.offset + problem.mask.left
    if last < 0:
        return m_begin(config, problem, n)
    return min(m_blocks(config, problem), last // config.tile_m + 1)


def m_blocks(config: BackwardConfig, problem: AttentionProblem) -> int:
    return -(-problem.seqlen_q // config.tile_m)


def n_blocks(config: BackwardConfig, problem: AttentionProblem) -> int:
    return -(-problem.seqlen_k // config.tile_n)


def section(config: BackwardConfig, problem: AttentionProblem) -> int:
    """Key heads whose tiles are dealt out together: as many as the L2 cache holds Q, dO and the sums of dQ of, of one
    query head each: those of a group are walked side by side, so that less of each is needed at a time."""
    row = config.head_dim * (2 + 2 + 4)
    heads = _L2_BYTES // (row * m_blocks(config, problem) * config.tile_m)
    return min(max(1, heads), problem.batch * problem.heads_k)


def deal_key_tiles(config: BackwardConfig, problem: AttentionProblem) -> list[tuple[int, int]]:
    """The (batch-head, key tile) of every CTA, in the order in which they start: ``KeyTile`` in Python."""
    heads, blocks, size = problem.batch * problem.heads_k, n_blocks(config, problem), section(config, problem)
    tiles = []
    for cta in range(heads * blocks):
        first = cta // (size * blocks) * size
        here, rank = min(size, heads - first), cta % (size * blocks)
        tiles.append((first + rank % here, rank // here))
    return tiles


def walk(config: BackwardConfig, problem: AttentionProblem, n: int) -> list[tuple[int, int]]:
    """The (head of the group, query tile) steps of key tile `n`, in order: ``QueryWalk`` in Python."""
    down = range(m_end(config, problem, n) - 1, m_begin(config, problem, n) - 1, -1)
    return [(head, m) for m in down for head in range(problem.group_size)]


def declared_backward_configs() -> list[tuple[str, BackwardConfig]]:
    """Every variant that :func:`choose_backward` can return, with a name."""
    configs = []
    for row, mask, dtype in itertools.product(BACKWARD_TABLE, _MASKS, _ELEMENTS):
        name = f"backward-{row.head_dim}-{row.tile_m}x128-{mask}-{dtype}"
        configs.append((name, row.config(dtype, *_MASKS[mask])))
    return configs
