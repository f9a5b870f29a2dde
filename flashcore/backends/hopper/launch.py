"""What every launch needs from cuda.core."""

from __future__ import annotations

import functools
import threading

import torch


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
