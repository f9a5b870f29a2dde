"""What launches have in common: outputs, the stream, cuda.core's launch."""

from __future__ import annotations

import functools
import math
import threading

import torch

LOG2_E = 1 / math.log(2)


def allocate(
    q: torch.Tensor, lse_shape: tuple[int, ...] | None
) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """A forward's output, contiguous; its LSE if that has a shape; and the LSE's address, or 0."""
    # empty_like() is faster without a memory format, and then keeps the strides.
    out = torch.empty_like(q) if q.is_contiguous() else torch.empty_like(q, memory_format=torch.contiguous_format)
    if lse_shape is None:
        return out, None, 0
    lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
    return out, lse, lse.data_ptr()


@functools.cache
def cuda_launch():
    """``cuda.core.launch``; importing cuda.core takes long, and a machine without a GPU never gets here."""
    from cuda.core import launch

    return launch


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
