"""Where tokens lie, and that the bands of all pairs of ranks are the mask: every visible pair once, and no other."""

import itertools
import re
from pathlib import Path

import pytest
import torch

import flashcore
from flashcore import distributed
from flashcore.distributed.layout import LAYOUTS, Layout, Share, bands, span, whole
from flashcore.errors import InvalidInputError
from flashcore.mask import Mask

ROOT = Path(flashcore.__file__).parents[1]
PAGE = ROOT / "docs" / "distributed.md"
MASKS = [
    Mask(left, right)
    for left, right in itertools.product((None, 0, 1, 3, 7, 11), (None, 0, 2, 5, 12))
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_shares_are_the_sequence(layout, ranks):
    where = Layout(layout, ranks)
    sequence = torch.arange(2 * where.parts)
    shares = [where.shard(sequence, rank, 0) for rank in range(ranks)]
    assert torch.equal(where.join(shares, 0), sequence)
    assert {len(share) for share in shares} == {len(sequence) // ranks}
    for rank, share in enumerate(shares):
        cuts = Share(where, rank, len(share)).cuts(None)
        assert torch.cat([torch.arange(at, at + n) for _, at, n in cuts]).equal(share)


def test_zigzag_gives_the_same_work_to_all():
    where, tokens = Layout("zigzag", 4), torch.arange(32)
    assert {int(where.shard(tokens, rank, 0).sum()) for rank in range(4)} == {8 * 31 // 2}


SHAPES = [
    (layout, ranks, seqlen_q, seqlen_k, block)
    for layout, (ranks, seqlen_q, seqlen_k), block in itertools.product(
        LAYOUTS, [(1, 12, 12), (2, 6, 6), (3, 4, 4), (3, 2, 6), (2, 8, 4)], (None, 1, 2)
    )
    if not block or all(length // len(Layout(layout, 1).chunks(0)) % block == 0 for length in (seqlen_q, seqlen_k))
]


@pytest.mark.parametrize(("layout", "ranks", "seqlen_q", "seqlen_k", "block"), SHAPES)
def test_bands_are_the_mask(layout, ranks, seqlen_q, seqlen_k, block):
    for mask in MASKS:
        check_bands(mask, Layout(layout, ranks), ranks, seqlen_q, seqlen_k, block)


def check_bands(mask, where, ranks, seqlen_q, seqlen_k, block):
    offset = (seqlen_k - seqlen_q) * ranks
    all_q, all_k = torch.arange(seqlen_q * ranks), torch.arange(seqlen_k * ranks)
    seen = torch.zeros(len(all_q), len(all_k), dtype=torch.int)
    for rank, source in itertools.product(range(ranks), repeat=2):
        queries, keys = Share(where, rank, seqlen_q), Share(where, source, seqlen_k)
        row_at, key_at = where.shard(all_q, rank, 0), where.shard(all_k, source, 0)
        found = bands(mask, offset, queries, keys, block)
        for part in found:
            rows, columns = row_at[slice(*part.rows)], key_at[slice(*part.keys)]
            of_part = part.mask
            assert all(side is None or side >= 0 for side in (of_part.left, of_part.right))
            keep = of_part.of(len(rows), len(columns)).keep(
                torch.arange(len(rows))[:, None], torch.arange(len(columns))
            )
            assert keep.any(1).all(), "a row that sees nothing"
            assert keep.any(0).all(), "a key that nobody sees"
            assert block is None or max(keep.shape) <= block
            seen[rows[:, None], columns] += keep.int()
        begin, end = span(found)
        assert all(begin <= part.keys[0] and part.keys[1] <= end for part in found)
    expected = mask.of(len(all_q), len(all_k)).keep(all_q[:, None], all_k)
    assert torch.equal(seen, expected.int()), mask


@pytest.mark.parametrize(
    ("rank", "source", "rows", "keys", "mask"),
    [
        (1, 1, (0, 8), (0, 8), Mask(right=0)),  # its own: one causal part, though two chunks
        (1, 0, (0, 8), (0, 4), Mask()),  # of an earlier rank the first chunk
        (1, 2, (4, 8), (0, 8), Mask()),  # of a later one both, for the second chunk of queries
    ],
)
def test_a_causal_zigzag_step_is_one_part(rank, source, rows, keys, mask):
    where = Layout("zigzag", 3)
    (part,) = bands(Mask(right=0), 0, Share(where, rank, 8), Share(where, source, 8))
    assert (part.rows, part.keys, part.mask) == (rows, keys, mask)


def test_a_window_skips_what_nobody_sees():
    where = Layout("contiguous", 4)
    of_rank_3 = [bands(Mask(4, 0), 0, Share(where, 3, 8), Share(where, source, 8)) for source in range(4)]
    assert [span(found) for found in of_rank_3] == [(0, 0), (0, 0), (4, 8), (0, 8)]


def test_blocks_lie_where_they_lie_in_the_sequence():
    """Whatever the ranks: the same blocks with the same masks, in the order of the sequence."""

    def blocks(where):
        found = []
        for rank in range(where.ranks):
            queries = Share(where, rank, 24 // where.ranks)
            at = {first + i: position + i for first, position, n in queries.cuts(3) for i in range(n)}
            for part in bands(Mask(7, 0), 0, queries, whole(24), 3):
                found.append((at[part.rows[0]], part.rows[1] - part.rows[0], part.keys, part.mask))
        return sorted(found, key=lambda one: one[0]), found

    (expected, _), *others = (
        blocks(Layout(name, ranks)) for name, ranks in [("contiguous", 1), ("contiguous", 4), ("zigzag", 4)]
    )
    for in_order, as_found in others:
        assert in_order == expected
        assert all(a[2] < b[2] for a, b in itertools.pairwise(as_found) if a[0] == b[0])


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not a clone")
def test_bytes_in_the_documentation():
    """Of causal passes over 16384 tokens a rank, head_dim 128, bfloat16."""
    rows = re.findall(r"^\| (\d+) \| (\d+):(\d+) \| (\d+) MiB \| (\d+) MiB \| (\d+) \|$", PAGE.read_text(), re.M)
    assert len(rows) == 3
    for row in rows:
        ranks, heads_q, heads_k, *printed, steps = map(int, row)
        q, k = (1, 16384, heads_q, 128), (1, 16384, heads_k, 128)
        problem = flashcore.AttentionProblem.hypothetical(q, k, arch=(9, 0), causal=True)
        received = [
            distributed._choose(problem, method, Layout("zigzag", ranks), None)[2] / 2**20
            for method in ("ring", "ulysses")
        ]
        assert received == printed
        assert steps == ranks


def test_refusals():
    with pytest.raises(InvalidInputError, match="layout='stripes' does not exist"):
        Layout("stripes", 2)
    with pytest.raises(InvalidInputError, match="the sequence has 10 tokens, which 2 ranks cannot share in the zigzag"):
        Layout("zigzag", 2).check("the sequence", 10)
