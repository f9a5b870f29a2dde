"""Packed sequences: every named case, on every backend that does not reject it, on every device there is."""

from __future__ import annotations

import pytest
import torch

import flashcore
from tests.cases import accepted
from tests.packed import PACKED_CASES, PackedCase, assert_packed_forward, assert_packed_gradients
from tests.poison import poisoned_outputs


def check(name: str, case: PackedCase, device: str) -> None:
    """Forward with the LSE, then the gradients, through the public call."""
    q, k, v = (t.detach().requires_grad_() for t in case.inputs(device))
    options = case.options(device)
    leaves = [q, k, v]
    if options["sink"] is not None:
        leaves.append(options["sink"].requires_grad_())
    with poisoned_outputs():
        out, lse = flashcore.attention(q, k, v, **options, **case.packed(device), return_lse=True, backend=name)
    assert_packed_forward(case, out.detach(), lse, q, k, v)
    if out.requires_grad:  # in a sequence or not: no gradient of the latter
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        with poisoned_outputs():
            grads = torch.autograd.grad(out, leaves, dout)
        assert_packed_gradients(case, grads, q, k, v, dout)


@pytest.mark.parametrize(("name", "case"), accepted(PACKED_CASES, "cpu"))
def test_on_the_cpu(name, case):
    check(name, case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "case"), accepted(PACKED_CASES, "cuda") if torch.cuda.is_available() else [("any", None)]
)
@pytest.mark.filterwarnings("ignore::flashcore.errors.FlashCoreWarning")
def test_on_a_gpu(name, case):
    check(name, case, "cuda")


def test_each_case_has_its_own_name():
    assert len({case.name for case in PACKED_CASES}) == len(PACKED_CASES)


@pytest.mark.parametrize("case", PACKED_CASES, ids=str)
def test_rows_of_no_sequence_are_poison(case):
    for tensor, lengths in zip(case.inputs(), (case.lengths_q, case.keys, case.keys), strict=True):
        owned = torch.zeros(len(tensor), dtype=torch.bool)
        for rows in case.places(lengths):
            owned[rows] = True
        assert owned.sum() == sum(lengths)
        assert torch.equal(tensor.isnan().flatten(1).all(1), ~owned)
        assert torch.equal(tensor.isnan().flatten(1).any(1), ~owned)
