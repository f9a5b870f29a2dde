"""The compiler's caches: shared by processes, content-keyed, and never in the way."""

import concurrent.futures
import dataclasses
import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

import pytest

pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings (extra cu13 or cu12)")

from flashcore import disk
from flashcore.backends.hopper import jit
from flashcore.errors import CompileError, EnvironmentProblem, FlashCoreWarning

pytestmark = pytest.mark.filterwarnings("error")


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    """A kernel that compiles in no time."""

    value: int = 1
    source: ClassVar[str] = "tiny.cuh"
    entry: ClassVar[str] = "tiny"
    element: ClassVar[str] = "Bf16"
    smem_bytes: ClassVar[int] = 0

    def constants(self):
        return {"value": self.value}


TINY = 'extern "C" __global__ void tiny(int* out) { *out = Config::value; }\n'


@pytest.fixture(autouse=True)
def sources(tmp_path, monkeypatch):
    """A device folder with one tiny kernel, an empty cache folder, and no memory of earlier kernels."""
    device = tmp_path / "device"
    (device / "ptx").mkdir(parents=True)
    (device / "ptx" / "types.cuh").write_text("#pragma once\nstruct Bf16 {};\n")
    (device / "tiny.cuh").write_text(TINY)
    monkeypatch.setattr(jit, "DEVICE_SOURCES", device)
    monkeypatch.setattr(jit, "_memory", {})
    monkeypatch.setattr(disk, "_warned", set())
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(tmp_path / "cache"))
    jit._flatten.cache_clear()
    yield device
    jit._flatten.cache_clear()


def forget():
    jit._memory.clear()
    jit._flatten.cache_clear()


def test_memory_then_disk():
    first = jit.compile_kernel(TinyConfig())
    assert first.from_cache is None
    assert first.seconds > 0
    assert first.registers > 0
    assert first.spill_bytes == 0
    assert jit.compile_kernel(TinyConfig()) is first
    forget()
    again = jit.compile_kernel(TinyConfig())
    assert again.from_cache == "disk"
    assert again.seconds == 0
    assert (again.cubin, again.registers) == (first.cubin, first.registers)


def test_key_is_the_content(sources, monkeypatch):
    def key(config=TinyConfig()):
        jit._flatten.cache_clear()
        return jit.cache_key(jit.kernel_source(config))

    keys = {key(), key(TinyConfig(2))}
    (sources / "tiny.cuh").write_text(TINY + "// changed\n")
    keys.add(key())
    monkeypatch.setattr(jit, "_OPTIONS", {**jit._OPTIONS, "lineinfo": False})
    keys.add(key())
    monkeypatch.setattr(jit, "nvrtc_version", lambda: "99.9")
    keys.add(key())
    monkeypatch.setattr(jit, "nvrtc_build", lambda: "99.9.1")
    keys.add(key())
    monkeypatch.setattr("flashcore.__version__", "99.9")
    keys.add(key())
    assert len(keys) == 7


def test_the_build_of_nvrtc_names_its_patch_release():
    assert f"V{jit.nvrtc_version()}." in jit.nvrtc_build()
    assert jit.nvrtc_build().count("\n") < 20


def test_includes_are_pasted_once(sources):
    (sources / "a.cuh").write_text('#pragma once\n#include "ptx/types.cuh"\nint a;\n')
    (sources / "tiny.cuh").write_text('#include "a.cuh"\n#include "a.cuh"\n' + TINY)
    text = jit.kernel_source(TinyConfig())
    assert text.count("int a;") == 1
    assert text.count("struct Bf16") == 1
    assert "#include" not in text
    assert text.index("struct Bf16") < text.index("struct Config") < text.index("int a;")


