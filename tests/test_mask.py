"""The mask against its definition, element by element."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashcore.mask import Mask, Visible

bounds = st.one_of(st.none(), st.integers(0, 45))
masks = st.builds(
    Visible, mask=st.builds(Mask, bounds, bounds), seqlen_q=st.integers(0, 40), seqlen_k=st.integers(0, 40)
)


def kept(visible: Visible, i: int) -> list[int]:
    """The keys that query i sees, by the definition in flashcore.attention's docstring."""
    left, right = visible.mask.left, visible.mask.right
    distance = i + visible.seqlen_k - visible.seqlen_q
    return [
        j
        for j in range(visible.seqlen_k)
        if (left is None or distance - j <= left) and (right is None or j - distance <= right)
    ]


@given(masks)
def test_keep(mask):
    for i in range(mask.seqlen_q):
        assert [j for j in range(-2, mask.seqlen_k + 2) if mask.keep(i, j)] == kept(mask, i)
    for i in (-1, mask.seqlen_q):
        assert not any(mask.keep(i, j) for j in range(mask.seqlen_k))


@given(masks)
def test_keep_broadcasts_over_tensors(mask):
    i, j = torch.arange(mask.seqlen_q)[:, None], torch.arange(mask.seqlen_k)[None, :]
    expected = [[j in kept(mask, i) for j in range(mask.seqlen_k)] for i in range(mask.seqlen_q)]
    assert mask.keep(i, j).tolist() == expected


@given(masks)
def test_begin_and_end(mask):
    for i in range(mask.seqlen_q):
        assert list(range(mask.begin(i), mask.end(i))) == kept(mask, i)


@given(masks)
def test_queries_of_a_key(mask):
    for j in range(mask.seqlen_k):
        seeing = [i for i in range(mask.seqlen_q) if j in kept(mask, i)]
        assert list(range(mask.first_query(j), mask.last_query(j) + 1)) == seeing


@given(masks)
def test_what_is_said_of_all_rows(mask):
    rows = [kept(mask, i) for i in range(mask.seqlen_q)]
    assert mask.empty_rows == sum(not row for row in rows)
    assert all(rows[mask.empty_rows :])
    assert mask.pairs() == sum(map(len, rows))
    if mask.seqlen_k:
        assert mask.bounded_left == any(row and row[0] > 0 for row in rows)
        assert mask.bounded_right == any(not row or row[-1] < mask.seqlen_k - 1 for row in rows)


@given(masks, st.integers(0, 45), st.integers(1, 20))
def test_ranges_of_a_tile(mask, start, size):
    rows = [set(kept(mask, i)) for i in range(start, min(start + size, mask.seqlen_q))]
    seen_by_any = set().union(*rows)
    seen_by_all = set.intersection(*rows) if rows else set()
    assert set(range(*mask.kv_range(start, start + size))) == seen_by_any
    assert set(range(*mask.unmasked_range(start, start + size))) == seen_by_all


@pytest.mark.parametrize(
    ("mask", "seqlen_q", "seqlen_k", "rows"),
    [
        (Mask(right=0), 3, 3, ["x..", "xx.", "xxx"]),
        (Mask(right=0), 2, 4, ["xxx.", "xxxx"]),
        (Mask(right=0), 4, 2, ["..", "..", "x.", "xx"]),
        (Mask(1, 0), 4, 4, ["x...", "xx..", ".xx.", "..xx"]),
        (Mask(1, 1), 2, 4, [".xxx", "..xx"]),
        (Mask(0, 1), 4, 2, ["..", "x.", "xx", ".x"]),
    ],
)
def test_pictures(mask, seqlen_q, seqlen_k, rows):
    """Alignments and windows, as flash-attn documents them."""
    visible = mask.of(seqlen_q, seqlen_k)
    assert ["".join(".x"[visible.keep(i, j)] for j in range(seqlen_k)) for i in range(seqlen_q)] == rows
