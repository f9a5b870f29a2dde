"""The Hopper backward pass, a provider of attention's gradients: three kernels, and the workspace that they share."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy
import torch

from flashcore.backends import Run, hopper
from flashcore.backends.hopper import backward_configs as configs
from flashcore.backends.hopper import tma
from flashcore.backends.hopper.backward_configs import (
    BackwardConfig,
    DqConfig,
    ProductConfig,
    RowsConfig,
    WideConfig,
)
from flashcore.backends.hopper.jit import compile_kernel
from flashcore.backends.hopper.kernels import kernel_of
from flashcore.backends.hopper.launch import (
    LOG2_E,
    Launcher,
    TensorMaps,
    current_stream,
    diagonals,
    extra_arguments,
    scale_log2,
    sequence_arguments,
)
from flashcore.problem import AttentionProblem

FEATURES = frozenset({"window", "score", "sink", "head_dim_v", "dlse", "partial", "packed"})


_SHORT = 16  # queries of a packed sequence, in the mean


def unavailable() -> str | None:
    return hopper.unavailable()


def rejects(problem: AttentionProblem) -> str | None:
    return hopper.rejects(problem) or configs.rejects(problem)


def defers(problem: AttentionProblem) -> tuple[str, str] | None:
    """The provider that is to have a problem which this one could compute, and why."""
    if problem.score.change is not None or problem.head_dim_v != problem.head_dim:
        return "triton", "has run on GPUs with score functions and a head_dim of V of its own"
    if problem.packed and problem.batch * _SHORT > problem.queries.total:
        return "triton", f"needs no memory for a tile of each of {problem.batch} sequences of few queries"
    return None


def configure(problem: AttentionProblem) -> BackwardConfig | WideConfig:
    return configs.choose_backward(problem)


def prepare(problem: AttentionProblem, config: BackwardConfig | WideConfig) -> Run:
    """A callable (q, k, v, out, lse, dout, dlse, scale, *extras) -> (dq, dk, dv), bit-identical over repeats."""
    launch, default = kernel_of(config).launch(problem, config), problem.head_dim**-0.5

    def backward(q, k, v, out, lse, dout, dlse, scale, *extras):
        q, k, v, dout = (tensor.resolve_neg() for tensor in (q, k, v, dout))
        dlse = dlse if dlse is None else dlse.resolve_neg()
        return launch(q, k, v, out, lse, dout, dlse, default if scale is None else scale, *extras)

    return backward


class _Launcher:
    """A backward pass for one problem. Calling it allocates the gradients and the workspace, and launches.

    The workspace is PyTorch's, from the pool of the current stream or of the graph that is being captured, and the
    kernels of each call initialise what has to be: streams share nothing, graphs can be replayed.
    """

    def __init__(self, problem: AttentionProblem, config: BackwardConfig | WideConfig):
        self._blocks, self._keys = configs.m_blocks(config, problem), configs.n_blocks(config, problem)
        batches = 1 if problem.packed else problem.batch
        self._tiles, self._ctas = (
            batches * heads * n for heads, n in ((problem.heads_q, self._blocks), (problem.heads_k, self._keys))
        )
        self._row_bytes = self._tiles * (2 * config.tile_m + 4) * 4
        self._scale = problem.scale
        rows = {  # of a box
            "q": config.tile_m, "k": config.tile_n, "v": config.tile_n, "dout": config.tile_m,
            "dk": 64, "dv": 64, "dq": 64,
        }  # fmt: skip
        self._maps = [TensorMaps(partial(tma.map_of, name, n)) for name, n in rows.items()]
        self._rows_scalars = _i32(problem.heads_q, problem.seqlen_q, self._blocks, problem.head_dim_v)
        # Whose row a power of two threads share.
        row_head_dim = next(n for n in (64, 128, 256) if problem.head_dim_v <= n)
        rows_config = RowsConfig(config.dtype, row_head_dim, config.tile_m, config.packed)
        self._rows = Launcher(compile_kernel(rows_config), self._tiles)
        self._sequence_arguments = sequence_arguments(problem, problem.head_dim)

    @property
    def workspace_bytes(self) -> int:
        """Of memory that a call needs besides its gradients."""
        raise NotImplementedError

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
        *extras: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dq, dk and dv, contiguous.

        :param out: as the forward returned it, (B, Sq, Hq, D), or (total, Hq, D).
        :param lse: float32 (B, Hq, Sq), or (Hq, total).
        :param dout: the gradient of `out`, any strides.
        :param dlse: the gradient of `lse`, if it has one.
        :param scale: the problem's when None.
        :param extras: the tensors that the score looks up, then the sinks.
        """
        dq, dk, dv = grads = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        # Copies made here live until the launches are queued; the allocator orders their reuse after them.
        pairs = [find(t) for find, t in zip(self._maps, (q, k, v, dout, dk, dv, dq), strict=True)]
        maps, dout = [made for made, _ in pairs], pairs[3][1]
        out, lse = tma.addressable(out, "out"), lse.contiguous()
        dlse = None if dlse is None else dlse.to(torch.float32).contiguous()
        workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=q.device)
        rows = workspace.data_ptr()
        device = q.device.index
        stream = current_stream(device)
        launch, kernel, shape = self._rows.loaded(device)
        launch(
            stream, shape, kernel, out.data_ptr(), dout.data_ptr(), lse.data_ptr(),
            0 if dlse is None else dlse.data_ptr(), rows, self._turns(rows), *_outer_strides(out),
            *_outer_strides(dout), *self._rows_scalars, *self._sequence_arguments(extras, dq, dk, dv),
        )  # fmt: skip
        self._multiply(device, stream, maps, rows, self._scale if scale is None else scale, extras)
        return grads

    def _turns(self, workspace: int) -> int:
        """The address of the counters that the first kernel sets to 0, or 0."""
        return 0

    def _multiply(
        self, device: int, stream: Any, maps: list, workspace: int, scale: float, extras: tuple[torch.Tensor, ...]
    ) -> None:
        """Launch what follows. The workspace begins with the numbers of rows."""
        raise NotImplementedError


