"""Tensors as TMA sees them: the only place where tensor maps are made.

A (batch, seqlen, heads, head_dim) tensor becomes a map with dimensions (head_dim, seqlen, heads, batch), innermost
first, whatever its strides, and a box of `rows` sequence positions by 64 elements (128 bytes, the swizzle width) of
one head. Reads past the end of any dimension give zeros, writes there are dropped, so neither tails nor head_dims
below the tile's need a copy.
"""

from __future__ import annotations

import warnings

import numpy
import torch

from flashcore.errors import FlashCoreWarning

ALIGNMENT = 16  # bytes: of the base address and of every stride but the innermost
BOX_COLS = 64


def obstacle(tensor: torch.Tensor) -> str | None:
    """Why TMA cannot address this (B, S, H, D) tensor where it lies; None if it can."""
    if tensor.data_ptr() % ALIGNMENT:
        return f"its data is not aligned to {ALIGNMENT} bytes"
    *outer, inner = tensor.stride()
    if inner != 1 and tensor.shape[-1] > 1:
        return f"its last dimension has stride {inner}"
    step = ALIGNMENT // tensor.element_size()
    for name, size, stride in zip(("batch", "sequence", "head"), tensor.shape, outer):
        if size > 1 and (stride % step or stride == 0):
            return f"its {name} stride of {stride} elements is not a positive multiple of {step}"
    return None


_warned: set[str] = set()


def addressable(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The tensor, or a contiguous copy if TMA cannot address it where it lies (warns once per tensor name)."""
    reason = obstacle(tensor)
    if reason is None:
        return tensor
    if name not in _warned:
        _warned.add(name)
        warnings.warn(
            f"attention: {name} is copied before each call, because {reason} "
            f"(shape {tuple(tensor.shape)}, strides {tensor.stride()}).",
            FlashCoreWarning,
            stacklevel=2,
        )
    return tensor.clone(memory_format=torch.contiguous_format)


class _Memory:
    """The memory of a tensor, described without a reference to it: a map must not keep its tensor alive."""

    def __init__(self, address: int, shape: tuple[int, ...], byte_strides: tuple[int, ...]):
        self.__cuda_array_interface__ = {
            "version": 3,
            "typestr": "<u2",  # the copies move 16-bit elements: which type they are is the kernel's business
            "data": (address, False),
            "shape": shape,
            "strides": byte_strides,
            "stream": None,
        }


def tensor_map(tensor: torch.Tensor, rows: int):
    """``cuda.core.TensorMapDescriptor`` of a 16-bit (B, S, H, D) tensor for boxes of `rows` x 64, 128-byte swizzle."""
    from cuda.core import TensorMapDescriptorOptions
    from cuda.core._tensor_map import TensorMapL2Promotion, TensorMapSwizzle
    from cuda.core.utils import StridedMemoryView

    batch, seqlen, heads, head_dim = tensor.shape
    # A dimension of size 1 may have any stride, but the map wants a legal one.
    b, s, h = (
        ALIGNMENT if size == 1 else stride * tensor.element_size()
        for size, stride in zip(tensor.shape, tensor.stride()[:3])
    )
    memory = _Memory(tensor.data_ptr(), (batch, heads, seqlen, head_dim), (b, h, s, tensor.element_size()))
    options = TensorMapDescriptorOptions(
        box_dim=(1, 1, rows, BOX_COLS),
        data_type=numpy.uint16,
        swizzle=TensorMapSwizzle.SWIZZLE_128B,
        l2_promotion=TensorMapL2Promotion.L2_256B,
    )
    return StridedMemoryView.from_cuda_array_interface(memory, stream_ptr=-1).as_tensor_map(options=options)
