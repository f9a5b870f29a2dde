"""The backward's kernels compile for sm_90a and are what their design says, as far as that shows without a GPU."""

import collections
import dataclasses

import pytest

pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings (extra cu13 or cu12)")

from flashcore.backends.hopper import jit
from flashcore.backends.hopper.backward_configs import (
    BACKWARD_TABLE,
    DqConfig,
    ProductConfig,
    RowsConfig,
    declared_backward_configs,
    declared_wide_configs,
)
from tests.backends.hopper.test_kernels import disassemble

CONFIGS = dict(declared_backward_configs())


def opcodes(cubin: bytes, folder) -> list[str]:
    return [opcode.split(".")[0] for opcode in disassemble(cubin, folder)]


@pytest.mark.parametrize("wait_limit", [0, 1000])
@pytest.mark.parametrize("name", CONFIGS)
def test_kernel(name, wait_limit, tmp_path):
    config = dataclasses.replace(CONFIGS[name], wait_limit=wait_limit)
    kernel = jit.compile_kernel(config)  # asserts the equality of smem_bytes inside the kernel
    assert kernel.registers == 65536 // config.threads // 8 * 8  # which setmaxnreg then moves
    assert kernel.spill_bytes == 0
    assert not kernel.warnings  # above all, no WGMMA serialised

    code = opcodes(kernel.cubin, tmp_path)
    count = collections.Counter(code)
    assert count["LDL"] == count["STL"] == 0
    # S and dP before the loop and in it; dV, dK and dQ in it and after it. One instruction a step of 16.
    s_or_dp = config.head_dim // 16
    dv_or_dk, dq = config.tile_m // 16, config.tile_n // 16
    assert count["HGMMA"] == 4 * s_or_dp + 2 * (2 * dv_or_dk + dq)
    chunks = config.head_dim // 64
    assert count["UTMASTG"] == 2 * chunks
    assert count["UBLKRED"] == 1
    assert count["USETMAXREG"] == 2
    # The exponentials of the loop lie behind its S, dV and dK, and before the wait for those: under them.
    products = [i for i, opcode in enumerate(code) if opcode == "HGMMA"]
    issued = products[2 * s_or_dp + s_or_dp + 2 * dv_or_dk - 1]
    assert "MUFU" in code[issued : products[2 * s_or_dp + s_or_dp + 2 * dv_or_dk]]


@pytest.mark.parametrize("wait_limit", [0, 1000])
@pytest.mark.parametrize("config", [config for _, config in declared_wide_configs()], ids=str)
def test_kernels_of_wide_heads(config, wait_limit, tmp_path):
    config = dataclasses.replace(config, wait_limit=wait_limit)
    product = ProductConfig(config.dtype, config.head_dim, config.bounded_left, config.bounded_right, False, wait_limit)
    counts = []
    for one in (config, product, dataclasses.replace(product, rounds=True)):
        kernel = jit.compile_kernel(one)
        assert kernel.registers == 65536 // one.threads // 8 * 8
        assert kernel.spill_bytes == 0
        assert not kernel.warnings  # above all, no WGMMA serialised
        counts.append(collections.Counter(opcodes(kernel.cubin, tmp_path)))
        assert counts[-1]["LDL"] == counts[-1]["STL"] == 0
    # S and dP before the loops and in them, dV and dK in them; one instruction a step of 16.
    assert counts[0]["HGMMA"] == 4 * config.head_dim // 16 + 2 * 4
    assert counts[1]["HGMMA"] == counts[2]["HGMMA"] == 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("row", BACKWARD_TABLE, ids=lambda row: row.head_dim)
def test_kernels_before_and_after(row, dtype, tmp_path):
    rows = jit.compile_kernel(RowsConfig(dtype, row.head_dim, row.tile_m))
    dq = jit.compile_kernel(DqConfig(dtype, row.tile_m))
    for kernel in (rows, dq):
        assert kernel.registers <= 64  # four CTAs of 256 threads on an SM
        assert kernel.spill_bytes == 0
        assert not kernel.warnings
    count = collections.Counter(disassemble(rows.cubin, tmp_path))
    wide_loads = sum(n for opcode, n in count.items() if opcode.startswith("LDG.E.128"))
    assert wide_loads == 2 * row.tile_m * row.head_dim // 2048
