"""Which tiles the Triton kernels use: what a config is, which one a problem gets, and why.

Pure arithmetic: needs neither torch nor Triton. One table per GPU family; in it the first row that has the problem's
head_dim (the larger of its two, rounded up to a power of two), applies to it and fits in the device's shared memory is
taken. Tiles were tuned without a mask and with a causal one; a window gets those of the causal mask. A row from the
user's own table (written by ``python -m flashcore.backends.triton.tune --install``) goes before them all. A GPU without
a table gets the safe rows, which fit anywhere.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from flashcore import disk
from flashcore.errors import FlashCoreWarning
from flashcore.mask import FULL
from flashcore.problem import AttentionProblem

MAX_HEAD_DIM = 256
FULL_GRID = 0.8  # of the SMs: a grid that fills fewer is cut into splits
MAX_SPLITS = 128
COMBINATION = 512  # keys that a program reads in the time that combining splits takes, more or less
L2_SHARE = 24 * 2**20  # bytes of the L2 cache that K and V of one section of heads may fill

# Largest shared memory of one program in bytes, by compute capability, where the device itself cannot be asked.
SHARED_MEMORY = {
    (8, 0): 166912, (8, 6): 101376, (8, 7): 166912, (8, 9): 101376, (9, 0): 232448, (10, 0): 232448,
    (10, 3): 232448, (12, 0): 101376, (12, 1): 101376,
}  # fmt: skip
LEAST_SHARED_MEMORY = 101376

_ITEM_SIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Tile:
    """How one kernel cuts its problem."""

    tile_m: int  # query rows
    tile_n: int  # keys
    warps: int  # per program
    stages: int  # tiles of each stream held in shared memory
    lookahead: bool = False  # compute the next scores before this tile's last product; see attention_fwd.py
    tma: bool = False  # read the streams by the copy engine, where the tensors allow it
    q_registers: bool = False  # forward with lookahead: keep Q in registers
    registers: int | None = (
        None  # per thread at most, so that more programs fit on an SM; None: what it takes
    )

    def __str__(self) -> str:
        flags = "".join(f", {name}" for name in ("lookahead", "tma", "q_registers") if getattr(self, name))
        flags += f", {self.registers} registers" if self.registers else ""
        return f"{self.tile_m} x {self.tile_n}, {self.warps} warps, {self.stages} stages{flags}"


@dataclass(frozen=True)
class TritonConfig:
    """Everything that the launcher needs to know about a problem besides its dimensions."""

    forward: Tile
    dq: Tile
    dkdv: Tile
    dv: Tile | None = None  # dV has a pass of its own, and dkdv computes dK alone; None: both at once
    pack_gqa: bool = False  # one program handles all query heads of a key head
    splits: int = 1  # programs that share the keys of one row tile
    why: str = field(default="", compare=False)

    def __str__(self) -> str:
        grid = (", pack_gqa" if self.pack_gqa else "") + (
            f", {self.splits} splits" if self.splits > 1 else ""
        )
        dkdv = f"dkdv {self.dkdv}" if self.dv is None else f"dk {self.dkdv}; dv {self.dv}"
        return f"tile {self.forward}{grid}; dq {self.dq}; {dkdv}"


@dataclass(frozen=True)
class Row:
    """A row of a table: the tile for problems it applies to, and the reason."""

    kernel: str  # "forward", "dq", "dkdv" or "dv"
    head_dim: int  # rounded up to a power of two
    applies: Callable[[AttentionProblem, int], bool]  # of the problem and its rows per program's head
    tile: Tile
    smem_kib: (
        int  # shared memory of one program at most, rounded up; tests compile every row to hold it to that
    )
    why: str


def padded_head_dim(head_dim: int) -> int:
    """Columns of a tile: the next power of two, at least 16, the shortest reduction of a matrix product."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _16bit(problem: AttentionProblem, rows: int) -> bool:
    return problem.dtype != "float32"


def _float32(problem: AttentionProblem, rows: int) -> bool:
    return problem.dtype == "float32"


def _few_rows(limit: int) -> Callable[[AttentionProblem, int], bool]:
    return lambda problem, rows: rows <= limit and problem.dtype != "float32"


