"""What machine and which software this is: for the header of a record and for ``flashcore doctor``.

Every probe is guarded: a missing library or a missing driver is a reading like any other, never an exception.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import subprocess
from contextlib import suppress
from dataclasses import dataclass


def version_of(distribution: str) -> str | None:
    """The installed version of a Python distribution, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def flashcore_version() -> str | None:
    with suppress(Exception):
        from flashcore import __version__

        return __version__
    return version_of("flashcore")


def describe() -> dict:
    """What a record or a bug report should say about this machine. None where there is nothing to say."""
    return {"flashcore": flashcore_version(), **gpu(), **software()}


def gpu() -> dict:
    """Name, power cap in watts, driver and size of the current CUDA device."""
    facts = dict.fromkeys(("gpu", "compute_capability", "sm_count", "memory_gib", "driver", "power_limit_w"))
    with suppress(Exception):
        import torch

        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(torch.cuda.current_device())
            facts["gpu"] = properties.name
            facts["compute_capability"] = f"{properties.major}.{properties.minor}"
            facts["sm_count"] = properties.multi_processor_count
            facts["memory_gib"] = round(properties.total_memory / 2**30, 1)
    return facts | Sensors().facts()


def software() -> dict:
    facts = {
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "torch": version_of("torch"),
        "cuda": None,
        "cudnn": None,
        "nvrtc": None,
        "cuda_core": version_of("cuda-core"),
        "cuda_bindings": version_of("cuda-bindings"),
        "triton": version_of("triton"),
    }
    with suppress(Exception):
        import torch

        facts["torch"] = torch.__version__
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = dotted_cudnn(torch.backends.cudnn.version())
    with suppress(Exception):
        from flashcore.backends.hopper import jit

        version = jit.nvrtc_version()
        facts["nvrtc"] = ".".join(map(str, version)) if isinstance(version, tuple) else version
    return facts


def dotted_cudnn(version: int | None) -> str | None:
    """``91900`` is 9.19.0. (Up to cuDNN 8 the leading digits meant something else; torch 2.6 brings 9.)"""
    if version is None:
        return None
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def slug(name: str | None) -> str:
    """A directory name for a GPU: ``NVIDIA H200`` is h200, ``NVIDIA H100 80GB HBM3`` is h100; no GPU is cpu."""
    words = re.split(r"[\s/_-]+", (name or "cpu").lower())
    dull = re.compile(r"nvidia|geforce|\d+gb|hbm\d+\w?|graphics|device")
    return "-".join(word for word in words if word and not dull.fullmatch(word)) or "gpu"


@dataclass(frozen=True)
class Reading:
    sm_mhz: int
    power_w: float


class Sensors:
    """Clock and power of the current CUDA device through NVML, or through nvidia-smi where pynvml is missing.

    ``watch`` is cheap with NVML and does nothing without; ``read`` always tries.
    """

    def __init__(self) -> None:
        self._handle = None
        with suppress(Exception):
            import pynvml
            import torch

            self._nvml = pynvml
            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")

    def facts(self) -> dict:
        """Driver version and power limit, as far as they can be read."""
        with suppress(Exception):
            if self._handle is not None:
                return {
                    "driver": _text(self._nvml.nvmlSystemGetDriverVersion()),
                    "power_limit_w": round(self._nvml.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1000),
                }
            driver, limit = _nvidia_smi("driver_version,power.limit")
            return {"driver": driver, "power_limit_w": round(float(limit))}
        return {}

    def read(self) -> Reading | None:
        with suppress(Exception):
            if self._handle is not None:
                nvml = self._nvml
                return Reading(
                    nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_SM),
                    nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000,
                )
            clock, power = _nvidia_smi("clocks.sm,power.draw")
            return Reading(int(clock), float(power))
        return None

    def watch(self, into: list[Reading]) -> None:
        """Keep one reading, if that costs no more than a library call."""
        if self._handle is not None and (reading := self.read()):
            into.append(reading)


def _nvidia_smi(query: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return [field.strip() for field in done.stdout.splitlines()[0].split(",")]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
