"""The named cases of packed sequences, and what is right of them: a loop over the sequences in float64.

Rows that belong to no sequence are NaN, and so is what lies around the tensors.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

import flashcore
from flashcore.problem import AttentionProblem
from flashcore.score import bind
from flashcore.sequences import Packed
from tests.cases import place
from tests.tolerance import (
    BACKWARD_FACTOR,
    FORWARD_FACTOR,
    LSE_RELATIVE,
    assert_as_good_as,
    assert_same_specials,
    attention_math,
)


@dataclass(frozen=True)
class PackedCase:
    name: str
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...] | None = None  # None: as the queries'
    heads_q: int = 4
    heads_k: int = 2
    head_dim: int = 64
    head_dim_v: int | None = None
    dtype: str = "bfloat16"
    layout: str = "bshd"
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    score: str | None = None  # of SCORES
    sink: bool = False
    before: int = 0  # rows before the first sequence
    after: int = 0  # and after the last
    unused: tuple[int, ...] = ()  # rows at the end of each sequence that `used` leaves out
    more: int = 0  # `longest` beyond the longest

    @property
    def keys(self) -> tuple[int, ...]:
        return self.lengths_q if self.lengths_k is None else self.lengths_k

    def inputs(self, device: str | torch.device = "cpu", seed: int = 0) -> tuple[torch.Tensor, ...]:
        """q (total_q, Hq, D), k and v: N(0, 1) in the sequences, NaN elsewhere."""
        generator = torch.Generator().manual_seed(seed)
        shapes = {
            "q": (self.lengths_q, self.heads_q, self.head_dim),
            "k": (self.keys, self.heads_k, self.head_dim),
            "v": (self.keys, self.heads_k, self.head_dim_v or self.head_dim),
        }
        placed = []
        for name, (lengths, heads, head_dim) in shapes.items():
            places = self.places(lengths)
            whole = torch.full((self.total(lengths), heads, head_dim), torch.nan)
            for rows in places:
                whole[rows] = torch.randn(rows.stop - rows.start, heads, head_dim, generator=generator)
            whole = whole.to(getattr(torch, self.dtype))
            packed_heads = self.heads_q + 2 * self.heads_k
            placed.append(place(whole[None], self.layout, device, shared=name != "q", packed_heads=packed_heads)[0])
        return tuple(placed)

    def total(self, lengths: tuple[int, ...]) -> int:
        return self.before + sum(self.slots(lengths)) + self.after

    def slots(self, lengths: tuple[int, ...]) -> list[int]:
        """How far apart sequences begin."""
        return [n + extra for n, extra in itertools.zip_longest(lengths, self.unused, fillvalue=0)]

    def places(self, lengths: tuple[int, ...]) -> list[slice]:
        """The rows of each sequence."""
        starts = [self.before, *itertools.accumulate(self.slots(lengths), initial=self.before)][1:]
        return [slice(start, start + n) for start, n in zip(starts, lengths, strict=False)]

    def packed(self, device: str | torch.device = "cpu") -> dict[str, Packed]:
        """queries and keys."""
        return {"queries": self._packed(self.lengths_q, device), "keys": self._packed(self.keys, device)}

    def _packed(self, lengths: tuple[int, ...], device: str | torch.device) -> Packed:
        offsets = [*itertools.accumulate(self.slots(lengths), initial=self.before)]
        used = torch.tensor(lengths, dtype=torch.int32, device=device) if self.unused else None
        longest = max(lengths, default=0) + self.more
        return Packed(torch.tensor(offsets, dtype=torch.int32, device=device), longest, used)

    def options(self, device: str | torch.device = "cpu") -> dict:
        """What ``flashcore.attention`` is told besides the tensors and where they lie."""
        generator = torch.Generator().manual_seed(1)
        sink = torch.randn(self.heads_q, generator=generator).to(device) if self.sink else None
        score = None if self.score is None else SCORES[self.score](self, device)[0]
        return {"causal": self.causal, "window": self.window, "scale": self.scale, "score": score, "sink": sink}

    def problem(self, device: str | torch.device = "cpu", **flags: bool) -> AttentionProblem:
        options = self.options(device)
        spec, extras = bind(options.pop("score"), options.pop("sink"))
        return AttentionProblem.from_tensors(
            *self.inputs(device), **options, **self.packed(device), score=spec, extras=extras, **flags
        )

    def math(self, q, k, v, sink=None, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
        """out (total_q, Hq, Dv) and lse (Hq, total_q), one sequence after the other. Differentiable."""
        out = torch.zeros(*q.shape[:2], v.shape[2], dtype=dtype, device=q.device)
        lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=dtype, device=q.device)
        score = None if self.score is None else SCORES[self.score](self, q.device)[1]
        for b, (rows, rows_k) in enumerate(zip(self.places(self.lengths_q), self.places(self.keys), strict=True)):
            one = q[None, rows], k[None, rows_k], v[None, rows_k]
            lengths = one[0].shape[1], one[1].shape[1]
            changed = score and (lambda s, _, h, i, j, b=b, lengths=lengths: score(s, b, h, i, j, *lengths))
            of_one = attention_math(
                *one, causal=self.causal, window=self.window, scale=self.scale, score=changed, sink=sink, dtype=dtype
            )
            out[rows], lse[:, rows] = of_one[0][0], of_one[1][0]
        return out, lse

    def __str__(self) -> str:
        return self.name


def assert_packed_forward(case: PackedCase, out: torch.Tensor, lse: torch.Tensor | None, q, k, v) -> None:
    """Assert that `out`, and `lse` unless it is None, are attention of the case's sequences."""
    sink = case.options(q.device)["sink"]
    with torch.no_grad():
        exact, exact_lse = case.math(q, k, v, sink)
        by_torch, _ = case.math(q, k, v, sink, q.dtype)
    assert out.dtype == q.dtype
    assert out.is_contiguous()
    finite = exact_lse[exact_lse.isfinite()].abs()
    largest = max(1.0, finite.max().item()) if finite.numel() else 1.0
    assert_as_good_as(by_torch, out, exact, "out", factor=FORWARD_FACTOR, summands=4 * largest)
    if lse is not None:
        assert lse.dtype == torch.float32
        assert lse.is_contiguous()
        assert_same_specials(lse, exact_lse, "lse")
        there = exact_lse.isfinite()
        error = (lse.double() - exact_lse)[there].abs()
        assert error.numel() == 0 or error.max().item() <= LSE_RELATIVE * largest


