"""What Triton's kernels say of masks, against flashcore/mask.py."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from flashcore.backends.triton import tiles
from flashcore.backends.triton.attention import diagonals
from flashcore.mask import Mask, Visible
from flashcore.problem import AttentionProblem

LENGTH = 64  # queries and keys that are looked at, more than there are


def probe(out, first, last, left, right, seqlen_q, seqlen_k, LEFT: tl.constexpr, RIGHT: tl.constexpr, N: tl.constexpr):
    """begin, end and keep of all queries; then the ranges of rows or columns `first` to `last`."""
    i = tl.arange(0, N)
    tl.store(out + i, tiles.begin(i, left, seqlen_k, LEFT))
    tl.store(out + N + i, tiles.end(i, right, seqlen_k, RIGHT))
    start, stop, full_start, full_stop = tiles.keys_of(first, last, left, right, seqlen_k, LEFT, RIGHT)
    tl.store(out + 2 * N, start)
    tl.store(out + 2 * N + 1, stop)
    tl.store(out + 2 * N + 2, full_start)
    tl.store(out + 2 * N + 3, full_stop)
    start, stop, full_start, full_stop = tiles.queries_of(first, last, left, right, seqlen_q, LEFT, RIGHT)
    tl.store(out + 2 * N + 4, start)
    tl.store(out + 2 * N + 5, stop)
    tl.store(out + 2 * N + 6, full_start)
    tl.store(out + 2 * N + 7, full_stop)
    kept = tiles.keep(i[:, None], i[None, :], left, right, LEFT, RIGHT)
    tl.store(out + 2 * N + 8 + i[:, None] * N + i[None, :], kept.to(tl.int32))


def problem_of(visible: Visible) -> AttentionProblem:
    lengths = visible.seqlen_q, visible.seqlen_k
    return AttentionProblem("bfloat16", "cuda", (9, 0), 132, 1, *lengths, 1, 1, 64, 64, visible.mask, 0.1)


def some_masks(count: int) -> list[Visible]:
    choose = random.Random(0)
    bounds = (None, 0, 1, 2, 7, 30, 63, 10**12)
    lengths = (1, 2, 5, 31, 50)
    return [
        Mask(choose.choice(bounds), choose.choice(bounds)).of(choose.choice(lengths), choose.choice(lengths))
        for _ in range(count)
    ]


@pytest.mark.parametrize("visible", some_masks(60), ids=lambda v: f"{v.mask} {v.seqlen_q}x{v.seqlen_k}")
def test_masks_are_those_of_mask_py(visible, device):
    left, right = diagonals(problem_of(visible))
    queries, keys = range(visible.seqlen_q), range(visible.seqlen_k)
    seen = {(i, j) for i in queries for j in keys if visible.keep(i, j)}
    choose = random.Random(1)
    for _ in range(2):
        first = choose.choice(range(min(visible.seqlen_q, visible.seqlen_k)))
        last = choose.choice(range(first, min(visible.seqlen_q, visible.seqlen_k)))
        out = torch.zeros(2 * LENGTH + 8 + LENGTH**2, dtype=torch.int32, device=device)
        triton.jit(probe)[(1,)](
            out, first, last, left, right, visible.seqlen_q, visible.seqlen_k, visible.bounded_left,
            visible.bounded_right, LENGTH,
        )  # fmt: skip
        begin, end, ranges, kept = out.tolist()[:LENGTH], out.tolist()[LENGTH:], out.tolist()[2 * LENGTH :], out
        assert begin[: visible.seqlen_q] == [visible.begin(i) for i in queries]
        assert end[: visible.seqlen_q] == [visible.end(i) for i in queries]
        kept = kept[2 * LENGTH + 8 :].view(LENGTH, LENGTH)[: visible.seqlen_q, : visible.seqlen_k].nonzero()
        assert set(map(tuple, kept.tolist())) == seen

        tile = range(first, last + 1)
        for (start, stop, full_start, full_stop), columns, is_seen in (
            (ranges[:4], keys, lambda i, j: (i, j) in seen),
            (ranges[4:8], queries, lambda j, i: (i, j) in seen),
        ):
            for column in columns:
                by_some = any(is_seen(row, column) for row in tile)
                by_all = all(is_seen(row, column) for row in tile)
                assert start <= column < stop or not by_some
                assert (full_start <= column < full_stop) == by_all or not start <= column < stop
        assert ranges[:2] == [visible.begin(first), visible.end(last)]
