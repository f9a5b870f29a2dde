"""Where the loads of the matrix product put each element, and where its matrix instructions read it.

A model of TMA's boxes with 128-byte swizzle, of multicast, and of the matrix descriptor's fields (PTX ISA) holds the
two sides against each other for every CTA of a cluster. The descriptors are the kernel's own: the compiler evaluates
them. Needs NVRTC, but no GPU.
"""

import re
from dataclasses import dataclass, replace

import numpy as np
import pytest

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings (extra cu13 or cu12)")

from flashcore.backends.hopper import gemm_configs, jit  # noqa: E402
from flashcore.backends.hopper.gemm_configs import TILE_K, Tile  # noqa: E402
from flashcore.gemm_problem import GemmProblem  # noqa: E402

STEPS = TILE_K // 16
RANK_BIT = 24  # a CTA's own addresses carry its rank in the cluster from this bit on
SLOT = 1024  # where a ring slot's a begins, followed by its b
N = 4096  # columns of the output; the gate's factors begin N columns later

TILES = (
    *gemm_configs.TILES,
    Tile(256, 128, 2, 1, 2, 4, 2, 0, 1.4, "two fragments, half of the columns"),
    Tile(128, 256, 2, 2, 2, 4, 2, 0, 1.4, "both operands shared"),
)


def configs():
    found = []
    for tile in TILES:
        for a_mn_major in (False, True):
            for b_mn_major in (False, True):
                for activation in (None, "swiglu"):
                    problem = GemmProblem(
                        "bfloat16", "bfloat16", "cuda", (9, 0), 132, 1, 4096, N, 4096, a_mn_major, b_mn_major,
                        activation=activation,
                    )  # fmt: skip
                    if (config := tile.config(problem)).infeasible() is None:
                        found.append(config)
    return found


def identity(config) -> str:
    return (
        f"{config.tile_m}x{config.tile_n}-{config.cluster_m}{config.cluster_n}-{'km'[config.a_mn_major]}"
        f"{'kn'[config.b_mn_major]}-{config.activation or 'plain'}"
    )


@dataclass
class Operand:
    """One operand of a slot: `index` names an element (position along m or n, position along k) with one number."""

    mn_major: bool
    rows: int  # of the tile, along m or n
    offset: int  # of the slot's part for this operand

    @staticmethod
    def index(position, k):
        return np.asarray(position) * 2**16 + np.asarray(k)


def swizzled(address):
    """The 16-byte unit of each 128-byte row is XORed with the row's place among eight."""
    return address ^ (address >> 7 & 7) << 4


class Cta:
    """Shared memory as numbers of elements, and the bytes that arrived."""

    def __init__(self, slot_bytes: int):
        self.elements = np.full((SLOT + slot_bytes) // 2, -1, dtype=np.int64)
        self.arrived = 0

    def load_box(self, target: int, box_rows: int, c0: int, c1: int, mn_major: bool):
        """One TMA load: `box_rows` rows of 64 elements, from column c0 and row c1 of memory."""
        row, column = np.meshgrid(np.arange(box_rows), np.arange(64), indexing="ij")
        where = swizzled(target + row * 128 + column * 2) // 2
        assert (self.elements[where] == -1).all(), "two loads write to one place"
        inner, outer = c0 + column, c1 + row
        self.elements[where] = Operand.index(inner, outer) if mn_major else Operand.index(outer, inner)
        self.arrived += where.size * 2


def load_rows(ctas, operand, target, box_rows, row, rows):
    """``GemmKernel::load_rows`` for the first block of the reduction, into each of `ctas`."""
    for cta in ctas:
        if operand.mn_major:
            for c in range(rows // 64):
                cta.load_box(target + c * 64 * 128, box_rows, row + c * 64, 0, True)
        else:
            cta.load_box(target, box_rows, 0, row, False)


def loaded(config, a, b):
    """All CTAs of a cluster after each has run one step of ``GemmKernel::producer``, by rank."""
    cluster = [Cta((config.tile_m + config.tile_n) * 128) for _ in range(config.cluster_size)]
    a_rows, b_rows = config.tile_m // config.cluster_n, config.out_n // config.cluster_m
    for rank in range(config.cluster_size):
        m_rank, n_rank = rank % config.cluster_m, rank // config.cluster_m
        a_row, b_row = m_rank * config.tile_m + n_rank * a_rows, n_rank * config.out_n + m_rank * b_rows
        sharing_a = [cluster[m_rank + i * config.cluster_m] for i in range(config.cluster_n)]
        sharing_b = [cluster[i + n_rank * config.cluster_m] for i in range(config.cluster_m)]
        load_rows(sharing_a, a, a.offset + n_rank * a_rows * 128, config.a_box_rows, a_row, a_rows)
        for half in range(config.tile_n // config.out_n):
            target = b.offset + (half * config.out_n + m_rank * b_rows) * 128
            load_rows(sharing_b, b, target, config.b_box_rows, b_row + half * N, b_rows)
    return cluster


def ptx(source: str) -> str:
    """NVRTC's assembly of a translation unit."""

    def checked(result):
        assert result[0] == nvrtc.nvrtcResult.NVRTC_SUCCESS, result[0]
        return result[1] if len(result) == 2 else None

    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), b"words.cu", 0, [], []))
    options = [b"-arch=compute_90a", b"-std=c++17", b"-default-device"]
    checked(nvrtc.nvrtcCompileProgram(program, len(options), options))
    text = b" " * checked(nvrtc.nvrtcGetPTXSize(program))
    checked(nvrtc.nvrtcGetPTX(program, text))
    return text.decode()