def assert_packed_gradients(case: PackedCase, grads: tuple[torch.Tensor, ...], q, k, v, dout) -> None:
    """Assert that `grads` are those of q, k and v, and of the sinks if there are any."""
    exact, by_torch = (_gradients(case, q, k, v, dout, dtype) for dtype in (torch.float64, q.dtype))
    for name, grad, truth, theirs in zip(("dq", "dk", "dv", "dsink"), grads, exact, by_torch, strict=False):
        # Sums over all queries of the case: as many roundings of the output that they are made of.
        factor = BACKWARD_FACTOR * (10 if name == "dsink" else 1)
        assert_as_good_as(theirs, grad, truth, name, factor=factor)
    assert len(grads) == len(exact)


def _gradients(case: PackedCase, q, k, v, dout, dtype) -> tuple[torch.Tensor, ...]:
    sink = case.options(q.device)["sink"]
    tensors = (q, k, v) if sink is None else (q, k, v, sink)
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    with torch.enable_grad():
        out, _ = case.math(*leaves, dtype=dtype)
    if not out.requires_grad:  # no sequence
        return tuple(map(torch.zeros_like, leaves))
    return torch.autograd.grad(out, leaves, dout.to(dtype))


def _softcap(case: PackedCase, device):
    change = lambda score, *_: 2.0 * torch.tanh(score / 2.0)  # noqa: E731
    return change, change


def _alibi(case: PackedCase, device):
    slopes = torch.rand(len(case.lengths_q), case.heads_q, generator=torch.Generator().manual_seed(2)).to(device)

    def exact(score, b, h, i, j, length_q, length_k):
        return score - slopes[b, h].to(score.dtype) * (i + length_k - length_q - j).abs()

    return flashcore.alibi(slopes), exact


def _bias(case: PackedCase, device):
    longest = [max(lengths, default=0) + case.more for lengths in (case.lengths_q, case.keys)]
    shape = len(case.lengths_q), case.heads_q, *longest
    table = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(device, torch.bfloat16)
    return flashcore.bias(table), lambda score, b, h, i, j, *_: score + table[b, h, i, j].to(score.dtype)


def _places(case: PackedCase, device):
    """Each index, so that none can stand for another."""
    change = lambda score, b, h, i, j, *_: score + (0.1 * b - 0.2 * h + 0.01 * i - 0.003 * j)  # noqa: E731
    return change, change


