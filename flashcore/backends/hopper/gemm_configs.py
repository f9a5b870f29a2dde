"""Variants of the Hopper matrix product: what a variant is, which one a problem gets, and why.

Pure arithmetic, like :mod:`flashcore.backends.hopper.configs`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

from flashcore.backends.hopper.configs import REGISTER_FILE, SMEM_LIMIT
from flashcore.gemm_problem import ACTIVATIONS, GemmProblem

TILE_K = 64  # elements of the reduction per ring slot: 128 bytes, the swizzle width
CHUNK_BYTES = 64 * 128  # 64 rows of 128 bytes: what one store moves

_ELEMENTS = {"bfloat16": "Bf16", "float16": "Fp16"}
# Consumer warpgroups: registers of (producer, consumer). With one there are enough for both.
_REGISTERS = {1: (255, 255), 2: (40, 232), 3: (32, 160)}


@dataclass(frozen=True)
class GemmConfig:
    """One variant of ``device/gemm/gemm_sm90.cuh``."""

    dtype: str  # "bfloat16" | "float16": of the operands
    tile_m: int  # rows of a CTA's accumulator
    tile_n: int  # its columns; SwiGLU makes one of the output out of two
    consumers: int  # consumer warpgroups, tile_m / consumers rows each
    cluster_m: int  # CTAs of a cluster along m: they share columns of b
    cluster_n: int  # and along n: they share rows of a
    stages: int  # ring slots, each one block of a and of b
    store_buffers: int  # per warpgroup, for the output's way to memory
    a_mn_major: bool = False
    b_mn_major: bool = False
    out_float: bool = False  # float32 output
    bias: bool = False
    activation: str | None = None
    split: bool = False  # some tiles are shared out along the reduction
    tma_store: bool = True  # False: rows of the output are not aligned to 16 bytes
    in_flight: int = 1  # blocks whose products a warpgroup has queued before the ones it waits for
    wait_limit: int = 0  # > 0: a wait traps after so many tries (development)
    why: str = field(default="", compare=False)  # the reason of the tile it came from

    source: ClassVar[str] = "gemm/gemm_sm90.cuh"
    entry: ClassVar[str] = "gemm_sm90"

    @property
    def element(self) -> str:
        """The device-side element type."""
        return _ELEMENTS[self.dtype]

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
    def cluster_size(self) -> int:
        return self.cluster_m * self.cluster_n

    @property
    def out_n(self) -> int:
        """Columns of the output per tile."""
        return self.tile_n // 2 if self.activation == "swiglu" else self.tile_n

    @property
    def a_box_rows(self) -> int:
        """Rows of memory of one load of a (128 bytes each): along k, or all rows of the tile that this CTA loads."""
        return TILE_K if self.a_mn_major else self.tile_m // self.cluster_n

    @property
    def b_box_rows(self) -> int:
        return TILE_K if self.b_mn_major else self.out_n // self.cluster_m

    @property
    def deferred(self) -> bool:
        """Whether a finished tile, or half of it in fp32, waits in registers, to be stored under the next products."""
        # In fp32 SwiGLU needs both halves at once, and shared tiles make the assembler copy registers in the loop.
        whole = self.out_float and (self.activation == "swiglu" or self.split)
        return self.tma_store and not whole and self.tile_m == 64 * self.consumers <= 128

    @property
    def smem_bytes(self) -> int:
        """``sizeof(GemmSmem<Config>)``, which the kernel asserts."""
        operands = self.stages * (self.tile_m + self.tile_n) * TILE_K * 2
        staging = self.consumers * self.store_buffers * CHUNK_BYTES
        barriers = 8 * 2 * self.stages
        return -(-(operands + staging + barriers) // 1024) * 1024

    def infeasible(self) -> str | None:
        """Why this config cannot be a kernel; None if it can."""
        registers = 128 * (self.producer_registers + self.consumers * self.consumer_registers)
        chunk = 32 if self.out_float else 64
        if self.dtype not in _ELEMENTS:
            return f"dtype {self.dtype} is neither bfloat16 nor float16"
        if self.tile_m % (64 * self.consumers):
            return f"tile_m {self.tile_m} is not a multiple of 64 rows per warpgroup"
        if self.tile_n % 16 or not 16 <= self.tile_n <= 256:
            return f"tile_n {self.tile_n} is not a multiple of 16 up to 256"
        if self.out_n % chunk:
            return f"{self.out_n} columns are not whole chunks of {chunk}"
        if self.tile_m // self.consumers * self.tile_n > 192 * 128:
            return "the accumulators of a warpgroup leave no registers"
        if not self.tma_store and self.tile_m // self.consumers * self.tile_n > 64 * 256:
            return "the accumulators of a warpgroup leave no registers to store an unaligned output"
        if self.a_mn_major and self.tile_m // self.cluster_n % 64:
            return "a CTA's share of a is not whole chunks of 64 rows"
        if self.b_mn_major and self.out_n // self.cluster_m % 64:
            return "a CTA's share of b is not whole chunks of 64 columns"
        if self.smem_bytes > SMEM_LIMIT:
            return f"{self.smem_bytes} bytes of shared memory exceed {SMEM_LIMIT}"
        if registers > REGISTER_FILE:
            return f"{registers} registers exceed {REGISTER_FILE}"
        return None

    def constants(self) -> dict[str, int | bool]:
        """Name and value of every constant of the device-side ``struct Config``."""
        derived = ("threads", "producer_registers", "consumer_registers", "deferred", "smem_bytes")
        names = [f.name for f in fields(self) if f.name not in ("dtype", "activation", "why")] + list(derived)
        activation = 1 + ACTIVATIONS.index(self.activation) if self.activation else 0
        return {name: getattr(self, name) for name in names} | {"activation": activation}

    def __str__(self) -> str:
        extras = [
            f"cluster {self.cluster_m} x {self.cluster_n}" if self.cluster_size > 1 else "",
            "float32 output" if self.out_float else "",
            "bias" if self.bias else "",
            self.activation or "",
            "shared tiles" if self.split else "",
            "" if self.tma_store else "unaligned output",
        ]
        majors = f"a along {'m' if self.a_mn_major else 'k'}, b along {'n' if self.b_mn_major else 'k'}"
        return ", ".join(
            [
                f"{self.dtype}: tile {self.tile_m} x {self.tile_n}",
                f"{self.consumers} consumer warpgroups",
                f"{self.stages} stages",
                majors,
                *filter(None, extras),
            ]
        )


@dataclass(frozen=True)
class GemmSchedule:
    """How the tiles of a problem are dealt out (``TileScheduler``). A tile here is a cluster's."""

    m_tiles: int
    n_tiles: int
    clusters: int  # of the grid
    group: int  # tiles along m that are walked together
    whole_tiles: int  # the other tiles are shared out by blocks of the reduction
    parts: int  # to that many clusters; 0 if there are none

    def rest(self, batch: int) -> int:
        """Tiles that are shared out."""
        return self.m_tiles * self.n_tiles * batch - self.whole_tiles

    def shares(self, problem: GemmProblem) -> tuple[int, int]:
        """Blocks of the reduction per part, and how many parts have one more."""
        return divmod(self.rest(problem.batch) * k_blocks(problem), self.parts) if self.parts else (0, 0)

    def __str__(self) -> str:
        shared = f", all but {self.whole_tiles} shared by {self.parts} clusters" if self.parts else ""
        return f"{self.m_tiles} x {self.n_tiles} tiles on {self.clusters} clusters, {self.group} rows at a time{shared}"