def widest_head_dim(problem: AttentionProblem) -> int:
    """Columns of the wider of a problem's tiles."""
    return padded_head_dim(max(problem.head_dim, problem.head_dim_v))


def visible_keys(problem: AttentionProblem, queries: int = 1) -> int:
    """How many keys so many neighbouring queries see together, at most."""
    mask = problem.mask
    if mask.left is None or mask.right is None:
        return problem.seqlen_k
    return min(problem.seqlen_k, mask.left + mask.right + queries)


def _when(masked: bool | None = None, most_keys: float = math.inf) -> Callable[[AttentionProblem, int], bool]:
    """16-bit problems with a mask, or none (None: either), whose queries see at most so many keys."""
    return lambda problem, rows: (
        problem.dtype != "float32"
        and masked in (None, problem.mask != FULL or problem.score.change is not None)
        and visible_keys(problem) <= most_keys
    )


def _small_grid(problem: AttentionProblem, rows: int) -> bool:
    """128-row tiles would leave SMs idle."""
    tiles = problem.batch * problem.heads_q * math.ceil(problem.seqlen_q / 128)
    return _16bit(problem, rows) and tiles < FULL_GRID * problem.sm_count


_NO_TENSOR_CORES = "IEEE float32 runs without tensor cores: small tiles keep the operands in registers"
_DECODE = "as few rows as a product allows: reading keys takes the time"
_SMALL_GRID = "128 rows per tile would leave SMs idle"
_MEASURED = "fastest on an H200 (docs/log/0016)"
_ONE_PER_SM = f"{_DECODE}; two tiles of keys and values under way keep one program per SM busy, {_MEASURED}"
_UNTRIED = "chosen by registers and shared memory, not measured"

_FLOAT32 = (
    Row("forward", 64, _float32, Tile(64, 32, 4, 2), 41, _NO_TENSOR_CORES),
    Row("forward", 128, _float32, Tile(32, 32, 4, 2), 52, _NO_TENSOR_CORES),
    Row("forward", 256, _float32, Tile(32, 16, 4, 2), 67, _NO_TENSOR_CORES),
    Row("dq", 64, _float32, Tile(32, 32, 4, 2), 36, _NO_TENSOR_CORES),
    Row("dq", 128, _float32, Tile(32, 32, 4, 2), 68, _NO_TENSOR_CORES),
    Row("dq", 256, _float32, Tile(16, 16, 4, 2), 65, _NO_TENSOR_CORES),
    Row("dkdv", 64, _float32, Tile(16, 32, 4, 2), 27, _NO_TENSOR_CORES),
    Row("dkdv", 128, _float32, Tile(16, 32, 4, 2), 51, _NO_TENSOR_CORES),
    Row("dkdv", 256, _float32, Tile(16, 16, 4, 2), 66, _NO_TENSOR_CORES),
)

# Any GPU: at most 99 KiB of shared memory, no TMA. Rows for head_dim 64 serve everything below.
_SAFE = (
    Row("forward", 64, _few_rows(16), Tile(16, 64, 4, 3), 36, _DECODE),
    Row("forward", 64, _16bit, Tile(64, 64, 4, 2), 41, _UNTRIED),
    Row("forward", 128, _few_rows(16), Tile(16, 64, 4, 3), 70, _DECODE),
    Row("forward", 128, _16bit, Tile(64, 32, 4, 2), 49, _UNTRIED),
    Row("forward", 256, _few_rows(16), Tile(16, 32, 4, 3), 73, _DECODE),
    Row("forward", 256, _16bit, Tile(64, 16, 4, 2), 67, _UNTRIED),
    Row("dq", 64, _16bit, Tile(64, 32, 4, 2), 37, _UNTRIED),
    Row("dq", 128, _16bit, Tile(64, 32, 4, 2), 73, _UNTRIED),
    Row("dq", 256, _16bit, Tile(32, 32, 8, 2), 66, _UNTRIED),
    Row("dkdv", 64, _16bit, Tile(32, 64, 4, 2), 41, _UNTRIED),
    Row("dkdv", 128, _16bit, Tile(32, 64, 8, 2), 81, _UNTRIED),
    Row("dkdv", 256, _16bit, Tile(32, 32, 8, 2), 67, _UNTRIED),
    *_FLOAT32,
)

