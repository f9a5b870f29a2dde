"""What the assembler makes of the matrix product: needs NVRTC and a disassembler, but no GPU."""

import re
from dataclasses import replace

import pytest

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings (extra cu13 or cu12)")

from flashcore.backends.hopper import gemm_configs, jit  # noqa: E402
from flashcore.gemm_problem import GemmProblem  # noqa: E402
from tests.backends.hopper.test_kernels import disassemble  # noqa: E402


def config(tile: int, *, split=False, dtype="bfloat16", out_dtype=None, n=8192, **more):
    problem = GemmProblem(dtype, out_dtype or dtype, "cuda", (9, 0), 132, 1, 8192, n, 8192, **more)
    return replace(gemm_configs.TILES[tile].config(problem), split=split)


TILES = range(len(gemm_configs.TILES))
CONFIGS = dict(gemm_configs.declared_configs()) | {
    **{f"tile{i}-a-along-m": config(i, a_mn_major=True) for i in TILES},
    **{f"tile{i}-b-along-n": config(i, b_mn_major=True) for i in TILES},
    **{f"tile{i}-float32": config(i, dtype="float16", out_dtype="float32", split=True) for i in TILES},
    **{f"tile{i}-float32-whole": config(i, dtype="float16", out_dtype="float32", bias=True) for i in TILES},
    # The widest tile has no registers for it.
    **{f"tile{i}-unaligned": config(i, n=8191, bias=True, activation="silu") for i in TILES if i > 0},
    "float32-swiglu": config(1, out_dtype="float32", bias=True, activation="swiglu", split=True),
    "all-at-once": config(0, bias=True, activation="gelu", split=True, a_mn_major=True, b_mn_major=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_kernel(name, tmp_path):
    variant = CONFIGS[name]
    kernel = jit.compile_kernel(variant)  # asserts the equality of smem_bytes inside the kernel
    assert kernel.spill_bytes == 0
    assert kernel.warnings == ()  # no WGMMA serialised

    opcodes = disassemble(kernel.cubin, tmp_path)
    count = {opcode: opcodes.count(opcode) for opcode in set(opcodes)}
    assert not {"LDL", "STL"} & {opcode.split(".")[0] for opcode in opcodes}
    fragments = variant.tile_m // 64 // variant.consumers
    products = [int(n) for opcode in opcodes for n in re.findall(r"^HGMMA\.64x(\d+)x16", opcode)]
    assert products == [variant.tile_n] * (4 * fragments)  # one block of 64: four steps of 16
    assert count["WARPGROUP.DEPBAR.LE"] == 2  # for the block before; for the last one
    assert ("UTMALDG.3D.MULTICAST" in count) == (variant.cluster_size > 1)
    assert ("UTMASTG.3D" in count) == variant.tma_store
