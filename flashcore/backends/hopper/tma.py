"""Tensors as TMA sees them: the only place where tensor maps are made.

A (batch, seqlen, heads, head_dim) tensor becomes a map with dimensions (head_dim, seqlen, heads, batch), innermost
first, whatever its strides, and a box of `rows` sequence positions by 64 elements (128 bytes, the swizzle width) of
one head. Reads past the end of any dimension give zeros, writes there are dropped, so neither tails nor head_dims
below the tile's need a copy.

A tensor of packed sequences, (total, heads, head_dim), becomes one with dimensions (head_dim, PACKED_ORIGIN, heads,
PACKED_ORIGIN + 1, total + 1). A sequence of `length` rows from `first` on has its row r at (PACKED_ORIGIN - length + r,
PACKED_ORIGIN, first + length) of those for rows: past its end is out of bounds, so that nothing of a neighbour is read
and nothing of it is written. That the three reach the row, (first + r) strides from the tensor's address, is arithmetic
modulo 2^64: the second has such a stride that PACKED_ORIGIN of its and of the first's make 2^64.

A (batch, rows, columns) matrix becomes a map with dimensions (columns, rows, batch) in the same way.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy
import torch

from flashcore.errors import FlashCoreWarning

ALIGNMENT = 16  # bytes: of the base address and of every stride but the innermost
BOX_COLS = 64
PACKED_ORIGIN = 2**30  # as in device/attention/box.cuh
_UNSIGNED = {2: numpy.uint16, 4: numpy.uint32}  # data type by bytes


def obstacle(tensor: torch.Tensor, broadcast: bool = False) -> str | None:
    """Why TMA cannot address this (B, S, H, D) or (total, H, D) tensor where it lies; None if it can.

    :param broadcast: strides may be 0, as for a kernel that reads 16 bytes at a time without TMA.
    """
    if tensor.data_ptr() % ALIGNMENT:
        return f"its data is not aligned to {ALIGNMENT} bytes"
    *outer, inner = tensor.stride()
    if inner != 1 and tensor.shape[-1] > 1:
        return f"its last dimension has stride {inner}"
    step = ALIGNMENT // tensor.element_size()
    for name, size, stride in zip(("batch", "sequence", "head")[-len(outer) :], tensor.shape, outer, strict=False):
        if size > 1 and (stride % step or (stride == 0 and not broadcast)):
            return f"its {name} stride of {stride} elements is not a positive multiple of {step}"
    return None


_warned: set[tuple[str, str]] = set()  # (operation, tensor name)


def addressable(tensor: torch.Tensor, name: str, broadcast: bool = False) -> torch.Tensor:
    """The tensor, or a contiguous copy if there is an `obstacle` to reading it where it lies (warns once per name)."""
    reason = obstacle(tensor, broadcast)
    if reason is None:
        return tensor
    _warn_of_copy("attention", name, reason, tensor)
    return tensor.clone(memory_format=torch.contiguous_format)


def _warn_of_copy(operation: str, name: str, reason: str, tensor: torch.Tensor) -> None:
    if (operation, name) not in _warned:
        _warned.add((operation, name))
        warnings.warn(
            f"{operation}: {name} is copied before each call, because {reason} "
            f"(shape {tuple(tensor.shape)}, strides {tensor.stride()}).",
            FlashCoreWarning,
            stacklevel=3,
        )


def matrix_obstacle(matrix: torch.Tensor) -> str | None:
    """Why TMA cannot address this (batch, rows, columns) matrix where it lies; None if it can."""
    if matrix.data_ptr() % ALIGNMENT:
        return f"its data is not aligned to {ALIGNMENT} bytes"
    *outer, inner = matrix.stride()
    if inner != 1 and matrix.shape[-1] > 1:
        return "neither of its last two dimensions is dense"
    step = ALIGNMENT // matrix.element_size()
    for size, stride in zip(matrix.shape, outer, strict=False):
        if size > 1 and (stride % step or stride == 0):
            return f"its stride of {stride} elements is not a positive multiple of {step}"
    return None


def addressable_matrix(matrix: torch.Tensor, name: str) -> torch.Tensor:
    """The matrix, or a copy with padded rows if TMA cannot address it where it lies (warns once per name)."""
    reason = matrix_obstacle(matrix)
    if reason is None:
        return matrix
    _warn_of_copy("matmul", name, reason, matrix)
    batch, rows, columns = matrix.shape
    step = ALIGNMENT // matrix.element_size()
    copy = matrix.new_empty(batch, rows, -(-columns // step) * step)[:, :, :columns]
    return copy.copy_(matrix)


class _Memory:
    """The memory of a tensor, described without a reference to it: a map must not keep its tensor alive."""

    def __init__(self, address: int, shape: tuple[int, ...], byte_strides: tuple[int, ...]):
        self.__cuda_array_interface__ = {
            "version": 3,
            "typestr": f"<u{byte_strides[-1]}",  # copies move bits: which type they are is the kernel's business
            "data": (address, False),
            "shape": shape,
            "strides": byte_strides,
            "stream": None,
        }


def tensor_map(tensor: torch.Tensor, rows: int):
    """``cuda.core.TensorMapDescriptor`` of a 16-bit (B, S, H, D) tensor for boxes of `rows` x 64, 128-byte swizzle."""
    return _encode(tensor.transpose(1, 2), (1, 1, rows, BOX_COLS))


def packed_map(tensor: torch.Tensor, rows: int):
    """The same of packed sequences."""
    return _encode_memory(tensor, *packed_layout(tensor), (1, 1, 1, rows, BOX_COLS))


def packed_layout(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides in bytes of the map of a (total, H, D) tensor, outermost first."""
    total, heads, head_dim = tensor.shape
    # A dimension of size 1 may have any stride, but the map wants a legal one.
    row, head = (
        ALIGNMENT if size == 1 else max(ALIGNMENT, stride * tensor.element_size())
        for size, stride in zip((total, heads), tensor.stride(), strict=False)
    )
    sizes = (total + 1, PACKED_ORIGIN + 1, heads, PACKED_ORIGIN, head_dim)
    return sizes, (row, 2**64 // PACKED_ORIGIN - row, head, row, tensor.element_size())


def map_of(name: str, rows: int, tensor: torch.Tensor):
    """The map of a tensor as a kernel can read it, and that tensor: a copy where it must be one."""
    addressed = addressable(tensor, name)
    return (tensor_map if tensor.dim() == 4 else packed_map)(addressed, rows), addressed


def matrix_map(matrix: torch.Tensor, rows: int, columns: int = BOX_COLS):
    """The same of a (batch, rows, columns) matrix of 16 or 32 bits; a box row must have 128 bytes."""
    return _encode(matrix, (1, rows, columns))


def _encode(tensor: torch.Tensor, box: tuple[int, ...]):
    itemsize = tensor.element_size()
    # A dimension of size 1 may have any stride, but the map wants a legal one.
    sizes_and_strides = zip(tensor.shape, tensor.stride(), strict=True)
    strides = [ALIGNMENT if size == 1 else stride * itemsize for size, stride in sizes_and_strides]
    strides[-1] = itemsize
    return _encode_memory(tensor, tuple(tensor.shape), strides, box)


def _encode_memory(tensor: torch.Tensor, sizes: tuple[int, ...], strides: Sequence[int], box: tuple[int, ...]):
    """The map of a tensor's memory with these sizes and strides in bytes, outermost first."""
    from cuda.core import Device, TensorMapDescriptorOptions
    from cuda.core._tensor_map import TensorMapL2Promotion, TensorMapSwizzle
    from cuda.core.utils import StridedMemoryView

    Device(tensor.device.index).set_current()  # autograd's threads may have no CUDA context yet
    memory = _Memory(tensor.data_ptr(), sizes, tuple(strides))
    options = TensorMapDescriptorOptions(
        box_dim=box,
        data_type=_UNSIGNED[tensor.element_size()],
        swizzle=TensorMapSwizzle.SWIZZLE_128B,
        l2_promotion=TensorMapL2Promotion.L2_256B,
    )
    return StridedMemoryView.from_cuda_array_interface(memory, stream_ptr=-1).as_tensor_map(options=options)
