"""Every named case, on every backend that does not reject it, on every device there is."""

from __future__ import annotations

import pytest
import torch

import flashcore
from flashcore import backends
from tests.cases import CASES, Case, accepted
from tests.poison import poisoned_outputs
from tests.tolerance import assert_forward


def check(name: str, case: Case, device: str) -> None:
    """Run the case with poisoned outputs, with the LSE if the backend gives one, and hold it to the error rule."""
    q, k, v = case.inputs(device)
    options = case.options(device)
    gives_lse = name == "auto" or backends.ATTENTION.refusal(name, case.problem(device, return_lse=True)) is None
    with poisoned_outputs():
        result = flashcore.attention(q, k, v, return_lse=gives_lse, backend=name, **options)
    out, lse = result if gives_lse else (result, None)
    assert_forward(out, lse, q, k, v, **options)


@pytest.mark.parametrize(("name", "case"), accepted(CASES, "cpu"))
def test_on_the_cpu(name, case):
    check(name, case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "case"), accepted(CASES, "cuda") if torch.cuda.is_available() else [("any", None)])
@pytest.mark.filterwarnings("ignore::flashcore.errors.FlashCoreWarning")
def test_on_a_gpu(name, case):
    check(name, case, "cuda")


def test_each_case_has_its_own_name():
    assert len({case.name for case in CASES}) == len(CASES)


def test_inputs_are_the_same_each_time_and_differ_by_seed():
    first, again, other = (CASES[0].inputs(seed=seed) for seed in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_inputs_lie_in_poison(case):
    """All of the storage that the tensor does not show is NaN, and nothing of what it shows."""
    for tensor in case.inputs():
        storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        shown = torch.zeros_like(storage, dtype=torch.bool)
        shown.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
        assert torch.equal(storage.isnan(), ~shown)
        assert tensor.storage_offset() >= 512


LAYOUTS = {
    "bshd": lambda q: q.is_contiguous(),
    "packed": lambda q: q.stride(1) == q.shape[3] * (q.shape[2] + 2 * 2) and q.stride(3) == 1,
    "bhsd": lambda q: q.transpose(1, 2).is_contiguous() and not q.is_contiguous(),
    "offset": lambda q: q.data_ptr() % 16 == 0 and q.storage_offset() % 64 == 8,
    "misaligned": lambda q: q.data_ptr() % 16 == 2,
    "odd_row": lambda q: q.stride(1) % 2 == 1,
    "last_strided": lambda q: q.stride(3) == 2,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_what_they_are_called(layout):
    q, _, _ = Case("", layout=layout, heads_k=2, seqlen_q=5, seqlen_k=5).inputs()
    assert LAYOUTS[layout](q)


def test_expanded_layout():
    q, k, v = Case("", layout="expanded", heads_k=2).inputs()
    assert q.is_contiguous()
    assert k.stride()[0] == k.stride()[2] == v.stride()[0] == v.stride()[2] == 0
