"""How a Triton kernel is started: through Triton's JIT the first time, by what that compiled from then on.

``function[grid](...)`` examines every argument of every call to find the compiled kernel that fits: most of the host's
time. But it returns that kernel, and a compiled kernel can be launched by itself: ``compiled[grid](*arguments)``, as in
Triton's own tutorial on the fused softmax. What must be the same then is all that Triton specialises a kernel on:
constants and dtypes, which are fixed for a `Launch`; whether integers are 1 or multiples of 16, hence the strides are
remembered with the kernel; whether addresses are multiples of 16, which every call checks; and the device.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

_MAX_KNOWN = 64  # sets of strides that one problem is expected to come with


class Launch:
    """A kernel with all arguments but its tensors and their strides.

    :param function: takes tensors, a tuple of more tensors if it is given any, tuples of strides, the floats of a call,
        scalars and constants, in this order. Its integer scalars must be marked ``do_not_specialize``.
    :param constants: its constexpr arguments, in its order.
    :param options: Triton's own, such as ``num_warps``.
    :param streams: of each tensor that the copy engine reads where constants["TMA"] is true and these tensors allow it,
        its position, and the rows and columns of the tile that it reads.
    """

    def __init__(
        self, function: Any, grid: tuple[int, int, int], scalars: tuple, constants: dict[str, Any],
        options: dict[str, Any], streams: tuple[tuple[int, int, int], ...] = (),
    ):  # fmt: skip
        self._function, self._grid, self._scalars, self._constants = function, grid, scalars, constants
        self._options, self._streams = options, streams
        # (device, strides) -> a compiled kernel on its grid, descriptors of streams by position, what follows floats
        self._known: dict[tuple, tuple] = {}

    def __call__(
        self, tensors: tuple[torch.Tensor, ...], strides: tuple, *floats: float,
        captured: tuple[torch.Tensor, ...] = (),
    ) -> None:  # fmt: skip
        """Launch on the current stream. Tensors must be on the current device.

        :param captured: more tensors, which the kernel takes as one tuple.
        """
        key = tensors[0].get_device(), strides
        known = self._known.get(key)
        arguments: list = [tensor.data_ptr() for tensor in tensors]
        bits = 0
        for address in arguments:
            bits |= address
        if captured:
            arguments.append(tuple(tensor.data_ptr() for tensor in captured))
            for address in arguments[-1]:
                bits |= address
        if known is None or bits % 16:
            more = (captured,) if captured else ()
            self._by_jit(key, tensors, (*more, *strides, *floats), remember=bits % 16 == 0)
            return
        run, descriptors, rest = known
        for position, descriptor in descriptors:
            arguments[position] = _moved(descriptor, tensors[position])
        run(*arguments, *strides, *floats, *rest)

    def _by_jit(self, key: tuple, tensors: tuple, following: tuple, remember: bool) -> None:
        constants = dict(self._constants)
        descriptors = []
        if constants.get("TMA"):
            constants["TMA"] = all(addressable(tensors[i]) for i, *_ in self._streams)
            if constants["TMA"]:
                descriptors = [(i, descriptor(tensors[i], *block)) for i, *block in self._streams]
        arguments = list(tensors)
        for position, one in descriptors:
            arguments[position] = one
        compiled = self._function[self._grid](
            *arguments, *following, *self._scalars, **constants, **self._options
        )
        if remember and compiled is not None:  # the interpreter compiles nothing
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            descriptors = [(i, _moved(one, None)) for i, one in descriptors]  # keep no tensor alive
            self._known[key] = compiled[self._grid], descriptors, (*self._scalars, *constants.values())


def addressable(tensor: torch.Tensor) -> bool:
    """Whether the copy engine can read the tensor where it is: 16-byte aligned, last dimension dense, no stride 0."""
    size = tensor.element_size()
    strides = [
        stride * size for stride, n in zip(tensor.stride()[:3], tensor.shape[:3], strict=True) if n > 1
    ]
    return (
        tensor.stride(3) == 1
        and tensor.data_ptr() % 16 == 0
        and all(0 < stride < 2**40 and stride % 16 == 0 for stride in strides)
    )


def descriptor(tensor: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of (batch, heads, seqlen, head_dim) that reads tiles of `rows` x `columns` of one head."""
    batch, seqlen, heads, head_dim = tensor.shape
    size = 16 // tensor.element_size()
    # The stride of a dimension of size 1 means nothing, but must be valid.
    strides = [tensor.stride(i) if tensor.shape[i] > 1 else -(-head_dim // size) * size for i in (0, 2, 1)]
    return TensorDescriptor(tensor, [batch, heads, seqlen, head_dim], [*strides, 1], [1, 1, rows, columns])


def _moved(descriptor: TensorDescriptor, base: torch.Tensor | None) -> TensorDescriptor:
    """The same descriptor of another tensor, without checking again what was checked for the first."""
    moved = object.__new__(TensorDescriptor)
    moved.__dict__.update(descriptor.__dict__, base=base)
    return moved
