"""Launches the Hopper matrix product: what a call does on the host once its problem is known."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy
import torch

from flashcore.backends import hopper
from flashcore.backends.hopper import tma
from flashcore.backends.hopper.gemm_configs import TILES, GemmConfig, GemmSchedule, choose_gemm, k_blocks
from flashcore.backends.hopper.jit import compile_kernel
from flashcore.backends.hopper.kernels import kernel_of
from flashcore.backends.hopper.launch import Launcher, TensorMaps, current_stream
from flashcore.gemm_problem import HALF_TYPES, GemmProblem

_LEAST_FLAGS = 1024  # more than any kernel on 132 SMs needs


FEATURES: frozenset[str] = frozenset()


def unavailable() -> str | None:
    return hopper.unavailable()


@dataclass(frozen=True)
class GemmChoice:
    """What is compiled, and how its tiles are dealt out."""

    config: GemmConfig
    schedule: GemmSchedule

    @property
    def why(self) -> str:
        return self.config.why

    def __str__(self) -> str:
        return f"{self.config}; {self.schedule}"


def configure(problem: GemmProblem) -> GemmChoice:
    """The variant and schedule for a problem that is not rejected."""
    return GemmChoice(*choose_gemm(problem))


def prepare(problem: GemmProblem, config: GemmChoice) -> GemmLauncher:
    """A callable (a, b, bias) -> out."""
    return kernel_of(config.config).launch(problem, config.config, config.schedule)


def copied(
    problem: GemmProblem, config: GemmChoice, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None
) -> tuple[tuple[str, str], ...]:
    """The operands that each call copies before it multiplies them, and why."""
    matrices = {
        "a": _matrix(a, problem.a_shared, problem.a_mn_major), "b": _matrix(b, problem.b_shared, not problem.b_mn_major)
    }  # fmt: skip
    reasons = {name: tma.matrix_obstacle(matrix) for name, matrix in matrices.items()}
    return tuple((name, reason) for name, reason in reasons.items() if reason is not None)


def rejects(problem: GemmProblem) -> str | None:
    """The one feature of the problem that the kernel lacks; None if it has all."""
    if problem.device != "cuda":
        return f"device {problem.device} is not a GPU"
    if problem.arch != (9, 0):
        return f"device {problem.device} with compute capability {problem.arch} is not Hopper (9, 0)"
    if problem.dtype not in HALF_TYPES:
        return f"dtype {problem.dtype} is neither bfloat16 nor float16"
    if problem.is_empty:
        return "nothing to multiply"
    if problem.activation == "swiglu" and problem.n % 2:
        return "an odd number of gates"
    if max(problem.batch, problem.m, problem.b_columns, problem.k) >= 2**31:
        return "a dimension of 2^31 or more"
    smallest = min((tile.config(problem) for tile in TILES), key=lambda c: c.tile_m * c.out_n)
    if problem.batch * (problem.m / smallest.tile_m + 1) * (problem.n / smallest.out_n + 1) >= 2**31:
        return "more than 2^31 tiles"
    return None


class GemmLauncher(Launcher):
    """One variant and schedule for one problem. Calling it allocates the output and launches."""

    def __init__(
        self, problem: GemmProblem, config: GemmConfig | None = None, schedule: GemmSchedule | None = None
    ):
        if config is None or schedule is None:
            config, schedule = choose_gemm(problem)
        self.config, self.schedule = config, schedule
        self._problem = problem
        super().__init__(compile_kernel(config), schedule.clusters * config.cluster_size)
        self._out_dtype = getattr(torch, problem.out_dtype)
        self._integers = tuple(
            map(
                numpy.int32,
                (
                    problem.m, problem.n, k_blocks(problem), schedule.m_tiles, schedule.n_tiles, problem.batch,
                    schedule.group, schedule.whole_tiles, schedule.parts, *schedule.shares(problem),
                    not problem.a_shared, not problem.b_shared,
                ),
            )
        )  # fmt: skip
        self._out_strides = (numpy.uint64(problem.n), numpy.uint64(problem.m * problem.n))
        self._map_a = TensorMaps(partial(_map, "a", config.a_box_rows, problem.a_shared, problem.a_mn_major))
        self._map_b = TensorMaps(partial(_map, "b", config.b_box_rows, problem.b_shared, not problem.b_mn_major))
        self._map_out = TensorMaps(lambda out: (tma.matrix_map(out, 64, 128 // out.element_size()), out))

    def __call__(self, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The output, (m, n) or (batch, m, n) if an operand has a batch, contiguous."""
        problem, config = self._problem, self.config
        batched = a.dim() == 3 or b.dim() == 3
        out = torch.empty((problem.batch, problem.m, problem.n), dtype=self._out_dtype, device=a.device)
        # Copies and workspace live until the launch is queued; the allocator orders their reuse after it.
        (a_map, a), (b_map, b) = self._map_a(a), self._map_b(b)
        out_map = self._map_out(out)[0] if config.tma_store else a_map
        bias_address = 0
        if bias is not None:
            bias = _paired(bias)
            bias_address = bias.data_ptr()
        device = out.device.index
        partials = flags = None
        if config.split:
            partials, flags = _workspace(config, self.schedule.parts, device)
        launch, kernel, launch_config = self._loaded.get(device) or self._load(device)
        launch(
            current_stream(device), launch_config, kernel, a_map, b_map, out_map, out.data_ptr(), bias_address,
            _address(partials), _address(flags), *self._out_strides, *self._integers,
        )  # fmt: skip
        return out if batched else out[0]


def _map(name: str, rows: int, shared: bool, transposed: bool, tensor: torch.Tensor):
    matrix = _matrix(tensor, shared, transposed)
    addressed = tma.addressable_matrix(matrix, name)
    return tma.matrix_map(addressed, rows), tensor if addressed is matrix else addressed


def _matrix(tensor: torch.Tensor, shared: bool, transposed: bool) -> torch.Tensor:
    """The operand as TMA is to read it, (batch, rows, columns)."""
    matrix = tensor if tensor.dim() == 3 else tensor[None]
    matrix = matrix[:1] if shared else matrix
    return matrix.transpose(1, 2) if transposed else matrix


def _paired(bias: torch.Tensor) -> torch.Tensor:
    """The bias as the kernel reads it: dense, two elements at a time."""
    if bias.shape[0] % 2:
        return torch.nn.functional.pad(bias, (0, 1))
    if bias.stride(0) != 1 or bias.data_ptr() % 4:
        return bias.clone(memory_format=torch.contiguous_format)
    return bias


_flags: dict[tuple[int, int], torch.Tensor] = {}  # (device, stream) -> zeros


def _workspace(config: GemmConfig, parts: int, device: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for the partial accumulators of so many clusters, and their flags, which are zero.

    A kernel leaves the flags at zero. Kernels of one stream follow each other and share them; those of different
    streams may run at once and must not. Nor may a CUDA graph, which can run beside anything: what it captures gets
    flags of its own, zeroed by a node of the graph.
    """
    accumulators = parts * config.cluster_size
    where = f"cuda:{device}"
    partials = torch.empty(accumulators * config.tile_m * config.tile_n, dtype=torch.float32, device=where)
    count = accumulators * config.consumers
    if torch.cuda.is_current_stream_capturing():
        return partials, torch.zeros(count, dtype=torch.int32, device=where)
    key = (device, torch._C._cuda_getCurrentRawStream(device))
    flags = _flags.get(key)
    if flags is None or flags.numel() < count:
        flags = _flags[key] = torch.zeros(max(count, _LEAST_FLAGS), dtype=torch.int32, device=where)
    return partials, flags


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
