"""Paged keys on the Triton kernel, with the chosen tiles and with others."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

import flashcore
from flashcore import api, backends
from flashcore.compat.flash_attn import flash_attn_with_kvcache
from flashcore.plan import override
from flashcore.sequences import Packed, Paged
from tests.backends.triton.test_triton_attention import PLAIN, SMALL, SMALL_AHEAD
from tests.packed import PackedCase, assert_packed_forward
from tests.paged import BY_NAME, PAGED_CASES, PagedCase
from tests.poison import poisoned_outputs

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of hidden infinities

REFUSED = {"d320", "float64"}
RUNNABLE = [case for case in PAGED_CASES if case.name not in REFUSED and not case.problem().is_empty]
CONFIGS = {"small": SMALL, "ahead": SMALL_AHEAD, "plain": PLAIN, "chosen": None}
# Each case with two of the configs, each config with many cases.
PAIRS = [
    pytest.param(case, name, id=f"{case}-{name}")
    for case, names in zip(RUNNABLE, itertools.cycle(itertools.combinations(CONFIGS, 2)), strict=False)
    for name in names
]


def check(case: PagedCase, config, device: str) -> None:
    q, k_cache, v_cache, places, k, v = case.inputs(device)
    call = {**case.packed.options(device), **places, "return_lse": True, "backend": "triton"}
    with override(config=config), poisoned_outputs():
        out, lse = flashcore.attention(q, k_cache, v_cache, **call)
    assert_packed_forward(case.packed, out, lse, q, k, v)


@pytest.mark.parametrize(("case", "config"), PAIRS)
def test_forward(case, config, device):
    check(case, CONFIGS[config], device)


def test_what_is_left_out_is_refused(device):
    for case in PAGED_CASES:
        if not case.problem(device).is_empty:
            refusal = backends.ATTENTION.refusal("triton", case.problem(device))
            assert (refusal is not None) == (case.name in REFUSED), case


@pytest.mark.parametrize("pack_gqa", [False, True])
@pytest.mark.parametrize("name", ["one_query_each", "mixed_pages_of_16", "mixed_pages_of_1", "sink", "window", "alibi"])
def test_splits(name, pack_gqa, device):
    """Their number is for the longest: others have empty ones."""
    check(BY_NAME[name], replace(SMALL, splits=3, pack_gqa=pack_gqa), device)


@pytest.mark.parametrize("size", [1, 16, 64])
@pytest.mark.parametrize("factor", [1, 3e4])
def test_pages_change_no_bit(factor, size, device):
    """Of what the same keys give in a packed tensor, huge scores included."""
    case = PagedCase("", PackedCase("", (65, 0, 33, 1), (70, 5, 64, 33), causal=True, more=100), size)
    q, k_cache, v_cache, places, k, v = case.inputs(device)
    call = {"causal": True, "return_lse": True, "backend": "triton"}
    with override(config=SMALL):
        paged = flashcore.attention(q * factor, k_cache * factor, v_cache, **places, **call)
        packed = flashcore.attention(q * factor, k * factor, v, **case.packed.packed(device), **call)
    for mine, theirs in zip(paged, packed, strict=True):
        assert torch.equal(mine, theirs)


def test_what_is_no_page_is_never_followed(device):
    """Not even within a length, nor what lies behind a row of the table: nothing outside of the cache is read."""
    cache = torch.zeros(3, 16, 2, 64, dtype=torch.bfloat16, device=device)
    whole = torch.full((5, 16, 2, 64), torch.nan, dtype=torch.bfloat16, device=device)
    whole[1:4] = cache
    numbers = torch.tensor([[-1, 3, 2**31 - 1, -(2**31)]] * 2, dtype=torch.int32, device=device)
    queries = Packed(torch.tensor([0, 5, 6], dtype=torch.int32, device=device), 5)
    keys = Paged(numbers, torch.tensor([1000, -7], dtype=torch.int32, device=device), 1000)
    q = torch.randn(6, 4, 64, dtype=torch.bfloat16, device=device)
    call = {"queries": queries, "keys": keys, "return_lse": True, "backend": "triton"}
    with override(config=SMALL):
        out, lse = flashcore.attention(q, whole[1:4], whole[1:4], **call)
    assert not out.any()
    torch.testing.assert_close(lse[:, :5], torch.full_like(lse[:, :5], math.log(4 * 16)))
    assert lse[:, 5].isneginf().all()


@pytest.mark.parametrize("leftpad", [None, [3, 0, 17, 5]])
@pytest.mark.parametrize("page_size", [4, 16])
def test_a_cache_in_pages_as_flash_attn_has_it(page_size, leftpad, device):
    """Pages of few rows, and padding on the left, by a table of rows: as the reference has it."""
    torch.manual_seed(0)
    pages, width = 64, 48 // page_size
    table = torch.randperm(pages, device=device).int()[: 4 * width].view(4, width)
    k_cache, v_cache = torch.randn(2, pages, page_size, 2, 64, dtype=torch.bfloat16, device=device)
    q, k, v = (torch.randn(4, 2, heads, 64, dtype=torch.bfloat16, device=device) for heads in (4, 2, 2))
    given = {"cache_seqlens": torch.tensor([3, 46, 20, 31], dtype=torch.int32, device=device), "block_table": table}
    if leftpad is not None:
        given["cache_leftpad"] = torch.tensor(leftpad, dtype=torch.int32, device=device)
    results = []
    for forced in ({"backend": "triton", "config": SMALL}, {"backend": "reference"}):
        caches = k_cache.clone(), v_cache.clone()
        with override(**forced):
            found = flash_attn_with_kvcache(q, *caches, k, v, causal=True, return_softmax_lse=True, **given)
        results.append((*found, *caches))
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine, right, rtol=2e-2, atol=2e-2)
    assert torch.equal(results[0][2], results[1][2])


def test_tables_and_lengths_that_change_in_place(device, monkeypatch):
    """As a captured graph replays a launch: the same plan."""
    before = PagedCase("", PackedCase("", (30, 0, 50, 1), (20, 40, 70, 3), causal=True, more=30))
    after = PagedCase("", PackedCase("", (1, 60, 17, 3), (70, 1, 0, 25), causal=True))
    _, k_cache, v_cache, places, *_ = before.inputs(device)
    with override(config=SMALL):
        for case in (before, after):
            q, k_now, v_now, others, k, v = case.inputs(device)
            places["queries"].offsets.copy_(others["queries"].offsets)
            places["keys"].table.copy_(others["keys"].table)
            places["keys"].lengths.copy_(others["keys"].lengths)
            k_cache[: len(k_now)], v_cache[: len(v_now)] = k_now, v_now
            call = {"causal": True, "return_lse": True, "backend": "triton", **places}
            out, lse = flashcore.attention(q, k_cache, v_cache, **call)
            assert_packed_forward(case.packed, out, lse, q, k, v)
            monkeypatch.setattr(api, "_problem", None)  # nobody describes the second call
