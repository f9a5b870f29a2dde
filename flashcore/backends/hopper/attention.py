"""Launches the Hopper attention kernels: what a call does on the host once its plan is known."""

from __future__ import annotations

from functools import partial

import numpy
import torch

from flashcore.backends.hopper import tma
from flashcore.backends.hopper.configs import ForwardConfig, packed_pairs, paired_heads, window_ramp
from flashcore.backends.hopper.jit import compile_kernel
from flashcore.backends.hopper.launch import (
    Launcher,
    TensorMaps,
    allocate,
    current_stream,
    diagonals,
    exponent_scale,
    extra_arguments,
    keep,
    scale_log2,
    sequence_arguments,
)
from flashcore.problem import AttentionProblem


class ForwardLauncher(Launcher):
    """One forward variant for one problem. Calling it allocates the outputs and launches."""

    def __init__(self, problem: AttentionProblem, config: ForwardConfig):
        self._lse_shape = problem.lse_shape if problem.needs_lse else None
        m_blocks = -(-problem.seqlen_q // config.tile_m)
        grid = min(most_tiles(problem, config.tile_m), problem.sm_count)
        if config.one_tile and m_blocks * problem.heads_q * problem.batch > grid:
            raise ValueError(f"{config}: more tiles than the {grid} CTAs of the launch")
        super().__init__(compile_kernel(config), grid)
        heads = problem.batch * problem.heads_q
        units = m_blocks  # of a head
        if problem.packed:  # which of these there are is found out when the kernel runs
            m_blocks, paired, paired_rounds = 0, packed_pairs(config, problem), 0
        elif config.bounded_left:
            paired, paired_rounds = window_ramp(config, problem), 0
            units -= paired // 2
        else:
            paired = paired_heads(config, problem, grid)
            paired_rounds = -(-(paired // 2 * m_blocks) // grid)
        # The entry's parameters after the scale, in order.
        self._scalars = (
            numpy.int32(problem.batch), numpy.int32(problem.heads_q),
            divisor(problem.heads_q), divisor(problem.group_size), numpy.int32(problem.seqlen_q),
            numpy.int32(problem.seqlen_k), *diagonals(problem), numpy.int32(m_blocks), divisor(units),
            numpy.int32(paired), numpy.int32(paired_rounds), divisor(max(1, heads - paired)),
        )  # fmt: skip
        self._default_scale, self._exponent_scale = problem.head_dim**-0.5, exponent_scale(problem)
        self._out_shape = problem.out_shape
        self._extra_arguments = extra_arguments(problem.kernel_score)
        self._sequence_arguments = sequence_arguments(problem, problem.head_dim_v)
        self._places = len(problem.queries.tensors) + len(problem.keys.tensors)
        self._map_sets: dict[tuple, tuple] = {}  # all addresses and strides -> the four tensor maps
        rows = {"q": 64, "k": config.tile_n, "v": config.tile_n, "out": 64}  # of a box
        self._maps = [TensorMaps(partial(tma.map_of, name, n)) for name, n in rows.items()]

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None, *extras: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        out, lse, lse_address = allocate(q, self._out_shape, self._lse_shape, out)
        key = (
            q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), q.stride(), k.stride(), v.stride(),
        )  # fmt: skip
        maps = self._map_sets.get(key)
        if maps is None:
            # Copies made here live until the launch is queued; the allocator orders their reuse after it.
            maps, _copies = self._make_maps(key, q, k, v, out)
        device = out.device.index
        launch, kernel, launch_config = self._loaded.get(device) or self._load(device)
        if scale is None:
            scale = self._default_scale
        launch(
            current_stream(device), launch_config, kernel, *maps, lse_address,
            self._exponent_scale or scale_log2(scale), *self._scalars,
            *self._sequence_arguments(extras, out), *self._extra_arguments(scale, extras[self._places :]),
        )  # fmt: skip
        return out, lse

    def _make_maps(self, key: tuple, *tensors: torch.Tensor) -> tuple[tuple, list[torch.Tensor]]:
        """The tensor maps of q, k, v and out, and the tensors that they point into."""
        pairs = [find(tensor) for find, tensor in zip(self._maps, tensors, strict=True)]
        maps, addressed = tuple(made for made, _ in pairs), [tensor for _, tensor in pairs]
        if all(a is b for a, b in zip(addressed, tensors, strict=True)):  # a copy's address means nothing next time
            keep(self._map_sets, key, maps)
        return maps, addressed


def most_tiles(problem: AttentionProblem, tile_m: int) -> int:
    """How many tiles of so many queries there are; of packed sequences at most."""
    of_a_head = problem.batch * -(-problem.seqlen_q // tile_m)
    if problem.packed:
        of_a_head = min(of_a_head, problem.batch + problem.queries.total // tile_m)
    return of_a_head * problem.heads_q


def divisor(d: int) -> numpy.uint64:
    """A positive divisor below 2^31 as ``struct Divisor`` (device/attention/schedule.cuh) takes it."""
    shift = (d - 1).bit_length()
    return numpy.uint64(shift << 32 | (2**32 * (2**shift - d) // d + 1))