_AMPERE = (  # sm_80: 163 KiB of shared memory
    Row("forward", 64, _few_rows(16), Tile(16, 64, 4, 3), 36, _DECODE),
    Row("forward", 64, _16bit, Tile(128, 64, 4, 3), 64, _UNTRIED),
    Row("forward", 128, _few_rows(16), Tile(16, 64, 4, 3), 70, _DECODE),
    Row("forward", 128, _16bit, Tile(128, 64, 8, 3), 113, _UNTRIED),
    Row("forward", 256, _few_rows(16), Tile(16, 32, 4, 3), 73, _DECODE),
    Row("forward", 256, _16bit, Tile(64, 64, 8, 2), 105, _UNTRIED),
    Row("dq", 64, _16bit, Tile(64, 64, 4, 2), 40, _UNTRIED),
    Row("dq", 128, _16bit, Tile(64, 64, 8, 2), 72, _UNTRIED),
    Row("dq", 256, _16bit, Tile(64, 32, 8, 2), 100, _UNTRIED),
    Row("dkdv", 64, _16bit, Tile(32, 128, 8, 2), 41, _UNTRIED),
    Row("dkdv", 128, _16bit, Tile(64, 64, 8, 2), 73, _UNTRIED),
    Row("dkdv", 256, _16bit, Tile(32, 32, 8, 2), 67, _UNTRIED),
)

_SMALL_SMEM = (  # sm_86, sm_89, sm_120: 99 KiB of shared memory
    Row("forward", 64, _few_rows(16), Tile(16, 64, 4, 3), 36, _DECODE),
    Row("forward", 64, _16bit, Tile(128, 64, 4, 2), 48, _UNTRIED),
    Row("forward", 128, _few_rows(16), Tile(16, 64, 4, 3), 70, _DECODE),
    Row("forward", 128, _16bit, Tile(128, 32, 8, 3), 73, _UNTRIED),
    Row("forward", 256, _few_rows(16), Tile(16, 32, 4, 3), 73, _DECODE),
    Row("forward", 256, _16bit, Tile(64, 32, 8, 2), 69, _UNTRIED),
    Row("dq", 64, _16bit, Tile(64, 64, 4, 2), 40, _UNTRIED),
    Row("dq", 128, _16bit, Tile(64, 32, 4, 2), 52, _UNTRIED),
    Row("dq", 256, _16bit, Tile(32, 32, 8, 2), 66, _UNTRIED),
    Row("dkdv", 64, _16bit, Tile(32, 64, 4, 2), 25, _UNTRIED),
    Row("dkdv", 128, _16bit, Tile(64, 64, 8, 2), 73, _UNTRIED),
    Row("dkdv", 256, _16bit, Tile(32, 32, 8, 2), 67, _UNTRIED),
)

