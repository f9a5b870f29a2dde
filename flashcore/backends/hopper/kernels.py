"""The kernels of the Hopper backend: one row each, and nowhere else."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashcore.backends.hopper import backward_configs, configs, decode_configs, gemm_configs
from flashcore.backends.hopper.backward_configs import (
    BACKWARD_TABLE,
    WIDE_TABLE,
    BackwardConfig,
    DqConfig,
    ProductConfig,
    RowsConfig,
    WideConfig,
)
from flashcore.backends.hopper.configs import ForwardConfig
from flashcore.backends.hopper.decode_configs import DecodeConfig
from flashcore.backends.hopper.gemm_configs import GemmConfig


@dataclass(frozen=True)
class Kernel:
    """A kernel file, who writes its `struct Config`, and who launches it."""

    name: str  # in records: whose source and table were measured
    config: type  # has the source's name; its module has the table of tiles
    launcher: str  # module of this package and class: made of a problem, a config and a schedule if there is one
    declared: Callable[[Sequence[int] | None], list[tuple[str, Any]]]  # variants for these head_dims (None: all), named

    @property
    def source(self) -> str:
        """The file under flashcore/device."""
        return self.config.source

    @property
    def table(self) -> Path:
        """The file that decides which variants there are."""
        return Path(sys.modules[self.config.__module__].__file__)

    def launch(self, problem: Any, *config: Any) -> Any:
        """The launcher of one variant for one problem."""
        module, name = self.launcher.split(".")
        return getattr(importlib.import_module(f"flashcore.backends.hopper.{module}"), name)(problem, *config)


def _forward(head_dims: Sequence[int] | None) -> list[tuple[str, ForwardConfig]]:
    wanted = {configs.row_head_dim(head_dim, head_dim) for head_dim in head_dims or ()}
    return [one for one in configs.declared_configs() if not head_dims or one[1].head_dim in wanted]


def _decode(head_dims: Sequence[int] | None) -> list[tuple[str, DecodeConfig]]:
    if not head_dims:
        return decode_configs.declared_configs()
    return decode_configs.declared_configs(sorted({d for d in head_dims if d % 8 == 0}))


def _backward(head_dims: Sequence[int] | None) -> list[tuple[str, BackwardConfig]]:
    return _serving(backward_configs.declared_backward_configs(), [row.head_dim for row in BACKWARD_TABLE], head_dims)


def _backward_wide(head_dims: Sequence[int] | None) -> list[tuple[str, WideConfig]]:
    narrow = BACKWARD_TABLE[-1].head_dim
    wide = head_dims and [head_dim for head_dim in head_dims if head_dim > narrow]
    return [] if head_dims and not wide else _serving(backward_configs.declared_wide_configs(), list(WIDE_TABLE), wide)


def _serving(declared: list[tuple[str, Any]], rows: list[int], head_dims: Sequence[int] | None) -> list:
    """Those of the first row that is as wide as one of these head_dims."""
    wanted = {next((row for row in rows if head_dim <= row), None) for head_dim in head_dims or ()}
    return [one for one in declared if not head_dims or one[1].head_dim in wanted]


def _none(head_dims: Sequence[int] | None) -> list[tuple[str, Any]]:
    return []  # compiled with the kernel that they serve


def _gemm(head_dims: Sequence[int] | None) -> list[tuple[str, GemmConfig]]:
    return [] if head_dims else gemm_configs.declared_configs()


KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Kernel("attention", ForwardConfig, "attention.ForwardLauncher", _forward),
        Kernel("decode", DecodeConfig, "decode.DecodeLauncher", _decode),
        Kernel("backward", BackwardConfig, "backward.BackwardLauncher", _backward),
        Kernel("backward_rows", RowsConfig, "backward.BackwardLauncher", _none),
        Kernel("backward_dq", DqConfig, "backward.BackwardLauncher", _none),
        Kernel("backward_wide", WideConfig, "backward.WideLauncher", _backward_wide),
        Kernel("backward_product", ProductConfig, "backward.WideLauncher", _none),
        Kernel("gemm", GemmConfig, "gemm.GemmLauncher", _gemm),
    )
}


def kernel_of(config: Any) -> Kernel:
    """Whose variant this is."""
    return next(kernel for kernel in KERNELS.values() if kernel.config is type(config))


def declared(head_dims: Sequence[int] | None = None) -> list[tuple[str, Any]]:
    """Name and config of every variant that is compiled ahead of time: all, or those that serve these head_dims."""
    return [one for kernel in KERNELS.values() for one in kernel.declared(head_dims)]
