"""The Hopper backward pass, a provider of attention's gradients: three kernels, and the workspace that they share."""

from __future__ import annotations

import numpy
import torch

from flashcore.backends import Run, hopper
from flashcore.backends.hopper import backward_configs as configs
from flashcore.backends.hopper import tma
from flashcore.backends.hopper.backward_configs import BackwardConfig, DqConfig, RowsConfig
from flashcore.backends.hopper.jit import compile_kernel
from flashcore.backends.hopper.launch import LOG2_E, Launcher, current_stream, diagonals
from flashcore.problem import AttentionProblem

_MAX_MAPS = 1024  # tensor maps kept per operand: the caching allocator hands out the same few addresses
_DQ_PART = 64 * 64  # fp32 numbers of a dQ tile that one warpgroup holds


FEATURES = frozenset({"window", "sink", "dlse", "partial"})


def unavailable() -> str | None:
    return hopper.unavailable()


def rejects(problem: AttentionProblem) -> str | None:
    return hopper.rejects(problem) or configs.rejects(problem)


def configure(problem: AttentionProblem) -> BackwardConfig:
    return configs.choose_backward(problem)


def prepare(problem: AttentionProblem, config: BackwardConfig) -> Run:
    """A callable (q, k, v, out, lse, dout, dlse, scale, *extras) -> (dq, dk, dv), bit-identical over repeats."""
    launch, default = BackwardLauncher(problem, config), problem.head_dim**-0.5

    def backward(q, k, v, out, lse, dout, dlse, scale, *extras):
        q, k, v, dout = (tensor.resolve_neg() for tensor in (q, k, v, dout))
        dlse = dlse if dlse is None else dlse.resolve_neg()
        return launch(q, k, v, out, lse, dout, dlse, default if scale is None else scale)

    return backward


class BackwardLauncher:
    """One backward variant for one problem. Calling it allocates the gradients and the workspace, and launches.

    The workspace is PyTorch's, from the pool of the current stream or of the graph that is being captured, and the
    first kernel of each call initialises what has to be: streams share nothing, graphs can be replayed.
    """

    def __init__(self, problem: AttentionProblem, config: BackwardConfig):
        blocks, keys = configs.m_blocks(config, problem), configs.n_blocks(config, problem)
        self._tiles = problem.batch * problem.heads_q * blocks
        self._tile_m = config.tile_m
        # Fp32 numbers: the sums of dQ, the numbers of rows; then the turns, 32 bits too.
        self._sums = self._tiles * 2 * _DQ_PART
        self._rows = self._tiles * (2 * config.tile_m + 4)
        self._workspace = self._sums + self._rows + self._tiles * 2
        self._head_dim = problem.head_dim
        self._box_rows = (config.tile_m, config.tile_n, config.tile_n, config.tile_m, 64, 64, 64)

        def i32(*values: int) -> tuple[numpy.int32, ...]:
            return tuple(numpy.int32(value) for value in values)

        self._rows_scalars = i32(problem.heads_q, problem.seqlen_q, blocks, problem.head_dim)
        self._scale = problem.scale
        self._scalars = i32(
            problem.batch, problem.heads_k, problem.group_size, problem.seqlen_q, problem.seqlen_k,
            *diagonals(problem), blocks, keys, configs.section(config, problem),
        )  # fmt: skip
        self._dq_scalars = i32(problem.heads_q, blocks, configs.m_begin(config, problem, 0))
        after = {"programmatic_stream_serialization": True}  # may start before the kernel before it has ended
        self._launchers = (
            Launcher(compile_kernel(RowsConfig(config.dtype, config.head_dim, config.tile_m)), self._tiles),
            Launcher(compile_kernel(config), keys * problem.heads_k * problem.batch, **after),
            Launcher(compile_kernel(DqConfig(config.dtype, config.tile_m)), self._tiles, **after),
        )
        self._maps: tuple[dict, ...] = tuple({} for _ in self._box_rows)  # (address, strides) -> tensor map

    @property
    def workspace_bytes(self) -> int:
        """Of memory that a call needs besides its gradients."""
        return 4 * self._workspace

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        dout: torch.Tensor,
        dlse: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dq, dk and dv, contiguous.

        :param out: as the forward returned it, (B, Sq, Hq, D).
        :param lse: float32 (B, Hq, Sq).
        :param dout: the gradient of `out`, any strides.
        :param dlse: the gradient of `lse`, if it has one.
        :param scale: the problem's when None.
        """
        # Copies made here live until the launches are queued; the allocator orders their reuse after them.
        q, k, v = (tma.addressable(tensor, name) for tensor, name in ((q, "q"), (k, "k"), (v, "v")))
        out, dout = tma.addressable(out, "out"), tma.addressable(dout, "dout")
        lse = lse.contiguous()
        scale = self._scale if scale is None else scale
        dlse = None if dlse is None else dlse.to(torch.float32).contiguous()
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        workspace = torch.empty(self._workspace, dtype=torch.float32, device=q.device)
        sums = workspace.data_ptr()
        rows = sums + 4 * self._sums
        turns = rows + 4 * self._rows

        map_q, map_k, map_v, map_dout, map_dk, map_dv, map_dq = (
            self._map(operand, tensor) for operand, tensor in enumerate((q, k, v, dout, dk, dv, dq))
        )
        device = q.device.index
        (launch, rows_kernel, rows_launch), (_, kernel, main_launch), (_, dq_kernel, dq_launch) = (
            one.loaded(device) for one in self._launchers
        )
        stream = current_stream(device)
        launch(
            stream, rows_launch, rows_kernel, out.data_ptr(), dout.data_ptr(), lse.data_ptr(),
            0 if dlse is None else dlse.data_ptr(), rows, turns, *_outer_strides(out), *_outer_strides(dout),
            *self._rows_scalars,
        )  # fmt: skip
        launch(
            stream, main_launch, kernel, map_q, map_k, map_v, map_dout, map_dk, map_dv, rows, sums, turns,
            numpy.float32(scale), numpy.float32(scale * LOG2_E), *self._scalars,
        )  # fmt: skip
        launch(stream, dq_launch, dq_kernel, map_dq, sums, numpy.float32(scale), *self._dq_scalars)
        return dq, dk, dv

    def _map(self, operand: int, tensor: torch.Tensor):
        maps = self._maps[operand]
        key = (tensor.data_ptr(), tensor.stride())
        found = maps.get(key)
        if found is None:
            if len(maps) >= _MAX_MAPS:
                maps.clear()
            found = maps[key] = tma.tensor_map(tensor, self._box_rows[operand])
        return found


def _outer_strides(tensor: torch.Tensor) -> tuple[numpy.uint64, ...]:
    """In elements; those of dimensions with one entry do not matter."""
    return tuple(numpy.uint64(stride) for stride in tensor.stride()[:3])