class BackwardLauncher(_Launcher):
    """One variant of the fused kernel. Behind the numbers of rows, the sums of dQ, then the turns."""

    def __init__(self, problem: AttentionProblem, config: BackwardConfig):
        super().__init__(problem, config)
        self._sum_bytes = self._tiles * 2 * 64 * 64 * 4
        self._scalars = _i32(
            problem.batch, problem.heads_k, problem.group_size, problem.seqlen_q, problem.seqlen_k,
            *diagonals(problem), self._blocks, self._keys, configs.section(config, problem),
        )  # fmt: skip
        m_begin = diagonals(problem)[1] if problem.packed else configs.m_begin(config, problem, 0)
        self._dq_scalars = _i32(problem.heads_q, self._blocks, m_begin)
        self._main = Launcher(compile_kernel(config), self._ctas, **_AFTER_ANOTHER)
        dq_config = DqConfig(config.dtype, config.tile_m, config.packed)
        self._dq = Launcher(compile_kernel(dq_config), self._tiles, **_AFTER_ANOTHER)

    @property
    def workspace_bytes(self) -> int:
        return self._row_bytes + self._sum_bytes + self._tiles * 2 * 4

    def _turns(self, workspace: int) -> int:
        return workspace + self._row_bytes + self._sum_bytes

    def _multiply(
        self, device: int, stream: Any, maps: list, workspace: int, scale: float, extras: tuple[torch.Tensor, ...]
    ) -> None:
        *inputs, map_dq = maps
        sums = workspace + self._row_bytes
        launch, kernel, shape = self._main.loaded(device)
        launch(
            stream, shape, kernel, *inputs, workspace, sums, self._turns(workspace), numpy.float32(scale),
            numpy.float32(scale * LOG2_E), *self._scalars, *self._sequence_arguments(extras),
        )  # fmt: skip
        launch, kernel, shape = self._dq.loaded(device)
        launch(
            stream, shape, kernel, map_dq, sums, numpy.float32(scale), *self._dq_scalars,
            *self._sequence_arguments(extras),
        )  # fmt: skip


