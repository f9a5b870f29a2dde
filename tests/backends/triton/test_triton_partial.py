"""Parts of the keys by Triton's kernels: outputs and gradients in float32."""

import pytest
import torch

from tests.backends.test_partial import MASKS, check_parts


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parts_are_the_whole(mask, dtype, device):
    check_parts("triton", "triton", dtype, MASKS[mask], device)