def k_blocks(problem: GemmProblem) -> int:
    return -(-problem.k // TILE_K)


# ---- tiles ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """A row of the table. Which one is taken is estimated_seconds' choice."""

    tile_m: int
    tile_n: int
    consumers: int
    cluster_m: int
    cluster_n: int
    stages: int
    store_buffers: int
    in_flight: int
    gigahertz: float  # what is left of the clock under the power cap, less for more traffic (docs/log/0014)
    why: str

    def config(self, problem: GemmProblem) -> GemmConfig:
        out_float = problem.out_dtype == "float32"
        return GemmConfig(
            problem.dtype, self.tile_m, self.tile_n, self.consumers, self.cluster_m, self.cluster_n, self.stages,
            self.store_buffers, problem.a_mn_major, problem.b_mn_major, out_float, problem.bias, problem.activation,
            tma_store=problem.n * (4 if out_float else 2) % 16 == 0, in_flight=self.in_flight, why=self.why,
        )  # fmt: skip


TILES: tuple[Tile, ...] = (
    Tile(256, 192, 2, 1, 2, 3, 3, 0, 1.42, "the least traffic per product, for many tiles"),
    Tile(128, 256, 2, 2, 1, 4, 2, 0, 1.36, "the least traffic of those that store under the next tile"),
    Tile(128, 128, 2, 1, 2, 6, 2, 1, 1.45, "fills the machine with few rows or few tiles"),
    Tile(64, 128, 1, 1, 1, 8, 2, 1, 1.6, "few rows: reads b at memory speed, with many bytes in flight"),
)

MAX_PARTS = 8  # per tile
LEAST_PART = 4  # blocks of the reduction: less of a tile is not handed over (``TileScheduler::least_part``)

# What estimated_seconds knows of an H200 (docs/log). Only the order of the candidates depends on it.
_L2_BYTES_PER_CLOCK = 38  # per SM, of reads that no other CTA of the cluster shares
_SMEM_BYTES_PER_CLOCK = 64  # per SM, delivered
_HBM_BYTES_PER_SECOND = 4.4e12
_TILE_CLOCKS = 700  # start and end of a tile that no other work covers,
_STORE_BYTES_PER_CLOCK = 50  # per SM, and its output unless it is deferred
_HAND_OVER_SECONDS = 2.5e-6  # of a shared tile: write, signal, read, beyond the traffic
_PARTIAL_BYTES_PER_SECOND = 4.5e12  # written and read
_SPLIT_HURDLE = 1.01  # sharing that promises less is not worth its workspace


def schedule(problem: GemmProblem, config: GemmConfig, parts: int = 0) -> GemmSchedule:
    """Deals out the tiles. `parts` clusters share those after the last full wave, or all if there are fewer."""
    rows, columns = config.tile_m * config.cluster_m, config.out_n * config.cluster_n
    m_tiles, n_tiles = -(-problem.m // rows), -(-problem.n // columns)
    tiles = m_tiles * n_tiles * problem.batch
    most = max(1, problem.sm_count // config.cluster_size)
    whole = tiles // most * most if parts else tiles
    clusters = most if whole >= most else max(whole, parts)
    group = max(1, round(math.sqrt(most * columns / rows)))
    return GemmSchedule(m_tiles, n_tiles, clusters, min(group, m_tiles), whole, parts)


def candidate_parts(problem: GemmProblem, config: GemmConfig) -> list[int]:
    """Numbers of clusters that could share the tiles after the last full wave: two to eight per tile, or all."""
    most = max(1, problem.sm_count // config.cluster_size)
    rest = schedule(problem, config, most).rest(problem.batch)
    blocks = rest * k_blocks(problem)
    if rest == 0:
        return []
    limit = min(most, MAX_PARTS * rest)
    tried = [*range(2 * rest, limit, rest), limit]
    return [parts for parts in tried if rest < parts and parts * LEAST_PART <= blocks < 2**31]


def first_block(problem: GemmProblem, dealt: GemmSchedule, part: int) -> int:
    """``TileScheduler::first_block`` in Python."""
    share, extra = dealt.shares(problem)
    block, blocks = part * share + min(part, extra), k_blocks(problem)
    within = block % blocks
    if within < LEAST_PART:
        return block - within
    return block - within + blocks if blocks - within < LEAST_PART else block


def deal_units(
    problem: GemmProblem, dealt: GemmSchedule, cluster: int
) -> list[tuple[int, int, int, int, int]]:
    """A cluster's units in order, (batch, m_tile, n_tile, k_begin, k_end): ``TileScheduler`` in Python."""
    plane, blocks = dealt.m_tiles * dealt.n_tiles, k_blocks(problem)
    pieces = [(index, 0, blocks) for index in range(cluster, dealt.whole_tiles, dealt.clusters)]
    if cluster < dealt.parts:
        begin, end = (first_block(problem, dealt, part) for part in (cluster, cluster + 1))
        while begin < end:
            rest = (end - 1) // blocks
            middle = max(begin, rest * blocks)
            pieces.append((dealt.whole_tiles + rest, middle - rest * blocks, end - rest * blocks))
            end = middle
    units = []
    for index, k_begin, k_end in pieces:
        batch, index = divmod(index, plane)
        strip = index // (dealt.group * dealt.n_tiles)
        first = strip * dealt.group
        n_tile, m_tile = divmod(index - first * dealt.n_tiles, min(dealt.group, dealt.m_tiles - first))
        if strip % 2:
            n_tile = dealt.n_tiles - 1 - n_tile
        units.append((batch, first + m_tile, n_tile, k_begin, k_end))
    return units


def estimated_seconds(problem: GemmProblem, tile: Tile, config: GemmConfig, dealt: GemmSchedule) -> float:
    """A model of the kernel's time, to choose among configs and schedules."""
    rows = min(config.tile_m, problem.m)
    read = (rows / config.cluster_n + config.tile_n / config.cluster_m) * 128
    delivered = (rows + config.tile_n) * 128
    block_clocks = max(
        config.tile_m * config.tile_n / 32, read / _L2_BYTES_PER_CLOCK, delivered / _SMEM_BYTES_PER_CLOCK
    )
    blocks_per_tile, rest = k_blocks(problem), dealt.rest(problem.batch)
    waves = -(-dealt.whole_tiles // dealt.clusters)
    blocks = waves * blocks_per_tile + (rest * blocks_per_tile / dealt.parts if dealt.parts else 0)
    pieces = waves + (2 if rest and dealt.parts % rest else bool(rest))
    out_size = 4 if config.out_float else 2
    exposed = 1 if not config.deferred else 0.5 if config.out_float else 0
    stored = exposed * config.tile_m * config.out_n * out_size
    tile_clocks = _TILE_CLOCKS + stored / _STORE_BYTES_PER_CLOCK
    compute = (blocks * block_clocks + pieces * tile_clocks) / (tile.gigahertz * 1e9)
    traffic = (problem.m + problem.b_columns) * problem.k * 2 + problem.m * problem.n * out_size
    traffic *= problem.batch
    hand_over = 0.0
    if dealt.parts:
        in_step = math.gcd(dealt.parts, rest)  # clusters at the same blocks of k: they share what they read
        cluster_rows = config.tile_m * config.cluster_m + config.tile_n * config.cluster_n
        traffic = max(traffic, rest * blocks_per_tile * cluster_rows * 128 / math.sqrt(in_step))
        cuts = dealt.parts - in_step  # between two parts of one tile
        partials = cuts * config.cluster_size * config.tile_m * config.tile_n * 4
        hand_over = _HAND_OVER_SECONDS + 2 * partials / _PARTIAL_BYTES_PER_SECOND
    memory = traffic / _HBM_BYTES_PER_SECOND
    return max(compute, memory) + 0.1 * min(compute, memory) + hand_over


def choose_gemm(problem: GemmProblem) -> tuple[GemmConfig, GemmSchedule]:
    """The config and schedule for a problem that the backend accepts: the least estimated time."""
    best: tuple[float, GemmConfig, GemmSchedule] | None = None
    for tile in TILES:
        config = tile.config(problem)
        if config.infeasible():
            continue
        for parts in (0, *candidate_parts(problem, config)):
            variant = replace(config, split=parts > 0)
            dealt = schedule(problem, variant, parts)
            seconds = estimated_seconds(problem, tile, variant, dealt) * (_SPLIT_HURDLE if parts else 1)
            if best is None or seconds < best[0]:
                best = seconds, variant, dealt
    if best is None:
        raise LookupError(f"no tile of TILES is feasible for {problem}")
    return best[1:]


def declared_configs() -> list[tuple[str, GemmConfig]]:
    """Variants that a linear layer may get, with a name: what is compiled ahead of time. Others follow when needed."""
    declared = []
    for tile in TILES:
        for dtype, activation in (("float16", None), *(("bfloat16", name) for name in (None, *ACTIVATIONS))):
            problem = GemmProblem(
                dtype,
                dtype,
                "cuda",
                (9, 0),
                132,
                1,
                8192,
                8192,
                8192,
                bias=activation == "gelu",
                activation=activation,
            )
            if tile.config(problem).infeasible():
                continue
            for split in (False, True):
                parts = (
                    f"gemm-{tile.tile_m}x{tile.tile_n}",
                    activation or "plain",
                    "split" if split else "",
                    dtype,
                )
                declared.append(("-".join(filter(None, parts)), replace(tile.config(problem), split=split)))
    return declared
