"""Launches the Hopper decoding kernel: what a call does on the host once its plan is known."""

from __future__ import annotations

import numpy
import torch

from flashcore.backends.hopper import tma
from flashcore.backends.hopper.decode_configs import DecodeConfig
from flashcore.backends.hopper.jit import compile_kernel
from flashcore.backends.hopper.launch import (
    Launcher,
    allocate,
    current_stream,
    diagonals,
    exponent_scale,
    extra_arguments,
    scale_log2,
    sequence_arguments,
)
from flashcore.problem import AttentionProblem


class DecodeLauncher(Launcher):
    """One variant for one problem. Calling it allocates the outputs and launches."""

    def __init__(self, problem: AttentionProblem, config: DecodeConfig):
        clusters = problem.batch * problem.heads_k
        super().__init__(compile_kernel(config.variant), clusters, cluster=config.cluster)
        self._lse_shape = problem.lse_shape if problem.needs_lse else None
        # The entry's parameters after the scale, in order.
        self._scalars = (
            numpy.int32(problem.heads_k), numpy.int32(problem.group_size),
            numpy.int32(problem.seqlen_q), numpy.int32(problem.seqlen_k), *diagonals(problem),
        )  # fmt: skip
        self._default_scale, self._exponent_scale = problem.head_dim**-0.5, exponent_scale(problem)
        self._out_shape = problem.out_shape
        self._extra_arguments = extra_arguments(problem.kernel_score)
        self._sequence_arguments = sequence_arguments(problem, problem.head_dim_v)
        self._places = len(problem.queries.tensors) + len(problem.keys.tensors)
        # Strides that the kernel can read: of q, k and v -> the entry's parameters, (batch, row, head) of each.
        self._strides: dict[tuple, tuple[int, ...]] = {}

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None, *extras: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        out, lse, lse_address = allocate(q, self._out_shape, self._lse_shape, out)
        addresses = q.data_ptr(), k.data_ptr(), v.data_ptr()
        strides = self._strides.get((q.stride(), k.stride(), v.stride()))
        if strides is None or (addresses[0] | addresses[1] | addresses[2]) % tma.ALIGNMENT:
            # Copies made here live until the launch is queued; the allocator orders their reuse after it.
            q, k, v = (tma.addressable(x, name, broadcast=True) for x, name in zip((q, k, v), "qkv", strict=True))
            addresses = q.data_ptr(), k.data_ptr(), v.data_ptr()
            strides = self._learn(q, k, v)
        device = out.device.index
        launch, kernel, launch_config = self._loaded.get(device) or self._load(device)
        if scale is None:
            scale = self._default_scale
        launch(
            current_stream(device), launch_config, kernel, *addresses, out.data_ptr(), lse_address, *strides,
            self._exponent_scale or scale_log2(scale), *self._scalars, *self._sequence_arguments(extras, out),
            *self._extra_arguments(scale, extras[self._places :]),
        )  # fmt: skip
        return out, lse

    def _learn(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[int, ...]:
        """The entry's strides for tensors that it can read."""
        learned = tuple(stride for tensor in (q, k, v) for stride in (0, *tensor.stride()[:-1])[-3:])
        self._strides[q.stride(), k.stride(), v.stride()] = learned
        return learned
