"""Paged keys: every named case, on every backend that does not reject it, on every device there is."""

from __future__ import annotations

import pytest
import torch

import flashcore
from tests.cases import accepted
from tests.packed import assert_packed_forward
from tests.paged import PAGED_CASES, SPARE, PagedCase
from tests.poison import poisoned_outputs


def check(name: str, case: PagedCase, device: str) -> None:
    q, k_cache, v_cache, places, k, v = case.inputs(device)
    call = {**case.packed.options(device), **places, "return_lse": True, "backend": name}
    with poisoned_outputs():
        out, lse = flashcore.attention(q, k_cache, v_cache, **call)
    assert_packed_forward(case.packed, out, lse, q, k, v)


@pytest.mark.parametrize(("name", "case"), accepted(PAGED_CASES, "cpu"))
def test_on_the_cpu(name, case):
    check(name, case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "case"), accepted(PAGED_CASES, "cuda") if torch.cuda.is_available() else [("any", None)]
)
@pytest.mark.filterwarnings("ignore::flashcore.errors.FlashCoreWarning")
def test_on_a_gpu(name, case):
    check(name, case, "cuda")


def test_each_case_has_its_own_name():
    assert len({case.name for case in PAGED_CASES}) == len(PAGED_CASES)


@pytest.mark.parametrize("case", PAGED_CASES, ids=str)
def test_what_no_sequence_has_is_poison(case):
    """Rows in the pages of a sequence past its end, and pages of nobody."""
    _, *caches, places, _, _ = case.inputs()
    table = places["keys"].table
    owned = torch.zeros(caches[0].shape[:2], dtype=torch.bool)
    for pages, n in zip(table, case.packed.keys, strict=True):
        for first in range(0, n, case.page_size):
            owned[int(pages[first // case.page_size]), : n - first] = True
        assert not any(0 <= int(page) < len(owned) for page in pages[-(-n // case.page_size) :])
    assert (~owned.any(1)).sum() >= SPARE
    for cache in caches:
        assert torch.equal(cache.isnan().flatten(2).all(2), ~owned)
        assert torch.equal(cache.isnan().flatten(2).any(2), ~owned)


@pytest.mark.parametrize("case", [case for case in PAGED_CASES if case.prefix], ids=str)
def test_pages_are_shared(case):
    table = case.inputs().places["keys"].table
    assert torch.equal(table[0, :4], table[1, :4])
    assert table[0, 4] != table[1, 4]
