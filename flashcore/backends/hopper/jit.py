"""From a config to a loaded kernel: source text, NVRTC, the caches, the resource report.

Needs neither a GPU nor a driver until :meth:`CompiledKernel.load`.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import flashcore
from flashcore import disk, env
from flashcore.backends.hopper.configs import ELEMENTS
from flashcore.errors import CompileError
from flashcore.score import Score

DEVICE_SOURCES = Path(flashcore.__file__).parent / "device"
ARCH = "sm_90a"  # wgmma and setmaxnreg exist for exactly this target


class KernelConfig(Protocol):
    """What a kernel's config dataclass offers (configs.py).

    It may also have ``attributes``, a mapping: CU_FUNC_ATTRIBUTE_..., without this prefix, and their values.
    """

    source: str  # file under flashcore/device that defines the kernel
    entry: str  # the kernel's name
    element: str  # device-side element type
    smem_bytes: int

    def constants(self) -> dict[str, int | bool]: ...


@dataclass(frozen=True)
class CompiledKernel:
    """A cubin and what the assembler said about it."""

    config: Any
    cubin: bytes
    registers: int  # per thread at launch
    spill_bytes: int  # spill stores + loads + stack frame, per thread
    warnings: tuple[str, ...]  # of the assembler, such as serialised WGMMA
    seconds: float  # NVRTC's time; 0 if it came from a cache
    from_cache: str | None  # "memory", "disk", or None if it was compiled now

    @property
    def smem_bytes(self) -> int:
        return self.config.smem_bytes

    @functools.cached_property
    def _object(self):
        from cuda.core import ObjectCode

        return ObjectCode.from_cubin(self.cubin, name=self.config.entry)

    @functools.cached_property
    def _loaded(self) -> dict[int, Any]:
        return {}  # by device

    def load(self, device: int):
        """The ``cuda.core.Kernel``, allowed to use its shared memory on this device. Needs a GPU."""
        if (kernel := self._loaded.get(device)) is not None:
            return kernel
        from cuda.bindings import driver

        kernel = self._object.get_kernel(self.config.entry)
        attributes = {"MAX_DYNAMIC_SHARED_SIZE_BYTES": self.smem_bytes, **getattr(self.config, "attributes", {})}
        for name, value in attributes.items():
            attribute = getattr(driver.CUfunction_attribute, f"CU_FUNC_ATTRIBUTE_{name}")
            (error,) = driver.cuKernelSetAttribute(attribute, value, kernel.handle, device)
            if error != driver.CUresult.CUDA_SUCCESS:
                raise RuntimeError(f"cuKernelSetAttribute({name}, {value}): {error}")
        self._loaded[device] = kernel
        return kernel


# ---- source --------------------------------------------------------------------------------------------------------


@functools.cache
def _flatten(path: str) -> str:
    """A device source with its includes pasted in, each file once, so that the text alone decides the cubin."""
    # These precede every kernel file, or those of attention: a printed score needs their functions.
    before = ("ptx/types.cuh", "ptx/math.cuh") if path.startswith("attention/") else ("ptx/types.cuh",)
    seen = {DEVICE_SOURCES / one for one in before if one != path}

    def paste(file: Path) -> str:
        if file in seen:
            return ""
        seen.add(file)
        name = file.relative_to(DEVICE_SOURCES).as_posix()
        lines = [f'#line 1 "{name}"']
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if include := re.fullmatch(r'#include "(.+)"', line):
                lines.append(paste((file.parent / include[1]).resolve()))
                lines.append(f'#line {number + 1} "{name}"')
            elif line != "#pragma once":
                lines.append(line)
        return "\n".join(lines)

    return paste((DEVICE_SOURCES / path).resolve())


def score_source(score: Score, differentiate: bool = False) -> str:
    """``struct Score`` and what a kernel's entry needs to make one (device/attention/score.cuh).

    :param differentiate: with the derivative, for a backward pass.
    """
    members: list[tuple[str, str]] = []  # type and name; the entry's parameters for it
    functions, floats, change = [], "", "s"
    if score.change is not None:
        members.append(("float", "scale"))
        used = [name for name in ("batch", "head", "offset") if name in score.change.names]
        floats = " ".join(f"[[maybe_unused]] const float {name}_f = float({name});" for name in used)
        floats += " [[maybe_unused]] const float score = s * scale;"
        change = score.base.print("cuda")
    printed = {"apply": change}
    if differentiate:
        printed["slope"] = "1.0f" if score.change is None else score.base.derivative.print("cuda")
    functions += [f"""\
  __forceinline__ float {name}(float s, int batch, int head, int query, int key, float query_f, float key_f,
                              int offset) const {{
    {floats}
    return {value};
  }}""" for name, value in printed.items()]
    for slot, (dtype, shape) in enumerate(score.captured):
        name, dims = f"captured{slot}", range(len(shape))
        members.append((f"const {_memory_type(dtype)}*", f"{name}_data"))
        members += [("u64", f"{name}_stride{d}") for d in dims] + [("int", f"{name}_size{d}") for d in dims]
        at = " + ".join(f"u64(min(max(i{d}, 0), {name}_size{d} - 1)) * {name}_stride{d}" for d in dims)
        functions.append(f"""\
  __forceinline__ float {name}({", ".join(f"int i{d}" for d in dims)}) const {{
    return {_load(dtype, f"{name}_data[{at}]")};
  }}""")
    sink = "negative_infinity()"
    if score.sink is not None:
        members.append((f"const {_memory_type(score.sink)}*", "sinks"))
        sink = _load(score.sink, "sinks[head]")
    functions.append(f"  __forceinline__ float sink(int head) const {{ return {sink}; }}")
    body = "\n".join([*(f"  {kind} {name};" for kind, name in members), *functions])
    return f"""\