_HOPPER = (  # sm_90: 227 KiB of shared memory, asynchronous matrix products of 64 rows per warpgroup, TMA
    Row("forward", 64, _few_rows(16), Tile(16, 128, 4, 3, tma=True), 71, _ONE_PER_SM),
    Row("forward", 64, _small_grid, Tile(64, 128, 4, 2, lookahead=True, tma=True), 89, f"{_SMALL_GRID}; {_MEASURED}"),
    Row("forward", 64, _when(True, 4096), Tile(64, 64, 4, 3, lookahead=True, tma=True), 65, _MEASURED),
    Row("forward", 64, _16bit, Tile(64, 128, 4, 2, tma=True), 73, f"three programs per SM, {_MEASURED}"),
    Row("forward", 128, _few_rows(16), Tile(16, 128, 4, 3, tma=True), 137, _ONE_PER_SM),
    Row("forward", 128, _when(False), Tile(64, 128, 4, 1, tma=True), 50, f"three programs per SM, {_MEASURED}"),
    Row("forward", 128, _16bit, Tile(64, 64, 4, 2, lookahead=True, tma=True), 97, f"two programs per SM, {_MEASURED}"),
    Row("forward", 256, _few_rows(16), Tile(16, 64, 4, 3, tma=True), 139, f"{_DECODE}; not measured"),
    Row("forward", 256, _16bit, Tile(128, 64, 8, 2, lookahead=True, tma=True), 225, f"the widest, {_MEASURED}"),
    Row("dq", 64, _when(None, 512), Tile(64, 64, 4, 3, tma=True), 65, _MEASURED),
    Row("dq", 64, _16bit, Tile(128, 64, 8, 3, tma=True), 81, _MEASURED),
    Row("dq", 128, _16bit, Tile(64, 64, 4, 2, tma=True), 97, f"two programs per SM, {_MEASURED}"),
    Row("dq", 256, _16bit, Tile(128, 32, 8, 3, tma=True), 225, _MEASURED),
    Row("dkdv", 64, _when(True), Tile(64, 64, 4, 4, tma=True), 82, _MEASURED),
    Row("dkdv", 64, _16bit, Tile(64, 64, 4, 3, tma=True, registers=168), 66, f"three programs per SM, {_MEASURED}"),
    Row("dkdv", 128, _when(True), Tile(32, 64, 4, 3, tma=True), 81, f"two programs per SM, {_MEASURED}"),
    Row("dkdv", 128, _16bit, Tile(64, 64, 4, 2, tma=True), 97, f"two programs per SM, {_MEASURED}"),
    Row("dkdv", 256, _16bit, Tile(32, 128, 8, 3, tma=True), 225, f"no P through shared memory, {_MEASURED}"),
    Row(
        "dv", 256, _16bit, Tile(64, 128, 8, 2, lookahead=True, tma=True), 225,
        f"with dK they leave no registers for 128 keys, {_MEASURED}",
    ),
)  # fmt: skip

_BLACKWELL = (  # sm_100: 227 KiB of shared memory, accumulators in tensor memory, TMA
    Row("forward", 64, _few_rows(16), Tile(16, 64, 4, 3, tma=True), 37, _DECODE),
    Row("forward", 64, _16bit, Tile(128, 64, 4, 3, tma=True), 65, _UNTRIED),
    Row("forward", 128, _few_rows(16), Tile(16, 64, 4, 3, tma=True), 71, _DECODE),
    Row("forward", 128, _16bit, Tile(128, 64, 8, 2, tma=True), 98, _UNTRIED),
    Row("forward", 256, _few_rows(16), Tile(16, 32, 4, 3, tma=True), 74, _DECODE),
    Row("forward", 256, _16bit, Tile(128, 32, 8, 2, tma=True), 130, _UNTRIED),
    Row("dq", 64, _16bit, Tile(128, 64, 8, 2, tma=True), 73, _UNTRIED),
    Row("dq", 128, _16bit, Tile(128, 32, 8, 2, tma=True), 105, _UNTRIED),
    Row("dq", 256, _16bit, Tile(64, 32, 8, 2, tma=True), 145, _UNTRIED),
    Row("dkdv", 64, _16bit, Tile(64, 64, 4, 2, tma=True), 65, _UNTRIED),
    Row("dkdv", 128, _16bit, Tile(32, 128, 8, 2, tma=True), 113, _UNTRIED),
    Row("dkdv", 256, _16bit, Tile(32, 64, 8, 2, tma=True), 161, _UNTRIED),
)  # fmt: skip

TABLES: dict[tuple[int, int], tuple[Row, ...]] = {
    (8, 0): _AMPERE, (8, 7): _AMPERE, (8, 6): _SMALL_SMEM, (8, 9): _SMALL_SMEM, (9, 0): _HOPPER,
    (10, 0): _BLACKWELL, (10, 3): _BLACKWELL, (12, 0): _SMALL_SMEM, (12, 1): _SMALL_SMEM,
}  # fmt: skip


# Where dK and dV have a pass each though no row says so.
_APART = Tile(32, 64, 8, 2)


def _wide_values(problem: AttentionProblem) -> bool:
    return padded_head_dim(problem.head_dim_v) > padded_head_dim(problem.head_dim)


