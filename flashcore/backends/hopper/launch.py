"""What every launch needs from cuda.core."""

from __future__ import annotations

import functools

import torch


@functools.cache
def cuda_launch():
    """``cuda.core.launch``; importing cuda.core takes long, and a machine without a GPU never gets here."""
    from cuda.core import launch

    return launch


_streams: dict[int, object] = {}  # by raw handle
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # PyTorch without CUDA has none


def current_stream(device: int):
    """PyTorch's current stream as a ``cuda.core.Stream``."""
    handle = _raw_stream(device)
    stream = _streams.get(handle)
    if stream is None:
        from cuda.core import Stream

        stream = _streams[handle] = Stream.from_handle(handle)
    return stream
