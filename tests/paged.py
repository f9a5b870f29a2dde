"""The named cases of paged keys: those of packed ones, whose keys and values are dealt out to shuffled pages.

Rows of pages that no sequence has are NaN, and so are pages that no table names. Tables go on past the ends of their
sequences, with numbers that are no pages.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from flashcore.problem import AttentionProblem
from flashcore.score import bind
from flashcore.sequences import Paged
from tests.packed import EDGES, PackedCase

NO_PAGES = (-1, 2**31 - 1, -(2**31), 10**6)
SPARE = 3  # pages of nobody


class Inputs(NamedTuple):
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    places: dict[str, Any]  # queries and keys
    k: torch.Tensor  # the same keys and values, packed
    v: torch.Tensor


@dataclass(frozen=True)
class PagedCase:
    name: str
    packed: PackedCase
    page_size: int = 16
    layout: str = "nhd"  # of LAYOUTS
    prefix: int = 0  # pages of the first sequence with which the others begin, too, as far as they fill them

    def inputs(self, device: str | torch.device = "cpu") -> Inputs:
        """Of a call. The pages are those of one table after the other, shuffled."""
        case, size = self.packed, self.page_size
        q, k, v = case.inputs(device)
        places = case.places(case.keys)
        counts = [-(-n // size) for n in case.keys]
        shuffle = random.Random(0)
        unused = shuffle.sample(range(sum(counts) + SPARE), sum(counts))
        caches = LAYOUTS[self.layout](sum(counts) + SPARE, size, k, v)
        width = max(counts, default=0) + 1
        whole = torch.tensor(shuffle.choices(NO_PAGES, k=len(counts) * (width + 5)), dtype=torch.int32, device=device)
        table = whole.view(len(counts), width + 5)[:, 2 : 2 + width]
        for b, (rows, n, count) in enumerate(zip(places, case.keys, counts, strict=True)):
            shared = min(self.prefix, n // size) if b else 0
            pages = [*table[0, :shared].tolist(), *(unused.pop() for _ in range(count - shared))]
            table[b, :count] = torch.tensor(pages, dtype=torch.int32)
            for cache, tensor in zip(caches, (k, v), strict=True):
                first = places[0].start
                tensor[rows][: shared * size] = tensor[first : first + shared * size]
                for page, part in zip(pages, tensor[rows].split(size), strict=False):
                    cache[page, : len(part)] = part
        lengths = torch.tensor(case.keys, dtype=torch.int32, device=device)
        keys = Paged(table, lengths, max(case.keys, default=0) + case.more)
        return Inputs(q, *caches, {"queries": case.packed(device)["queries"], "keys": keys}, k, v)

    def problem(self, device: str | torch.device = "cpu") -> AttentionProblem:
        options = self.packed.options(device)
        spec, extras = bind(options.pop("score"), options.pop("sink"))
        q, k_cache, v_cache, places, *_ = self.inputs(device)
        return AttentionProblem.from_tensors(q, k_cache, v_cache, **options, **places, score=spec, extras=extras)

    def __str__(self) -> str:
        return self.name


def _nan(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=like.dtype, device=like.device)


def _nhd(pages: int, size: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [_nan(t, pages, size, *t.shape[1:]) for t in tensors]


def _hnd(pages: int, size: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [_nan(t, pages, t.shape[1], size, t.shape[2]).transpose(1, 2) for t in tensors]


def _one_kind_each(pages: int, size: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return *_nhd(pages, size, k), *_hnd(pages, size, v)


def _kv(pages: int, size: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A page has its keys, and then its values."""
    return _nan(k, pages, 2, size, *k.shape[1:]).unbind(1)


