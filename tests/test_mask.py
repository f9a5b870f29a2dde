"""The mask against its definition, element by element."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashcore.mask import Mask

masks = st.builds(Mask, causal=st.booleans(), seqlen_q=st.integers(0, 40), seqlen_k=st.integers(0, 40))


def kept(mask: Mask, i: int) -> list[int]:
    """The keys that query i sees, by the definition in flashcore.attention's docstring."""
    return [j for j in range(mask.seqlen_k) if not mask.causal or j <= i + mask.seqlen_k - mask.seqlen_q]


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
def test_empty_rows(mask):
    assert mask.empty_rows == sum(not kept(mask, i) for i in range(mask.seqlen_q))


@given(masks, st.integers(0, 45), st.integers(1, 20))
def test_ranges_of_a_tile(mask, start, size):
    rows = [set(kept(mask, i)) for i in range(start, min(start + size, mask.seqlen_q))]
    seen_by_any = set().union(*rows)
    seen_by_all = set.intersection(*rows) if rows else set()
    assert set(range(*mask.kv_range(start, start + size))) == seen_by_any
    assert set(range(*mask.unmasked_range(start, start + size))) == seen_by_all


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "rows"),
    [
        (3, 3, ["x..", "xx.", "xxx"]),
        (2, 4, ["xxx.", "xxxx"]),
        (4, 2, ["..", "..", "x.", "xx"]),
    ],
)
def test_pictures(seqlen_q, seqlen_k, rows):
    """The three alignments, as flash-attn documents them."""
    mask = Mask(True, seqlen_q, seqlen_k)
    assert ["".join(".x"[mask.keep(i, j)] for j in range(seqlen_k)) for i in range(seqlen_q)] == rows
