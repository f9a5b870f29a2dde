"""Kernels' own sources, compiled for the CPU with their instructions emulated (emulation_sm90.h).

It shows layouts, descriptors, masks, the barriers' counts and phases, and that nothing reads what nobody wrote; not
what only a GPU has: asynchrony, memory ordering, several CTAs at once, speed.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

from flashcore.backends.hopper import tma
from flashcore.backends.hopper.backward_configs import (
    BackwardConfig,
    DqConfig,
    ProductConfig,
    RowsConfig,
    WideConfig,
)
from flashcore.backends.hopper.configs import ForwardConfig
from flashcore.backends.hopper.jit import score_source, sequence_source
from tests.backends.hopper.test_decode_emulated import added_parameters, compiler

HERE = Path(__file__).parent
DEVICE = HERE.parents[2] / "flashcore" / "device"

RUN = """
extern "C" void run(int grid, const TensorMap* maps, {parameters}) {{
  gridDim.x = grid;
  named.clear();
  launch(grid, 1, Config::threads, Config::smem_bytes + 1024, [&] {{ {call}; }});
}}
"""
# By source: the parameters that are no tensor maps, and the call.
ENTRIES = {
    ForwardConfig: (
        "float* lse, float scale_log2, int batch, int heads_q, u64 by_heads_q, u64 by_group_size, int seqlen_q, "
        "int seqlen_k, int left, int right, int m_blocks, u64 by_m_blocks, int paired, int paired_rounds, "
        "u64 by_single_heads",
        "attention_forward_sm90(maps[0], maps[1], maps[2], maps[3], lse, scale_log2, batch, heads_q, by_heads_q, "
        "by_group_size, seqlen_q, seqlen_k, left, right, m_blocks, by_m_blocks, paired, paired_rounds, "
        "by_single_heads)",
    ),
    RowsConfig: (
        "const u16* out, const u16* dout, const float* lse, const float* dlse, float* rows, u32* turns, const u64* s, "
        "int heads_q, int seqlen_q, int m_blocks, int head_dim",
        "attention_backward_rows_sm90(out, dout, lse, dlse, rows, turns, s[0], s[1], s[2], s[3], s[4], s[5], heads_q, "
        "seqlen_q, m_blocks, head_dim)",
    ),
    BackwardConfig: (
        "const float* rows, float* dq, u32* turns, float scale, float scale_log2, int batch, int heads_k, "
        "int group_size, int seqlen_q, int seqlen_k, int left, int right, int m_blocks, int n_blocks, int section",
        "attention_backward_sm90(maps[0], maps[1], maps[2], maps[3], maps[4], maps[5], rows, dq, turns, scale, "
        "scale_log2, batch, heads_k, group_size, seqlen_q, seqlen_k, left, right, m_blocks, n_blocks, section)",
    ),
    WideConfig: (
        "const float* rows, u8* ds, float scale_grad, float scale_log2, int first_head, int heads, int heads_k, "
        "int group_size, int seqlen_q, int seqlen_k, int left, int right, int m_blocks, int first_n, int n_blocks, "
        "int section",
        "attention_backward_wide_sm90(maps[0], maps[1], maps[2], maps[3], maps[4], maps[5], rows, ds, scale_grad, "
        "scale_log2, first_head, heads, heads_k, group_size, seqlen_q, seqlen_k, left, right, m_blocks, first_n, "
        "n_blocks, section)",
    ),
    ProductConfig: (
        "const u8* ds, float4* sums, int goes_on, int ends, float scale, int first_head, int heads_q, int group_size, "
        "int seqlen_k, int left, int right, int m_blocks, int first_n, int n_blocks",
        "attention_backward_product_sm90(maps[0], maps[1], ds, sums, goes_on, ends, scale, first_head, heads_q, "
        "group_size, seqlen_k, left, right, m_blocks, first_n, n_blocks)",
    ),
    DqConfig: (
        "const float* sums, float scale, int heads_q, int m_blocks, int m_begin",
        "attention_backward_dq_sm90(maps[0], sums, scale, heads_q, m_blocks, m_begin)",
    ),
}


@functools.cache
def built(config) -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp(prefix="flashcore-emulated-"))
    try:
        for name in ("attention", "core", "ptx"):
            (folder / name).mkdir()
        for header in ("emulation.h", "emulation_sm90.h"):
            shutil.copy(HERE / header, folder)
        for header in (DEVICE / "ptx").iterdir():
            (folder / "ptx" / header.name).write_text('#include "../emulation_sm90.h"\n')
        for layer in ("core", "attention"):
            for header in (DEVICE / layer).iterdir():
                text = header.read_text().replace(
                    "extern __shared__ __align__(1024) u8 raw_smem[];", "u8* const raw_smem = aligned_memory();"
                )
                lines = [
                    "bits = low_word | u64(1u << 30 | 1024 / 16) << 32;" if line.lstrip().startswith("asm(") else line
                    for line in text.splitlines()
                ]
                (folder / layer / header.name).write_text("\n".join(lines) + "\n")
        constants = config.constants().items()
        members = "".join(f"static constexpr int {name} = {int(value)};" for name, value in constants)
        members += f"static constexpr int smem_bytes = {config.smem_bytes};" if "smem_bytes" not in members else ""
        parameters, call = ENTRIES[type(config)]
        defined = sequence_source(getattr(config, "packed", False))
        if isinstance(config, (ForwardConfig, WideConfig)):
            defined += score_source(config.score, differentiate=isinstance(config, WideConfig))
        added, names = added_parameters(defined)
        parameters, call = parameters + added, call[:-1] + names + ")"
        several = "#define ONE_SPEAKS_FOR_FOUR_WARPS\n" if isinstance(config, ForwardConfig) else ""
        (folder / "all.cpp").write_text(
            f'{several}#include "emulation_sm90.h"\nstruct Config {{ using Element = Bf16; {members} }};\n{defined}'
            f'#include "{config.source}"\n{RUN.format(parameters=parameters, call=call)}'
        )
        options = ["-std=c++20", "-O2", "-march=native", "-ffp-contract=fast", "-w", "-pthread", "-shared", "-fPIC"]
        subprocess.run([compiler(), *options, "all.cpp", "-o", "all.so"], cwd=folder, check=True)
        return ctypes.CDLL(folder / "all.so")
    finally:
        shutil.rmtree(folder)


class Map(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_void_p),
        ("rows", ctypes.c_uint64),
        ("sizes", ctypes.c_longlong * 5),
        ("strides", ctypes.c_longlong * 5),
    ]


def maps(*pairs):
    made = []
    for tensor, rows in pairs:
        if tensor.dim() == 3:  # elements, as tma.py has bytes
            sizes, strides = ((*one[::-1],) for one in tma.packed_layout(tensor))
            strides = [stride // 2 for stride in strides]
        else:
            order = [3, 1, 2, 0]  # innermost first
            sizes, strides = ([*(of[i] for i in order), last] for of, last in ((tensor.shape, 1), (tensor.stride(), 0)))
        made.append(Map(tensor.data_ptr(), rows, (ctypes.c_longlong * 5)(*sizes), (ctypes.c_longlong * 5)(*strides)))
    return (Map * len(made))(*made)