def _rows(pages: int, size: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A row of a head has its key, and then its value."""
    heads, head_dim, head_dim_v = *k.shape[1:], v.shape[2]
    return _nan(k, pages, size, heads, head_dim + head_dim_v).split((head_dim, head_dim_v), dim=-1)


def _strided(pages: int, size: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """No dimension is contiguous, and no row aligned."""
    return [_nan(t, 2 * pages, size + 1, t.shape[1], 2 * t.shape[2] + 1)[::2, 1:, :, 1::2] for t in tensors]


LAYOUTS: dict[str, Callable] = {
    "nhd": _nhd, "hnd": _hnd, "one_kind_each": _one_kind_each, "kv": _kv, "rows": _rows, "strided": _strided,
}  # fmt: skip

PAGE_EDGES = (16, 0, 1, 15, 17, 31, 32, 33, 130)
MIXED = PackedCase("mixed", (1, 1, 70, 33, 0, 5, 16), (130, 1, 70, 90, 7, 5, 0), heads_q=8, causal=True, after=3)


def _sizes() -> tuple[PagedCase, ...]:
    return tuple(PagedCase(f"mixed_pages_of_{size}", MIXED, size) for size in (1, 16, 48, 64, 256))


def _layouts() -> tuple[PagedCase, ...]:
    packed = PackedCase("", (33, 1, 20), (65, 70, 20), causal=True)
    return tuple(PagedCase(f"layout_{name}", packed, layout=name) for name in LAYOUTS)


PAGED_CASES: tuple[PagedCase, ...] = (
    *_sizes(),
    *_layouts(),
    PagedCase("page_edges", PackedCase("", (3,) * 9, PAGE_EDGES)),
    PagedCase("page_edges_causal", PackedCase("", PAGE_EDGES, PAGE_EDGES, causal=True, before=5, after=9)),
    PagedCase("one_query_each", PackedCase("", (1, 1, 1, 0, 1), (333, 1, 0, 64, 65), heads_q=8, causal=True), 64),
    PagedCase("edges", PackedCase("", EDGES, EDGES[::-1], causal=True), 64),
    PagedCase("longer_bound", PackedCase("", (70, 2), (90, 40), causal=True, more=300)),
    PagedCase("unused_queries", PackedCase("", (65, 0, 33), (128, 5, 0), unused=(3, 64, 17), causal=True)),
    PagedCase("prefix", PackedCase("", (1, 40, 3, 5), (100, 90, 20, 64), causal=True), prefix=4),
    PagedCase("window", PackedCase("", (100, 1, 30), (259, 300, 64), window=(40, 0), causal=True)),
    PagedCase("window_both_pages_of_1", PackedCase("", (50, 65), (80, 64), window=(30, 20)), 1),
    PagedCase("softcap_window_sink", PackedCase("", (70, 1), (150, 99), score="softcap", sink=True, window=(50, 0),
                                                causal=True)),
    PagedCase("alibi", PackedCase("", (1, 70, 0), (100, 150, 7), score="alibi", causal=True)),
    PagedCase("bias", PackedCase("", (1, 33), (100, 50), score="bias", causal=True)),
    PagedCase("places", PackedCase("", (30, 1), (64, 50), score="places", causal=True)),
    PagedCase("sink", PackedCase("", (65, 0, 1), (100, 10, 64), sink=True, causal=True, after=40)),
    PagedCase("sink_no_keys", PackedCase("", (5, 0, 7), (0, 0, 0), sink=True, causal=True, after=2)),
    PagedCase("no_keys", PackedCase("", (5, 0, 7), (0, 0, 0), after=2)),
    PagedCase("no_queries", PackedCase("", (0, 0), (5, 7))),
    PagedCase("no_sequences", PackedCase("", (), after=3)),
    *(
        PagedCase(f"d{d}_dv128", PackedCase("", (20, 1), (20, 129), head_dim=d, head_dim_v=128, causal=True),
                  layout="rows") for d in (40, 192)
    ),
    PagedCase("d256", PackedCase("", (20, 1), (20, 70), heads_q=2, heads_k=1, head_dim=256, causal=True), layout="kv"),
    PagedCase("d320", PackedCase("", (20, 1), (20, 33), head_dim=320, causal=True)),
    PagedCase("float16", PackedCase("", (20, 1), (20, 129), dtype="float16", causal=True)),
    PagedCase("float32", PackedCase("", (20, 1), (20, 70), dtype="float32", causal=True)),
    PagedCase("float64", PackedCase("", (20, 1), (20, 70), dtype="float64", causal=True, sink=True)),
    PagedCase("scale_negative", PackedCase("", (20, 1), (20, 70), scale=-0.25, causal=True)),
    PagedCase("q_packed", PackedCase("", (20, 1), (20, 70), layout="packed", causal=True)),
    PagedCase("q_negated", PackedCase("", (20, 1), (20, 70), layout="negated", causal=True)),
)  # fmt: skip

BY_NAME: dict[str, PagedCase] = {case.name: case for case in PAGED_CASES}