struct Score {{
  static constexpr bool plain = {str(score.change is None).lower()};
  static constexpr bool has_sink = {str(score.sink is not None).lower()};
{body}
}};
#define SCORE_PARAMETERS {"".join(f", {kind} {name}" for kind, name in members)}
#define SCORE_VALUE {{{", ".join(name for _, name in members)}}}
"""


def sequence_source(packed: bool, paged: bool = False) -> str:
    """What a kernel's entry needs to know of packed sequences (``Sequences`` of device/attention/sequences.cuh)."""
    if not packed:
        return "#define SEQUENCE_PARAMETERS\n#define SEQUENCE_VALUE {}\n"
    sides = [(f"offsets_{side}", f"used_{side}", f"total_{side}", f"longest_{side}") for side in "qk"]
    cleared, sizes = ("of_queries", "of_keys", "of_values"), ("of_heads_q", "of_heads_k", "head_bytes")
    parameters = [f"const int* {a}, const int* {b}, int {c}, int {d}" for a, b, c, d in sides]
    parameters += [f"u8* {name}" for name in cleared] + [f"int {name}" for name in sizes]
    pages = ("table_row", "page_size", "pages") if paged else ()
    parameters += [f"{'u64' if name == 'table_row' else 'int'} {name}" for name in pages]
    value = ", ".join([*("{" + ", ".join(side) + "}" for side in sides), *cleared, *sizes, *pages])
    return f"#define SEQUENCE_PARAMETERS , {', '.join(parameters)}\n#define SEQUENCE_VALUE {{{value}}}\n"


def _memory_type(dtype: str) -> str:
    return "float" if dtype == "float32" else "u16"


def _load(dtype: str, value: str) -> str:
    return value if dtype == "float32" else f"widen<{ELEMENTS[dtype]}>({value})"


def kernel_source(config: KernelConfig) -> str:
    """The complete translation unit of a variant: the config as a struct, its score, then the kernel file."""
    constants = "\n".join(
        f"  static constexpr {'bool' if isinstance(value, bool) else 'int'} {name} = {str(value).lower()};"
        for name, value in config.constants().items()
    )
    score = _flatten("ptx/math.cuh") + "\n" if config.source.startswith("attention/") else ""
    if hasattr(config, "score"):
        score += score_source(config.score, getattr(config, "differentiates", False))
    if hasattr(config, "packed"):
        score += sequence_source(config.packed, getattr(config, "page", 0) > 0)
    return f"""\
{_flatten("ptx/types.cuh")}
struct Config {{
  using Element = {config.element};
{constants}
}};
{score}{_flatten(config.source)}
"""


def source_digest(kernel: str, table: Path) -> str:
    """SHA-256 over a kernel's device code and its table of tiles: names what was measured."""
    parts = (_flatten("ptx/types.cuh"), _flatten(kernel), table.read_text())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


# ---- compilation ---------------------------------------------------------------------------------------------------


@functools.cache
def nvrtc_version() -> str:
    """Version of the NVRTC library that compiles the kernels, such as "13.0"."""
    from cuda.bindings import nvrtc

    major, minor = _nvrtc(nvrtc.nvrtcVersion)
    return f"{major}.{minor}"


@functools.cache
def nvrtc_build() -> str:
    """Which build of NVRTC that is, patch release included: what it writes above the PTX of an empty program."""
    from cuda.bindings import nvrtc

    (program,) = _nvrtc(nvrtc.nvrtcCreateProgram, b"", b"empty.cu", 0, [], [])
    _nvrtc(nvrtc.nvrtcCompileProgram, program, 1, [b"--gpu-architecture=compute_90"])
    (size,) = _nvrtc(nvrtc.nvrtcGetPTXSize, program)
    ptx = bytearray(size)
    _nvrtc(nvrtc.nvrtcGetPTX, program, ptx)
    _nvrtc(nvrtc.nvrtcDestroyProgram, program)
    return "\n".join(line for line in ptx.decode().splitlines() if line.startswith("//"))


def _nvrtc(function: Any, *arguments: Any) -> list:
    error, *results = function(*arguments)
    if error != 0:
        raise CompileError(f"NVRTC does not answer: {function.__name__}: {error}")
    return results