def choose(
    problem: AttentionProblem, shared_memory: int | None = None, user_table: Path | None = None
) -> TritonConfig:
    """The config for a problem that the backend accepts.

    :param shared_memory: bytes one program may have on the actual device; None: by compute capability.
    :param user_table: file of tiles tuned on this machine; need not exist.
    """
    limit = shared_memory or SHARED_MEMORY.get(problem.arch, LEAST_SHARED_MEMORY)
    pack_gqa = problem.group_size > 1 and problem.seqlen_q * problem.group_size <= 128
    members = problem.group_size if pack_gqa else 1
    rows = problem.seqlen_q * members
    forward, why = _tile("forward", problem, rows, limit, user_table)
    dq, dq_why = _tile("dq", problem, rows, limit, user_table)
    dkdv, dkdv_why = _tile("dkdv", problem, rows, limit, user_table)
    dv, dv_why = _tile("dv", problem, rows, limit, user_table)
    if problem.packed:
        forward, dq, dkdv, dv = (tile and _by_pointers(tile, problem) for tile in (forward, dq, dkdv, dv))
        why += "; packed sequences are read by pointers"
    if dv is None and problem.arch != (9, 0) and problem.dtype != "float32" and _wide_values(problem):
        dkdv = dv = _APART
        dkdv_why = dv_why = "dK and dV of different widths together take more registers than there are"
    tiles = math.ceil(rows / forward.tile_m) * problem.batch * problem.heads_q // members
    keys = visible_keys(problem, min(problem.seqlen_q, math.ceil(forward.tile_m / members)))
    splits = choose_splits(tiles, math.ceil(keys / forward.tile_n), problem.sm_count, forward)
    if pack_gqa:
        why += f"; packed: a key tile serves {members} query heads"
    if splits > 1:
        why += f"; split: {tiles} tiles leave some of {problem.sm_count} SMs idle"
    if problem.needs_grad:
        why += f"; dq: {dq_why}; " + (f"dkdv: {dkdv_why}" if dv is None else f"dk: {dkdv_why}; dv: {dv_why}")
    return TritonConfig(forward, dq, dkdv, dv, pack_gqa, splits, why)


def _by_pointers(tile: Tile, problem: AttentionProblem) -> Tile:
    """The tile without the copy engine, whose pointers leave no registers for the next scores at 256 columns."""
    return replace(tile, tma=False, lookahead=tile.lookahead and widest_head_dim(problem) < MAX_HEAD_DIM)


