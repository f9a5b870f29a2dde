"""What a launch does on the host that needs no GPU: contexts of threads, and which tensors are read where they lie."""

import threading

import pytest
import torch

core = pytest.importorskip("cuda.core", reason="needs cuda-core (extra cu13 or cu12)")

from flashcore.backends.hopper import launch, tma  # noqa: E402


def test_a_thread_gets_the_context_of_each_device_before_it_launches(monkeypatch):
    given = []

    class Device:
        def __init__(self, index):
            self.index = index

        def set_current(self):
            given.append((threading.current_thread().name, self.index))

    class Stream:
        from_handle = staticmethod(lambda handle: handle)

    monkeypatch.setattr(core, "Device", Device)
    monkeypatch.setattr(core, "Stream", Stream)
    monkeypatch.setattr(launch, "_raw_stream", lambda device: 100 + device)
    monkeypatch.setattr(launch, "_streams", {})
    monkeypatch.setattr(launch, "_thread", threading.local())

    def work():
        assert [launch.current_stream(device) for device in (0, 0, 1, 1, 0)] == [100, 100, 101, 101, 100]

    for name in ("first", "second"):
        thread = threading.Thread(target=work, name=name)
        thread.start()
        thread.join()
    assert given == [(name, device) for name in ("first", "second") for device in (0, 1, 0)]


def readable(tensor):
    return tma.obstacle(tensor, broadcast=True) is None


def test_what_the_decoding_kernel_reads_where_it_lies():
    cache = torch.zeros(2, 8, 100, 64, dtype=torch.bfloat16)
    assert readable(cache.transpose(1, 2))
    assert readable(cache.transpose(1, 2)[:, 10:50])
    assert readable(cache[:1].transpose(1, 2).expand(5, -1, -1, -1))
    assert readable(cache[:, :1].transpose(1, 2).expand(-1, -1, 8, -1))
    packed = torch.zeros(2, 100, 1, 65, dtype=torch.bfloat16)
    assert not readable(packed[..., 1:])  # neither its address nor its rows are aligned
    assert not readable(packed[..., :64])
    assert readable(packed[:1, :1, :, :64])  # one row has no stride
    assert not readable(cache.transpose(1, 2)[..., ::2])