_OPTIONS = dict(
    arch=ARCH,
    std="c++17",
    use_fast_math=True,
    device_as_default_execution_space=True,
    lineinfo=True,
    no_cache=True,  # NVRTC's own cache would return the cubin without the assembler's report
    ptxas_options=["-v"],
)


def _compile(config: KernelConfig, source: str) -> tuple[bytes, dict[str, Any]]:
    from cuda.core import Program, ProgramOptions

    log = io.StringIO()
    try:
        program = Program(source, "c++", ProgramOptions(name="flashcore.cu", **_OPTIONS))
        cubin = bytes(program.compile("cubin", logs=log).code)
    except Exception as error:  # cuda.core has no public base class of its compiler errors
        kept = _keep_source(config, source)
        raise CompileError(f"{config}: did not compile (source: {kept}; NVRTC {nvrtc_version()})\n{error}") from error
    return cubin, _resource_report(log.getvalue())


def _resource_report(log: str) -> dict[str, Any]:
    registers = re.search(r"Used (\d+) registers", log)
    if registers is None:
        raise CompileError(f"no resource report in the assembler's log:\n{log}")
    spills = [int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", log)]
    advice = [line.strip() for line in log.splitlines() if re.search(r"C75\d\d|warning", line)]
    return {"registers": int(registers[1]), "spill_bytes": sum(spills), "warnings": advice}


def _keep_source(config: KernelConfig, source: str) -> str:
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    folder, name = env.cache_dir(), f"{config.entry}-{digest}.cu"
    try:
        disk.write(folder, "sources", name, data=f"// {config}\n{source}".encode())
    except OSError as error:
        return f"not kept: {error}"
    return str(folder / "sources" / name)


# ---- caches --------------------------------------------------------------------------------------------------------

_MAGIC = b"flashcore kernel 2\n"


def _pack_entry(key: str, cubin: bytes, report: dict[str, Any]) -> bytes:
    content = json.dumps(report).encode() + b"\n" + cubin
    return _MAGIC + _digest(key, content) + b"\n" + content


def _unpack_entry(key: str, entry: bytes) -> tuple[bytes, dict[str, Any]] | None:
    """Cubin and report, or None if the entry is damaged or another key's."""
    digest, _, content = entry.removeprefix(_MAGIC).partition(b"\n")
    if not entry.startswith(_MAGIC) or digest != _digest(key, content):
        return None
    report, _, cubin = content.partition(b"\n")
    return cubin, json.loads(report)


def _digest(key: str, content: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\n" + content).hexdigest().encode()


def disk_cache() -> disk.DiskCache | None:
    """The disk cache; None if it is switched off."""
    return disk.DiskCache(env.cache_dir()) if env.cache_enabled() else None


def cache_key(source: str) -> str:
    """Content key of a translation unit: its text, the options, the compiler's and this package's versions."""
    compiler = (nvrtc_version(), nvrtc_build())
    parts = (source, json.dumps(_OPTIONS, sort_keys=True), *compiler, flashcore.__version__)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


_memory: dict[KernelConfig, CompiledKernel] = {}
_memory_lock = threading.Lock()
_config_locks: dict[KernelConfig, threading.Lock] = {}


def compile_kernel(config: KernelConfig) -> CompiledKernel:
    """The compiled kernel of a config: from memory, else from disk, else by NVRTC.

    Raises:
        CompileError: naming the config, the kept source file and the compiler's log.
    """
    if (kernel := _memory.get(config)) is not None:
        return kernel
    with _memory_lock:
        lock = _config_locks.setdefault(config, threading.Lock())
    with lock:
        if (kernel := _memory.get(config)) is None:
            kernel = _memory[config] = _compile_or_read(config)
    return kernel


def _compile_or_read(config: KernelConfig) -> CompiledKernel:
    source = kernel_source(config)
    if env.keep_sources():
        _keep_source(config, source)
    cache = disk_cache()
    if cache is None:
        return _timed_compile(config, source)
    key = cache_key(source)
    if kernel := _from_disk(config, cache, key):
        return kernel
    with cache.lock(key):
        if kernel := _from_disk(config, cache, key):  # another process was faster
            return kernel
        kernel = _timed_compile(config, source)
        report = {name: getattr(kernel, name) for name in ("registers", "spill_bytes", "warnings")}
        cache.put(key, _pack_entry(key, kernel.cubin, report))
        return kernel


def _timed_compile(config: KernelConfig, source: str) -> CompiledKernel:
    start = time.perf_counter()
    cubin, report = _compile(config, source)
    return CompiledKernel(
        config, cubin, report["registers"], report["spill_bytes"], tuple(report["warnings"]),
        seconds=time.perf_counter() - start, from_cache=None,
    )


def _from_disk(config: KernelConfig, cache: disk.DiskCache, key: str) -> CompiledKernel | None:
    entry = cache.get(key)
    found = entry and _unpack_entry(key, entry)
    if not found:
        return None
    cubin, report = found
    return CompiledKernel(
        config, cubin, report["registers"], report["spill_bytes"], tuple(report["warnings"]),
        seconds=0.0, from_cache="disk",
    )