def choose_splits(tiles: int, blocks: int, sm_count: int, tile: Tile) -> int:
    """Into how many splits to cut the `blocks` key tiles of each of `tiles` row tiles; 1 when they fill the GPU.

    The smallest number that keeps the SMs of all waves nearly as busy as the best one does: one program per SM is
    enough to read keys at full speed (docs/log/0016). Splits must save each program more keys than combining them is
    worth, and have two blocks or more. Tiles of 16 rows, which do little but read keys, are split for a last wave of
    few programs too.
    """
    if sm_count == 0 or blocks == 0 or (tiles >= FULL_GRID * sm_count and tile.tile_m > 16):
        return 1
    busy = {}
    for splits in range(1, max(1, min(MAX_SPLITS, blocks // 2)) + 1):
        per_split = math.ceil(blocks / splits)
        if splits == 1 or (blocks - per_split) * tile.tile_n >= COMBINATION:
            waves = math.ceil(tiles * splits / sm_count)
            busy[splits] = tiles * blocks / (waves * sm_count * per_split)  # work done over room taken
    best = max(busy.values())
    return next(splits for splits, value in busy.items() if value >= 0.95 * best)


def heads_per_section(problem: AttentionProblem, heads: int) -> int:
    """How many of `heads` heads are processed side by side (`tile_and_head` in tiles.py).

    One after the other where tiles are about equally long, so that all SMs read the same keys. Under a causal mask the
    long tiles of many heads go first; as many heads as keep their keys and values in L2.
    """
    if problem.mask.right is None or problem.mask.left is not None:
        return 1
    head_bytes = problem.seqlen_k * (problem.head_dim + problem.head_dim_v) * _ITEM_SIZE[problem.dtype]
    return max(1, min(heads, L2_SHARE // max(1, head_bytes)))


def _tile(
    kernel: str, problem: AttentionProblem, rows: int, limit: int, user_table: Path | None
) -> tuple[Tile | None, str]:
    """The first tile for a kernel that applies and fits, and why. None for "dv" where it has no pass of its own."""
    head_dim = widest_head_dim(problem)
    small = rows <= 16 or _small_grid(problem, rows)  # tiles are tuned on grids that fill the GPU
    tuned = {} if small or not user_table else _read_user_table(user_table)
    if user_key(kernel, problem) in tuned:
        return tuned[user_key(kernel, problem)], f"tuned on this machine ({user_table})"
    for row in (*TABLES.get(problem.arch, ()), *_SAFE):
        if (
            row.kernel == kernel
            and row.head_dim == max(64, head_dim)
            and row.applies(problem, rows)
            and row.smem_kib * 1024 <= limit
        ):
            narrower = _narrower(kernel, row.tile, problem)
            if narrower is not None:
                return narrower, f"{row.why}; narrower: changing scores takes registers"
            return row.tile, row.why
    if kernel == "dv":
        return None, "computed with dK"
    raise LookupError(f"no tile for {kernel} with head_dim {head_dim} in {limit} bytes of shared memory")


def _narrower(kernel: str, tile: Tile, problem: AttentionProblem) -> Tile | None:
    """Half of a tile's columns of scores, where a score function would take more registers than a tile leaves: for an
    element of a tensor for each score, and for positions beside an output of 256 columns. None: it leaves enough."""
    change = problem.score.change
    if change is None:
        return None
    both = {"query", "key"}
    dense = any(both <= one.names for one in change.lookups)
    full = kernel in ("forward", "dv") and widest_head_dim(problem) == MAX_HEAD_DIM and change.names & both
    side, rows = ("tile_n", tile.tile_m) if kernel in ("forward", "dq") else ("tile_m", tile.tile_n)
    half = getattr(tile, side) // 2
    if not (dense or full) or half < 16:
        return None
    return replace(tile, **{side: half}, warps=max(tile.warps, rows // 16))


def user_key(kernel: str, problem: AttentionProblem) -> str:
    """What a tile in the user's table depends on."""
    mask = "full" if problem.mask == FULL else "causal"
    major, minor = problem.arch or (0, 0)
    gpu = f"sm_{major}{minor} with {problem.sm_count} SMs"
    return f"{gpu}, {kernel} {problem.dtype} head_dim {widest_head_dim(problem)} {mask}"


def write_user_table(path: Path, tiles: dict[str, Tile | None]) -> None:
    """Add `tiles`, by :func:`user_key`, to the table at `path`.

    :raises OSError: it cannot be written.
    """
    table = _read_user_table(path) | tiles
    document = {key: tile and asdict(tile) for key, tile in sorted(table.items())}
    disk.write(path.parent, path.name, data=json.dumps(document, indent=1).encode() + b"\n")
    _read_user_table.cache_clear()


@lru_cache(maxsize=8)
def _read_user_table(path: Path) -> dict[str, Tile | None]:
    """The tiles at `path`; none, and a warning, if what is there is no such table or not to be trusted."""
    try:
        document = json.loads(disk.read(path.parent, path.name))
        if not isinstance(document, dict):
            raise ValueError("it is no table of tiles")
        return {key: _tile_from(key, tile) for key, tile in document.items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(
            f"the tiles tuned on this machine are not used: {path}: {error}. Delete the file, or set "
            "FLASHCORE_CACHE_DIR to a directory of your own.",
            FlashCoreWarning,
            stacklevel=2,
        )
        return {}


def _tile_from(key: str, values: Any) -> Tile | None:
    """A tile as `write_user_table` wrote it. Only dV's may be None.

    :raises ValueError: it is none.
    """
    if values is None and ", dv " in key:
        return None
    try:
        tile = Tile(**values)
    except TypeError:
        raise ValueError(f"{key}: {values} is no tile") from None
    sizes = (tile.tile_m, tile.tile_n, tile.warps, tile.stages, 1 if tile.registers is None else tile.registers)
    powers = (tile.tile_m, tile.tile_n, tile.warps)
    if not (
        all(type(size) is int and size > 0 for size in sizes)
        and all(type(flag) is bool for flag in (tile.lookahead, tile.tma, tile.q_registers))
        and all(size & (size - 1) == 0 for size in powers)
        and min(tile.tile_m, tile.tile_n) >= 16
    ):
        raise ValueError(f"{key}: {values} is no tile")
    return tile
