"""What launches have in common: the loaded kernel on its grid, tensor maps, outputs, the stream, cuda.core's launch."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy
import torch

from flashcore.problem import AttentionProblem
from flashcore.score import PLAIN, Score

if TYPE_CHECKING:
    from flashcore.backends.hopper.jit import CompiledKernel

_MAX_MAPS = 1024
LOG2_E = 1 / math.log(2)


@functools.lru_cache(maxsize=1024)
def scale_log2(scale: float) -> numpy.float32:
    """The scale of scores whose exponentials are powers of two, as a kernel takes it."""
    return numpy.float32(scale * LOG2_E)


def exponent_scale(problem: AttentionProblem) -> numpy.float32 | None:
    """What a kernel multiplies scores with in the exponent, whatever the scale of a call; None: that scale.

    Of changed scores, the scale is applied already.
    """
    score = problem.kernel_score
    return None if score.change is None else scale_log2(score.factor)


def diagonals(problem: AttentionProblem) -> tuple[numpy.int32, numpy.int32]:
    """``left`` and ``right`` of device/attention/mask.cuh. Where there is no bound: beyond all keys. Of packed
    sequences, whose lengths only a kernel knows, without the difference of these."""
    mask = problem.mask
    if problem.packed:
        # No sequence is longer than that.
        longest_q, longest_k = min(problem.seqlen_q, problem.queries.total), min(problem.seqlen_k, problem.keys.total)
        left = longest_k if mask.left is None else min(mask.left, longest_k)
        right = longest_q if mask.right is None else min(mask.right, longest_q)
        return numpy.int32(-left), numpy.int32(right)
    offset = problem.visible.offset
    left = -problem.seqlen_q if mask.left is None else max(offset - mask.left, -problem.seqlen_q)
    right = offset + problem.seqlen_q if mask.right is None else min(offset + mask.right, offset + problem.seqlen_q)
    return numpy.int32(left), numpy.int32(min(right, 2**31 - 2**20))


def extra_arguments(score: Score) -> Callable[[float, tuple[torch.Tensor, ...]], tuple]:
    """From the scale and the tensors that a kernel's score brings to the entry's SCORE_PARAMETERS
    (``jit.score_source``)."""
    if score == PLAIN:
        return lambda scale, extras: ()

    def arguments(scale: float, extras: tuple[torch.Tensor, ...]) -> tuple:
        found = [] if score.change is None else [numpy.float32(scale)]
        for name, tensor in zip(score.tensors, extras, strict=True):
            if name == "sink":
                found.append((tensor if tensor.stride(0) == 1 else tensor.contiguous()).data_ptr())
            else:
                found += [tensor.data_ptr(), *map(numpy.uint64, tensor.stride()), *map(numpy.int32, tensor.shape)]
        return tuple(found)

    return arguments


def sequence_arguments(problem: AttentionProblem, head_dim: int) -> Callable[..., tuple]:
    """From the tensors that a call brings, and those that a kernel clears where there is no sequence (of queries, keys
    and values), to the entry's SEQUENCE_PARAMETERS (``jit.sequence_source``).

    :param head_dim: of what it clears.
    """
    if not problem.packed:
        return lambda extras, *cleared: ()
    sizes = tuple(numpy.int32(n) for n in (problem.heads_q, problem.heads_k, head_dim * 2))
    sides = (problem.queries, problem.seqlen_q), (problem.keys, problem.seqlen_k)
    of_queries = len(problem.queries.tensors)  # behind these comes the table
    pages_of = (numpy.int32(problem.keys.page_size), numpy.int32(problem.keys.pages)) if problem.paged else ()

    def arguments(extras: tuple[torch.Tensor, ...], *cleared: torch.Tensor) -> tuple:
        found, tensors = [], iter(extras)
        for rows, longest in sides:
            addresses = [next(tensors).data_ptr() for _ in rows.tensors]
            found += [*addresses, *[0] * (2 - len(addresses)), numpy.int32(rows.total), numpy.int32(longest)]
        addresses = [tensor.data_ptr() for tensor in cleared]
        pages = (numpy.uint64(extras[of_queries].stride(0)), *pages_of) if problem.paged else ()
        return (*found, *addresses, *[0] * (3 - len(addresses)), *sizes, *pages)

    return arguments


def allocate(
    q: torch.Tensor, out_shape: tuple[int, ...], lse_shape: tuple[int, ...] | None, out: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """A forward's output, contiguous, the caller's if there is one; its LSE if that has a shape; and the LSE's address,
    or 0."""
    if out is not None:
        pass
    elif q.shape != out_shape:
        out = q.new_empty(out_shape)
    elif q.is_contiguous():  # empty_like() is faster without a memory format, and then keeps the strides
        out = torch.empty_like(q)
    else:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if lse_shape is None:
        return out, None, 0
    lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
    return out, lse, lse.data_ptr()


class Launcher:
    """A kernel on its grid, loaded once on each device. Subclasses are called with tensors, and launch it."""

    def __init__(self, kernel: CompiledKernel, grid: int, **options: Any):
        """:param options: those of ``cuda.core.LaunchConfig`` besides grid, block and shared memory."""
        self._kernel, self._grid, self._options = kernel, grid, options
        self._loaded: dict[int, tuple] = {}  # device index -> (cuda.core.launch, kernel, launch config)

    def loaded(self, device: int) -> tuple:
        """``cuda.core.launch``, the kernel and its launch config on a device."""
        return self._loaded.get(device) or self._load(device)

    def _load(self, device: int) -> tuple:
        """What `_loaded` holds for a device that is asked for the first time."""
        from cuda.core import LaunchConfig, launch  # which take long to import

        config = self._kernel.config
        shape = LaunchConfig(grid=self._grid, block=config.threads, shmem_size=config.smem_bytes, **self._options)
        self._loaded[device] = loaded = (launch, self._kernel.load(device), shape)
        return loaded


class TensorMaps:
    """Tensor maps of one operand, by address and strides: the caching allocator hands out the same few addresses.

    :param make: from a tensor to its map, and the tensor that the map points into: a copy where it must be one.
    """

    def __init__(self, make: Callable[[torch.Tensor], tuple[Any, torch.Tensor]]):
        self._make = make
        self._maps: dict[tuple, Any] = {}

    def __call__(self, tensor: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """The tensor's map, and the tensor that it points into."""
        key = (tensor.data_ptr(), tensor.stride())
        found = self._maps.get(key)
        if found is not None:
            return found, tensor
        made, addressed = self._make(tensor)
        if addressed is tensor:  # a copy's address means nothing for the next call
            keep(self._maps, key, made)
        return made, addressed


def keep(maps: dict[tuple, Any], key: tuple, made: Any) -> None:
    """Remember what was made for these addresses, of a bounded number of them."""
    if len(maps) >= _MAX_MAPS:
        maps.clear()
    maps[key] = made


_streams: dict[int, object] = {}  # by raw handle
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # PyTorch without CUDA has none
_thread = threading.local()  # device: whose context this thread has been given


def current_stream(device: int):
    """PyTorch's current stream as a ``cuda.core.Stream``, in a thread that has the device's context."""
    if getattr(_thread, "device", None) != device:
        from cuda.core import Device

        Device(device).set_current()  # PyTorch gives a new thread none before its first call that needs one
        _thread.device = device
    handle = _raw_stream(device)
    stream = _streams.get(handle)
    if stream is None:
        from cuda.core import Stream

        stream = _streams[handle] = Stream.from_handle(handle)
    return stream
