"""What TMA can address, and what is copied for it."""

import pytest
import torch

from flashcore.backends.hopper import tma
from flashcore.errors import FlashCoreWarning


def dense(*shape):
    """A tensor whose data is aligned, as CUDA's allocator aligns it."""
    storage = torch.randn(torch.Size(shape).numel() + 8).to(torch.bfloat16)
    offset = -storage.data_ptr() % 16 // 2
    return storage[offset : offset + torch.Size(shape).numel()].view(shape)


ADDRESSABLE = {
    "contiguous": dense(2, 10, 4, 64),
    "packed": dense(2, 10, 3, 4, 64)[:, :, 1],
    "bhsd": dense(2, 4, 10, 64).transpose(1, 2),
    "head_dim 40": dense(2, 10, 4, 40),
    "part of the head": dense(2, 10, 4, 64)[..., 8:48],
    "one batch of odd stride": dense(2 * 999)[:640].as_strided((1, 10, 1, 64), (999, 64, 3, 1)),
}
OBSTACLES = {
    "aligned": dense(1, 10, 4, 64).view(-1)[1 : 1 + 9 * 256].view(1, 9, 4, 64),
    "last dimension": dense(2, 10, 64, 4).transpose(2, 3),
    "head stride": dense(2, 10, 4, 36)[..., :32],
    "sequence stride": dense(2 * 2000).as_strided((1, 10, 4, 64), (4000, 260, 64, 1)),
    "batch stride": dense(5000).as_strided((2, 4, 4, 64), (1026, 256, 64, 1)),
    "sequence stride of 0": dense(2, 1, 4, 64).expand(2, 10, 4, 64),
}


@pytest.mark.parametrize("name", ADDRESSABLE)
def test_read_in_place(name):
    tensor = ADDRESSABLE[name]
    assert tma.obstacle(tensor) is None
    assert tma.addressable(tensor, "q") is tensor


@pytest.mark.parametrize("name", OBSTACLES)
def test_copied_with_one_warning(name, monkeypatch):
    monkeypatch.setattr(tma, "_warned", set())
    tensor = OBSTACLES[name]
    assert name in tma.obstacle(tensor)
    with pytest.warns(FlashCoreWarning, match=name):
        first = tma.addressable(tensor, "k")
    tma.addressable(tensor, "k")  # a second warning would be an error
    assert first.is_contiguous()
    assert torch.equal(first, tensor)