def descriptor_words(config, a_offset: int, b_offset: int) -> tuple[dict, dict]:
    """Low words by (rank, warpgroup, fragment, step) for a, by (rank, step) for b: the kernel's own functions."""
    fragments = config.tile_m // 64 // config.consumers
    ranks, steps = range(config.cluster_size), range(STEPS)
    a_keys = [
        (r, w, f, s) for r in ranks for w in range(config.consumers) for f in range(fragments) for s in steps
    ]
    b_keys = [(r, s) for r in ranks for s in steps]
    calls = [f"a_word({r << RANK_BIT | a_offset}u, {w}, {f}, {s})" for r, w, f, s in a_keys]
    calls += [f"b_word({r << RANK_BIT | b_offset}u, {s})" for r, s in b_keys]
    values = ", ".join(f"GemmKernel<Config>::Consumer::{call}" for call in calls)
    source = jit.kernel_source(config).split('extern "C" __global__')[0]
    source += f'\nextern "C" __device__ const u32 words[] = {{{values}}};\n'
    text = re.search(r"\.b8 words\[\d+\] = \{(.*?)\}", ptx(source), re.S)[1]
    data = bytes(map(int, text.split(","))).ljust(4 * len(calls), b"\0")  # zeros at the end are left out
    found = np.frombuffer(data, "<u4").tolist()
    return dict(zip(a_keys, found, strict=False)), dict(zip(b_keys, found[len(a_keys) :], strict=True))


def read(cta: Cta, word: int, rows: int, mn_major: bool) -> np.ndarray:
    """The (rows, 16) elements that a matrix instruction takes: PTX ISA, "Strides", 128-byte swizzle."""
    start, leading, stride = (word & 0x3FFF) << 4, (word >> 16 & 0x3FFF) << 4, 1024
    row, k = np.meshgrid(np.arange(rows), np.arange(16), indexing="ij")
    if mn_major:
        address = start + row // 64 * leading + row % 64 * 2 + k // 8 * stride + k % 8 * 128
    else:
        address = start + row // 8 * stride + row % 8 * 128 + k * 2
    where = swizzled(address) // 2
    inside = where < cta.elements.size
    return np.where(inside, cta.elements[np.where(inside, where, 0)], -1)


@pytest.mark.parametrize("config", configs(), ids=identity)
def test_each_element_is_read_where_it_was_written(config):
    a = Operand(config.a_mn_major, config.tile_m, SLOT)
    b = Operand(config.b_mn_major, config.tile_n, SLOT + config.tile_m * 128)
    a_words, b_words = descriptor_words(config, a.offset, b.offset)
    for rank, cta in enumerate(loaded(config, a, b)):
        assert cta.arrived == (config.tile_m + config.tile_n) * 128  # what the barrier expects
        m_rank, n_rank = rank % config.cluster_m, rank // config.cluster_m
        for (of, wg, fragment, step), word in a_words.items():
            if of == rank:
                row = m_rank * config.tile_m + wg * config.tile_m // config.consumers + fragment * 64
                expected = Operand.index(row + np.arange(64)[:, None], step * 16 + np.arange(16))
                assert np.array_equal(read(cta, word, 64, a.mn_major), expected)
        column = np.arange(config.tile_n)
        column = n_rank * config.out_n + column % config.out_n + column // config.out_n * N
        for (of, step), word in b_words.items():
            if of == rank:
                expected = Operand.index(column[:, None], step * 16 + np.arange(16))
                assert np.array_equal(read(cta, word, config.tile_n, b.mn_major), expected)


def test_the_model_finds_a_rank_in_the_leading_offset(monkeypatch):
    """What a cluster's second CTA read before descriptors left its rank out."""
    original = jit.kernel_source
    monkeypatch.setattr(jit, "kernel_source", lambda c: original(c).replace("address & 0xffffff", "address"))
    along_n = next(c for c in configs() if c.b_mn_major and c.cluster_size == 2 and not c.a_mn_major)
    with pytest.raises(AssertionError):
        test_each_element_is_read_where_it_was_written(along_n)
    test_each_element_is_read_where_it_was_written(replace(along_n, b_mn_major=False))
