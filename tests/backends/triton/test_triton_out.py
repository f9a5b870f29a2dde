"""out=: Triton's kernels write the output where the caller says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import flashcore
from flashcore.plan import override
from tests.backends.triton.test_triton_attention import SMALL
from tests.packed import BY_NAME as PACKED
from tests.paged import BY_NAME as PAGED
from tests.poison import poisoned_outputs

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of hidden infinities


def calls(device):
    q, k, v = (torch.randn(2, 70, heads, 64, dtype=torch.bfloat16, device=device) for heads in (4, 2, 2))
    yield (q, k, v), {"causal": True}
    case = PACKED["rows_around"]
    yield case.inputs(device), {**case.options(device), **case.packed(device)}
    q, k, v, places, *_ = PAGED["unused_queries"].inputs(device)
    yield (q, k, v), {**PAGED["unused_queries"].packed.options(device), **places}


@pytest.mark.parametrize("splits", [1, 3])
def test_the_output_is_written_there(splits, device, monkeypatch):
    for tensors, options in calls(device):
        options |= {"backend": "triton", "return_lse": True}
        with override(config=replace(SMALL, splits=splits)), poisoned_outputs():
            expected, expected_lse = flashcore.attention(*tensors, **options)
            place = torch.full_like(expected, torch.nan)
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "copy_", None)  # nor is it moved there
                out, lse = flashcore.attention(*tensors, **options, out=place)
        assert out is place
        assert torch.equal(place, expected)
        assert torch.equal(lse, expected_lse)