class WideLauncher(_Launcher):
    """One variant of the kernel for wide heads, with the product that follows it, in as many rounds as the memory for
    dS takes. It lies behind the numbers of rows; behind it, where a head takes several rounds, the sums of dQ."""

    def __init__(self, problem: AttentionProblem, config: WideConfig):
        super().__init__(problem, config)
        rounds = configs.wide_rounds(config, problem)
        group, most_heads, most_tiles = problem.group_size, *map(len, rounds[0])
        query_tiles = most_heads * group * self._blocks
        self._ds_bytes = query_tiles * most_tiles * 64 * 64 * 2
        self._sum_bytes = query_tiles * 64 * config.head_dim * 4 if most_tiles < self._keys else 0
        self._factor = problem.score.factor
        self._exponent_scale = None if config.score.change is None else scale_log2(self._factor)
        self._extra_arguments = extra_arguments(config.score)
        self._captured = len(config.score.captured)
        main = compile_kernel(config)
        product_config = ProductConfig(
            config.dtype, config.head_dim, config.bounded_left, config.bounded_right, self._sum_bytes > 0,
            config.wait_limit,
        )  # fmt: skip
        product = compile_kernel(product_config)
        parts = -(-self._blocks // product_config.groups)
        section = configs.section(config, problem)
        self._rounds = []
        for heads, tiles in rounds:
            lengths = problem.seqlen_k, *diagonals(problem), self._blocks, tiles.start, len(tiles)
            self._rounds.append((
                Launcher(main, len(tiles) * len(heads), **_AFTER_ANOTHER),
                _i32(
                    heads.start, len(heads), problem.heads_k, group, problem.seqlen_q, *lengths,
                    min(section, len(heads)),
                ),
                Launcher(product, parts * len(heads) * group, **_AFTER_ANOTHER),
                _i32(tiles.start > 0, tiles.stop == self._keys),
                _i32(heads.start * group, problem.heads_q, group, *lengths),
            ))  # fmt: skip

    @property
    def workspace_bytes(self) -> int:
        return -(-self._row_bytes // 16) * 16 + self._ds_bytes + self._sum_bytes

    def _multiply(
        self, device: int, stream: Any, maps: list, workspace: int, scale: float, extras: tuple[torch.Tensor, ...]
    ) -> None:
        *inputs, map_dq = maps
        ds = workspace + -(-self._row_bytes // 16) * 16
        sums = ds + self._ds_bytes
        # Of dQ and dK, and of the exponent.
        scales = numpy.float32(scale * self._factor), self._exponent_scale or numpy.float32(scale * LOG2_E)
        extra = self._extra_arguments(scale, extras[: self._captured])
        for main, main_scalars, product, stage, product_scalars in self._rounds:
            launch, kernel, shape = main.loaded(device)
            launch(stream, shape, kernel, *inputs, workspace, ds, *scales, *main_scalars, *extra)
            launch, kernel, shape = product.loaded(device)
            launch(stream, shape, kernel, inputs[1], map_dq, ds, sums, *stage, scales[0], *product_scalars)


# A kernel may start before the one before it has ended.
_AFTER_ANOTHER = {"programmatic_stream_serialization": True}


def _i32(*values: int) -> tuple[numpy.int32, ...]:
    return tuple(numpy.int32(value) for value in values)


def _outer_strides(tensor: torch.Tensor) -> tuple[numpy.uint64, ...]:
    """Of batch, row and head, in elements; those of dimensions with one entry do not matter."""
    outer = tensor.stride()[:-1]
    return tuple(numpy.uint64(stride) for stride in (*[0] * (3 - len(outer)), *outer))
