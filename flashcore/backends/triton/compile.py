"""Compile a config's kernels for any GPU without having one, and report what they need. For tests and tuning."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource, CompiledKernel

from flashcore.backends.triton.attention_bwd import attention_bwd_dkdv, attention_bwd_dq
from flashcore.backends.triton.attention_fwd import attention_fwd
from flashcore.backends.triton.configs import Tile, TritonConfig, padded_head_dim
from flashcore.problem import AttentionProblem

_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs."""

    kernel: str
    shared: int  # bytes of shared memory per program
    registers: int  # per thread
    spilled: int  # bytes per thread that did not fit in registers


def compile_for(
    problem: AttentionProblem, config: TritonConfig, arch: tuple[int, int]
) -> dict[str, CompiledKernel]:
    """The kernels of a config for compute capability `arch`, by name, for tensors with aligned, dense rows."""
    flags = {
        "GROUP": problem.group_size, "CAUSAL": problem.causal, "HEAD_DIM": problem.head_dim,
        "BLOCK_D": padded_head_dim(problem.head_dim),
    }  # fmt: skip
    forward_flags = {
        "PACK": config.pack_gqa,
        "SIGN": 1,
        "SPLITS": config.splits,
        "Q_REGS": config.forward.q_registers,
    }
    kernels = {
        "attention_fwd": (attention_fwd, config.forward, "kv", flags | forward_flags),
        "attention_bwd_dq": (attention_bwd_dq, config.dq, "kv", flags),
        "attention_bwd_dkdv": (attention_bwd_dkdv, config.dkdv, ("q", "dout"), flags),
    }
    float32 = {"lse", "stats"} | ({"out"} if config.splits > 1 else set())
    compiled = {
        name: _compile(kernel, tile, streams, constants, problem, arch, float32)
        for name, (kernel, tile, streams, constants) in kernels.items()
    }
    return compiled


def resources(name: str, compiled: CompiledKernel) -> Resources:
    """Registers and spills as Triton's assembler reports them."""
    capability = compiled.metadata.target.arch
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={sm_arch_from_capability(capability)}"]
        report = subprocess.run(
            [*command, str(ptx), "-o", str(ptx.with_suffix(".cubin"))],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    registers, spilled = (
        int(re.search(pattern, report)[1]) for pattern in (r"Used (\d+) reg", r"(\d+) bytes spill st")
    )
    return Resources(name, compiled.metadata.shared, registers, spilled)


def _compile(kernel, tile: Tile, streams, constants, problem, arch, float32) -> CompiledKernel:
    """Compile with the signature that the launcher produces for aligned tensors with strides of many elements."""
    element = _TYPES[problem.dtype]
    rows = tile.tile_n if kernel is not attention_bwd_dkdv else tile.tile_m
    constants = constants | {
        "TILE_M": tile.tile_m, "TILE_N": tile.tile_n, "LOOKAHEAD": tile.lookahead, "TMA": tile.tma
    }  # fmt: skip
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            values[(i,)] = constants[name]
        elif name.startswith("strides"):
            dense_last = () if name == "strides_out" and kernel is attention_fwd else ("constexpr",)
            signature[name] = ("i32",) * (4 - len(dense_last)) + dense_last
            if dense_last:
                values[(i, 3)] = 1
            for j in range(4 - len(dense_last)):
                attributes[(i, j)] = [["tt.divisibility", 16]]
        elif name in streams and tile.tma:
            signature[name] = f"tensordesc<{element}[1, 1, {rows}, {constants['BLOCK_D']}]>"
        elif name.startswith("scale"):
            signature[name] = "fp32"
        elif name in ("batch_heads", "section", "seqlen_q", "seqlen_k", "heads_k", "rows"):
            signature[name] = "i32"
        else:
            signature[name] = "*fp32" if name in float32 else f"*{element}"
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    target = GPUTarget("cuda", arch[0] * 10 + arch[1], 32)
    return triton.compile(source, target, {"num_warps": tile.warps, "num_stages": tile.stages})
