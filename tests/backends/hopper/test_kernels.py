"""Every declared kernel compiles for sm_90a and is what its design says, as far as that shows without a GPU."""

import collections
import os
import re
import subprocess
from pathlib import Path

import pytest

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings (extra cu13 or cu12)")

from flashcore.backends.hopper import jit  # noqa: E402
from flashcore.backends.hopper.configs import SMEM_LIMIT, declared_configs  # noqa: E402
from flashcore.backends.hopper.decode_configs import DecodeConfig  # noqa: E402
from tools import generate_wgmma  # noqa: E402

CONFIGS = dict(declared_configs())


def disassemble(cubin: bytes, folder: Path) -> list[str]:
    """The instructions of a cubin's kernel, opcode first."""
    import nvidia

    bins = [Path(root) / "cu13" / "bin" for root in nvidia.__path__]
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    environment = {**os.environ, "PATH": os.pathsep.join([*map(str, bins), os.environ["PATH"]])}
    sass = subprocess.run(
        ["cuobjdump", "-sass", path], env=environment, capture_output=True, text=True, check=True
    ).stdout
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\S+)", sass, re.M)


@pytest.mark.parametrize("name", CONFIGS)
def test_kernel(name, tmp_path):
    config = CONFIGS[name]
    kernel = jit.compile_kernel(config)  # asserts the equality of smem_bytes inside the kernel
    if config.consumers > 1:  # an equal share of the file, in steps of eight, which setmaxnreg then moves
        assert kernel.registers == 65536 // config.threads // 8 * 8
    assert kernel.registers * config.threads <= 65536
    assert kernel.spill_bytes == 0
    assert not [text for text in kernel.warnings if "C7519" not in text]  # no WGMMA serialised

    count = collections.Counter(opcode.split(".")[0] for opcode in disassemble(kernel.cubin, tmp_path))
    assert count["LDL"] == count["STL"] == 0
    # Q K^T opens a tile, crosses a seam, continues one; P V continues, crosses and closes. One instruction a k-step.
    # Where the diagonal may halve the first block, opening and crossing exist twice. One tile has no seam.
    # In a window neither has a tile.
    narrow = config.bounded_right and config.tile_n == 128 and not config.one_tile
    if config.one_tile and not (config.bounded_left and config.key_parts == 1):
        qk_sites, pv_sites = 2, 2
    elif config.bounded_left:  # what crosses is a product of scores alone
        crosses = not config.o_in_ring
        qk_sites, pv_sites = 1 + (1 + narrow) * (1 + crosses), 2
    else:
        qk_sites, pv_sites = (5, 4) if narrow else (3, 3)
    assert count["HGMMA"] == qk_sites * config.head_dim // 16 + pv_sites * config.tile_n // 16
    chunks = -(-config.head_dim // 64)
    assert count["UTMALDG"] % chunks == 0
    assert count["UTMALDG"] >= chunks * (config.consumers + 2)
    assert count["UTMASTG"] % chunks == 0
    assert count["UTMASTG"] >= chunks
    assert count["USETMAXREG"] == (2 if config.consumers > 1 else 0)
    assert count["VIMNMX3"] > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 96, 120, 128])
def test_decoding_kernel(head_dim, dtype, tmp_path):
    kernel = jit.compile_kernel(DecodeConfig(dtype, head_dim, head_dim))
    assert 2 * kernel.registers * kernel.config.threads <= 65536  # two CTAs on an SM
    assert 2 * kernel.smem_bytes <= SMEM_LIMIT
    assert kernel.spill_bytes == 0
    assert not kernel.warnings

    count = collections.Counter(opcode.split(".")[0] for opcode in disassemble(kernel.cubin, tmp_path))
    assert count["LDL"] == count["STL"] == 0
    k_chunks, v_chunks = -(-head_dim // 32), -(-head_dim // 64)
    assert count["HMMA"] == 2 * k_chunks + 4 * v_chunks
    assert count["MOVM"] == 2  # P, transposed in registers
    assert count["LDG"] == 2 * (2 * k_chunks + 4 * v_chunks) + 1  # K and V of the first block and of the next; Q


def test_names_of_declared_configs_differ():
    assert len(CONFIGS) == len(declared_configs())


def test_wgmma_wrappers_are_as_generated():
    assert generate_wgmma.TARGET.read_text() == generate_wgmma.source()


def test_device_code_includes_only_its_own_files():
    for file in jit.DEVICE_SOURCES.rglob("*.cuh"):
        for line in file.read_text().splitlines():
            if line.lstrip().startswith("#include"):
                included = re.fullmatch(r'#include "([\w./]+)"', line)
                assert included, f"{file}: {line}"
                assert (file.parent / included[1]).resolve().is_relative_to(jit.DEVICE_SOURCES)


def test_only_the_ptx_layer_has_asm():
    for file in jit.DEVICE_SOURCES.rglob("*.cuh"):
        layer = file.relative_to(jit.DEVICE_SOURCES).parts[0]
        code = re.sub(r"//.*", "", file.read_text())
        if layer not in ("ptx", "core"):
            assert "asm" not in code, file