DAMAGE = {
    "cut": lambda entry: entry[:-7],
    "emptied": lambda entry: b"",
    "a bit flipped": lambda entry: entry[:-1] + bytes([entry[-1] ^ 1]),
    "beheaded": lambda entry: entry[8:],
    "a bit of the report flipped": lambda entry: entry.replace(b'"registers": ', b'"registers": 1', 1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_rebuilt(damage, tmp_path):
    first = jit.compile_kernel(TinyConfig())
    (entry,) = (tmp_path / "cache" / "kernels").iterdir()
    damaged = DAMAGE[damage](entry.read_bytes())
    assert damaged != entry.read_bytes()
    entry.write_bytes(damaged)
    forget()
    again = jit.compile_kernel(TinyConfig())
    assert again.from_cache is None
    assert again.cubin == first.cubin
    forget()
    assert jit.compile_kernel(TinyConfig()).from_cache == "disk"


def test_another_kernels_entry_is_not_taken(tmp_path):
    jit.compile_kernel(TinyConfig(1))
    (one,) = (tmp_path / "cache" / "kernels").iterdir()
    second = jit.compile_kernel(TinyConfig(2))
    (two,) = set((tmp_path / "cache" / "kernels").iterdir()) - {one}
    one.rename(two)
    forget()
    again = jit.compile_kernel(TinyConfig(2))
    assert (again.from_cache, again.cubin) == (None, second.cubin)


@pytest.fixture
def compilations(monkeypatch):
    calls = []
    compile_once = jit._compile
    monkeypatch.setattr(jit, "_compile", lambda *args: (calls.append(args), compile_once(*args))[1])
    return calls


def test_what_cannot_be_kept_is_compiled_once(compilations, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(FlashCoreWarning, match="kernels are not kept on disk.*No space left"):
        jit.compile_kernel(TinyConfig())
    assert len(compilations) == 1


def test_an_error_of_the_compiler_is_no_error_of_the_disk(monkeypatch):
    calls = []

    def compile_once(*args):
        calls.append(args)
        raise OSError("the compiler's")

    monkeypatch.setattr(jit, "_compile", compile_once)
    with pytest.raises(OSError, match="the compiler's"):
        jit.compile_kernel(TinyConfig())
    assert len(calls) == 1


def test_a_read_only_cache_is_read(tmp_path, monkeypatch):
    """As on a read-only file system, also where root runs: nothing is made, and nothing is said."""
    jit.compile_kernel(TinyConfig())
    forget()

    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("mkdir", "replace"):
        monkeypatch.setattr(os, name, read_only)
    assert jit.compile_kernel(TinyConfig()).from_cache == "disk"
    with pytest.warns(FlashCoreWarning, match="Read-only file system"):
        assert jit.compile_kernel(TinyConfig(2)).from_cache is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_root_warms_and_nobody_runs(monkeypatch, compilations):
    """The recipe for containers in docs/deployment.md."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # tmp_path is root's alone
        os.chmod(folder, 0o755)
        monkeypatch.setenv("FLASHCORE_CACHE_DIR", f"{folder}/flashcore")
        jit.compile_kernel(TinyConfig())
        assert disk.facts()["shared"]
        jit._memory.clear()
        os.seteuid(65534)
        try:
            assert jit.compile_kernel(TinyConfig()).from_cache == "disk"
        finally:
            os.seteuid(0)
    assert len(compilations) == 1


def test_planted_kernels_are_not_loaded(tmp_path):
    jit.compile_kernel(TinyConfig())
    (entry,) = (tmp_path / "cache" / "kernels").iterdir()
    entry.chmod(0o666)
    forget()
    with pytest.warns(FlashCoreWarning, match="chmod go-w"):
        assert jit.compile_kernel(TinyConfig()).from_cache is None
    forget()
    assert jit.compile_kernel(TinyConfig()).from_cache == "disk"  # it was replaced


def test_a_wrong_switch_is_named(monkeypatch):
    monkeypatch.setenv("FLASHCORE_CACHE", "maybe")
    with pytest.raises(EnvironmentProblem, match="FLASHCORE_CACHE='maybe'"):
        jit.compile_kernel(TinyConfig())


def test_an_unwritable_directory_costs_one_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(tmp_path / "file" / "cache"))  # unwritable, for root too
    with pytest.warns(FlashCoreWarning, match="FLASHCORE_CACHE_DIR"):
        kernel = jit.compile_kernel(TinyConfig())
    assert kernel.from_cache is None
    assert jit.compile_kernel(TinyConfig(2)).from_cache is None  # a second warning would be an error
    assert jit.compile_kernel(TinyConfig()).config == TinyConfig()  # from memory


def test_the_cache_can_be_switched_off(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHCORE_CACHE", "0")
    assert jit.disk_cache() is None
    assert jit.compile_kernel(TinyConfig()).from_cache is None
    assert not (tmp_path / "cache").exists()


PROCESS = """
import sys
from pathlib import Path
from flashcore.backends.hopper import jit
from tests.backends.hopper.test_jit import TinyConfig
jit.DEVICE_SOURCES = Path(sys.argv[1])
kernel = jit.compile_kernel(TinyConfig())
print(kernel.from_cache, len(kernel.cubin))
"""


def test_eight_cold_processes_compile_once(sources):
    def start(_):
        return subprocess.run(
            [sys.executable, "-c", PROCESS, str(sources)], capture_output=True, text=True, check=True
        ).stdout.split()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(start, range(8)))
    assert sorted(origin for origin, _ in results) == ["None"] + ["disk"] * 7
    assert len({size for _, size in results}) == 1


def test_threads_compile_once(compilations):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        kernels = list(pool.map(jit.compile_kernel, [TinyConfig()] * 8))
    assert len(compilations) == 1
    assert all(kernel is kernels[0] for kernel in kernels)


def test_an_error_names_config_source_and_log(sources, tmp_path):
    (sources / "tiny.cuh").write_text('extern "C" __global__ void tiny() { undeclared(); }')
    jit._flatten.cache_clear()
    with pytest.raises(CompileError, match="undeclared") as caught:
        jit.compile_kernel(TinyConfig(7))
    assert "TinyConfig(value=7)" in str(caught.value)
    kept = list((tmp_path / "cache" / "sources").iterdir())
    assert len(kept) == 1
    assert str(kept[0]) in str(caught.value)
    assert "undeclared" in kept[0].read_text()


def test_source_digest_sees_every_included_file(sources):
    folder = Path(jit.__file__).parent
    (sources / "part.cuh").write_text("int part;\n")
    (sources / "tiny.cuh").write_text('#include "part.cuh"\n' + TINY)
    digests = {jit.source_digest("tiny.cuh", folder / table) for table in ("configs.py", "tma.py")}
    for file in ("part.cuh", "tiny.cuh", "ptx/types.cuh"):
        (sources / file).write_text((sources / file).read_text() + "// changed\n")
        jit._flatten.cache_clear()
        digests.add(jit.source_digest("tiny.cuh", folder / "configs.py"))
    assert len(digests) == 5


def test_resource_report_counts_spills():
    log = "ptxas info : 8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\nUsed 40 registers"
    report = jit._resource_report(log + "\n(C7512) Potential Performance Loss")
    assert (report["registers"], report["spill_bytes"]) == (40, 36)
    assert report["warnings"] == ["(C7512) Potential Performance Loss"]
