"""Compile a kernel for any GPU without having one, and report what it needs. For tests and tuning."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from flashcore.backends.triton.attention import backward_constants, page_size
from flashcore.backends.triton.attention_bwd import attention_bwd_dkdv, attention_bwd_dq
from flashcore.backends.triton.attention_fwd import attention_fwd
from flashcore.backends.triton.configs import Tile
from flashcore.problem import AttentionProblem

_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
_INTEGERS = (
    "batch_heads", "section", "seqlen_q", "seqlen_k", "total_q", "total_k", "heads_k", "rows", "stats_rows",
    "stats_tile", "left", "right",
)  # fmt: skip
_FUNCTIONS = {
    "forward": attention_fwd, "dq": attention_bwd_dq, "dkdv": attention_bwd_dkdv, "dk": attention_bwd_dkdv,
    "dv": attention_bwd_dkdv,
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs."""

    shared: int  # bytes of shared memory per program
    registers: int  # per thread
    spilled: int  # bytes per thread that did not fit in registers


def compile_kernel(
    kernel: str, problem: AttentionProblem, tile: Tile, arch: tuple[int, int], pack_gqa: bool = False
) -> CompiledKernel:
    """Kernel "forward", "dq", "dkdv", or "dk" or "dv" alone, as the launcher compiles it for aligned, dense tensors."""
    function = _FUNCTIONS[kernel]
    element = _TYPES[problem.dtype]
    constexprs = backward_constants(problem, tile, tile.tile_m) | {
        "PACK": pack_gqa, "SIGN": 1, "SINK": problem.score.sink is not None, "Q_REGS": tile.q_registers, "DLSE": False,
        "DK": "dk" in kernel, "DV": "dv" in kernel, "PAGE": page_size(problem),
    }  # fmt: skip
    # What the copy engine reads with tma.
    streams, stream_rows = (
        (("q", "dout"), tile.tile_m) if function is attention_bwd_dkdv else (("k", "v"), tile.tile_n)
    )
    columns = dict(zip(streams, (constexprs["BLOCK_D"], constexprs["BLOCK_DV"]), strict=True))
    captured = problem.score.captured
    places = len(problem.queries.tensors) + len(problem.keys.tensors)
    strided = [len(shape) for _, shape in captured]  # dimensions of the tensors whose strides are passed
    if problem.paged:
        strided += [2 if name.startswith("table") else 1 for name in problem.tensors[:places]]
    nothing = {"captured": not (captured or places), "strides_captured": not strided, "sizes": not captured}
    aligned = [["tt.divisibility", 16]]
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constexprs:
            signature[name], values[(i,)] = "constexpr", constexprs[name]
        elif nothing.get(name):
            signature[name], values[(i,)] = "constexpr", None
        elif name == "captured":
            signature[name] = (*(f"*{_TYPES[dtype]}" for dtype, _ in captured), *("*i32",) * places)
            attributes |= {(i, j): aligned for j in range(len(captured) + places)}
        elif name == "sizes":
            signature[name] = tuple(("i32",) * len(shape) for _, shape in captured)
        elif name == "strides_captured":
            signature[name] = tuple(("i32",) * (dims - 1) + ("constexpr",) for dims in strided)
            for j, dims in enumerate(strided):
                attributes |= {(i, j, k): aligned for k in range(dims - 1)}
                values[(i, j, dims - 1)] = 1
        elif name.startswith(
            "strides"
        ):  # the forward's out has a leading dimension for splits, and no last stride
            last = () if (kernel, name) == ("forward", "strides_out") else ("constexpr",)
            signature[name] = ("i32",) * (4 - len(last)) + last
            attributes |= {(i, j): aligned for j in range(4 - len(last))}
            values |= {(i, 3): 1} if last else {}
        elif name in streams and constexprs["TMA"]:
            signature[name] = f"tensordesc<{element}[1, 1, {stream_rows}, {columns[name]}]>"
        elif name in ("scale", "scale_log2", "scale_grad"):
            signature[name] = "fp32"
        elif name in _INTEGERS:
            signature[name] = "i32"
        else:
            signature[name] = "*fp32" if name in ("lse", "dlse", "stats", "sink") else f"*{element}"
            attributes[(i,)] = aligned
    source = ASTSource(function, signature, values, attributes)
    target = GPUTarget("cuda", arch[0] * 10 + arch[1], 32)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers}
    return triton.compile(source, target, options)


def resources(compiled: CompiledKernel) -> Resources:
    """Shared memory as Triton allots it; registers and spills as its assembler reports them."""
    tools = triton.knobs.nvidia
    blackwell = compiled.metadata.target.arch >= 100 and hasattr(tools, "ptxas_blackwell")  # from Triton 3.6 on
    assembler = tools.ptxas_blackwell if blackwell else tools.ptxas
    target = re.search(r"^\.target (\w+)", compiled.asm["ptx"], re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        command = [assembler.path, "-v", f"--gpu-name={target}", str(ptx), "-o", str(ptx.with_suffix(".cubin"))]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    spilled = int(re.search(r"(\d+) bytes spill stores", report)[1])
    return Resources(compiled.metadata.shared, registers, spilled)