# A name -> the score function, and the same of tensors and the sequence's lengths.
SCORES: dict[str, Callable] = {"softcap": _softcap, "alibi": _alibi, "bias": _bias, "places": _places}


def _random(seed: int, count: int, most: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).randint(0, most) for _ in range(count))


EDGES = (65, 0, 1, 128, 63, 64, 127, 129)

PACKED_CASES: tuple[PackedCase, ...] = (
    PackedCase("edges", EDGES),
    PackedCase("edges_causal", EDGES, causal=True),
    PackedCase("edges_other_keys", EDGES, EDGES[::-1]),
    PackedCase("edges_other_keys_causal", EDGES, EDGES[::-1], causal=True, before=5, after=70),
    *(
        PackedCase(f"random_{seed}", _random(seed, 6, 200), _random(seed + 10, 6, 300), causal=seed % 2 == 0, more=seed)
        for seed in range(4)
    ),
    PackedCase("one_sequence", (150,), causal=True),
    PackedCase("one_sequence_longer_bound", (70,), (90,), causal=True, more=300),
    PackedCase("many_short", tuple(range(20)), causal=True, heads_q=2, heads_k=1),
    PackedCase("one_query_each", (1, 1, 1, 0, 1), (333, 1, 0, 64, 65), heads_q=8, heads_k=2, causal=True),
    PackedCase("few_queries_each", (4, 2, 0, 3), (100, 1, 7, 129), heads_q=8, heads_k=1, causal=True, head_dim=128),
    PackedCase("rows_around", (30, 40), before=17, after=33, causal=True),
    PackedCase("unused_rows", (65, 0, 33), (128, 5, 0), unused=(3, 64, 17), causal=True, before=1, after=2),
    PackedCase("unused_rows_full", (64, 1, 70), unused=(64, 1, 0), more=100),
    PackedCase("window", (259, 3, 100), window=(40, 0), causal=True),
    PackedCase("window_both", (100, 130), (259, 64), window=(30, 20)),
    PackedCase("window_right", (130, 70), (64, 200), window=(None, 5)),
    PackedCase("window_longer_than_keys", (30, 200), window=(250, 0), causal=True, more=100),
    *(PackedCase(f"{score}", (70, 0, 129), (150, 40, 64), score=score, causal=True) for score in SCORES),
    PackedCase("alibi_one_query_each", (1, 1), (100, 333), score="alibi", heads_q=8, causal=True),
    PackedCase("softcap_window_sink", (100, 160), score="softcap", sink=True, window=(70, 0), causal=True),
    PackedCase("sink", (65, 0, 129), (200, 10, 64), sink=True, causal=True, after=40),
    PackedCase("sink_one_query_each", (1, 1, 0, 1), (100, 333, 7, 0), sink=True, heads_q=8, causal=True, after=1),
    PackedCase("sink_no_keys", (5, 0, 7), (0, 0, 0), sink=True, after=2),
    PackedCase("no_keys", (5, 0, 7), (0, 0, 0), after=2),
    PackedCase("no_queries", (0, 0), (5, 7)),
    PackedCase("no_sequences", (), after=3),
    PackedCase("nothing", ()),
    PackedCase("nothing_sink", (), sink=True),
    PackedCase("wide_values", (70, 64), head_dim_v=128, causal=True),
    PackedCase("d192_dv128", (70, 129), head_dim=192, head_dim_v=128, causal=True),
    *(PackedCase(f"d{d}", (70, 129), heads_q=2, heads_k=1, head_dim=d, causal=True) for d in (8, 40, 128, 256)),
    PackedCase("d320", (20, 30), head_dim=320, causal=True),
    PackedCase("float16", EDGES, dtype="float16", causal=True),
    PackedCase("float32", (65, 0, 33), (70, 5, 33), dtype="float32", causal=True),
    PackedCase("float64", (65, 0, 33), (70, 5, 33), dtype="float64", causal=True, sink=True, after=1),
    PackedCase("scale_zero", (65, 3), scale=0.0, causal=True),
    PackedCase("scale_negative", (65, 3), scale=-0.25, causal=True),
    *(
        PackedCase(f"layout_{layout}", (65, 0, 70), layout=layout, causal=True, after=3)
        for layout in ("packed", "bhsd", "misaligned", "odd_row", "last_strided", "negated")
    ),
)  # fmt: skip

BY_NAME: dict[str, PackedCase] = {case.name: case for case in PACKED_CASES}
