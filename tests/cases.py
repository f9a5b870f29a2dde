"""The one list of named cases. Every backend runs each case that it does not reject, on every device it has.

A case says what is special about it in its name. Its tensors are views into storage that is NaN everywhere else, so a
kernel that reads a neighbour's element, a gap between rows or a row past the end shows it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import pytest
import torch

from flashcore import backends
from flashcore.problem import AttentionProblem
from flashcore.score import bind

GUARD = 512  # elements of NaN before and after each tensor; keeps its base aligned to 1 KiB in half precision


@dataclass(frozen=True)
class Case:
    """One attention problem and how its tensors lie in memory."""

    name: str
    batch: int = 2
    seqlen_q: int = 128
    seqlen_k: int = 128
    heads_q: int = 4
    heads_k: int = 4
    head_dim: int = 64
    dtype: str = "bfloat16"
    causal: bool = False
    layout: str = "bshd"
    scale: float | None = None
    head_dim_v: int | None = None  # None: as head_dim
    values: str = "normal"
    window: tuple[int | None, int | None] | None = None
    score: str | None = None  # of SCORES
    sink: bool = False

    def options(self, device: str | torch.device = "cpu") -> dict:
        """What ``flashcore.attention`` is told besides q, k and v, and ``attention_math`` as well."""
        generator = torch.Generator().manual_seed(1)
        sink = torch.randn(self.heads_q, generator=generator) if self.sink else None
        return {
            "causal": self.causal,
            "window": self.window,
            "scale": self.scale,
            "score": None if self.score is None else SCORES[self.score](self, device),
            "sink": None if sink is None else sink.to(device, getattr(torch, self.dtype)),
        }

    def inputs(
        self, device: str | torch.device = "cpu", seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v: the same numbers on every device, N(0, 1) unless `values` says otherwise."""
        generator = torch.Generator().manual_seed(seed)
        head_dim_v = self.head_dim_v or self.head_dim
        shapes = {
            "q": (self.batch, self.seqlen_q, self.heads_q, self.head_dim),
            "k": (self.batch, self.seqlen_k, self.heads_k, self.head_dim),
            "v": (self.batch, self.seqlen_k, self.heads_k, head_dim_v),
        }
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        VALUES[self.values](tensors)
        packed_heads = self.heads_q + 2 * self.heads_k
        return tuple(
            place(
                tensor.to(getattr(torch, self.dtype)),
                self.layout,
                device,
                shared=name != "q",
                packed_heads=packed_heads,
            )
            for name, tensor in tensors.items()
        )

    def problem(
        self, device: str | torch.device = "cpu", *, needs_grad: bool = False, return_lse: bool = False
    ) -> AttentionProblem:
        """What ``AttentionProblem.from_tensors`` makes of the inputs."""
        one = replace(self, batch=1, seqlen_q=1, seqlen_k=1).inputs(device)  # for the device's properties
        options = self.options(device)
        spec, _ = bind(options.pop("score"), options.pop("sink"))
        problem = AttentionProblem.from_tensors(*one, **options, return_lse=return_lse)
        problem = replace(problem, score=spec)
        lengths = {"batch": self.batch, "seqlen_q": self.seqlen_q, "seqlen_k": self.seqlen_k}
        return replace(problem, needs_grad=needs_grad, **lengths)

    def __str__(self) -> str:
        return self.name


def place(
    tensor: torch.Tensor,
    layout: str,
    device: str | torch.device,
    *,
    shared: bool = False,
    packed_heads: int = 0,
) -> torch.Tensor:
    """Copy a (B, S, H, D) tensor to `device` so that it lies there as `layout` says, with NaN all around it.

    :param shared: the tensor is one that layout "expanded" expands: its batches and heads all show the first one.
    :param packed_heads: heads in one row of the packed tensor that layout "packed" is a view into.
    """
    _, seqlen, heads, head_dim = tensor.shape
    if layout == "negated":  # as ``z.conj().imag`` is: whoever reads it changes the signs
        return torch._neg_view(place(-tensor, "last_strided", device))
    if layout == "expanded" and shared:
        return place(tensor[:1, :, :1], "bshd", device).expand(tensor.shape)
    row = heads * head_dim
    strides, shift = {
        "bshd": ((seqlen * row, row, head_dim, 1), 0),
        "expanded": ((seqlen * row, row, head_dim, 1), 0),
        "bhsd": ((heads * seqlen * head_dim, head_dim, seqlen * head_dim, 1), 0),
        "packed": ((seqlen * packed_heads * head_dim, packed_heads * head_dim, head_dim, 1), head_dim),
        "offset": ((seqlen * row, row, head_dim, 1), 8),
        "misaligned": ((seqlen * row, row, head_dim, 1), 1),
        "odd_row": ((seqlen * (row + 1), row + 1, head_dim, 1), 0),
        "last_strided": ((seqlen * row * 2, row * 2, head_dim * 2, 2), 0),
    }[layout]
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    storage = torch.full((max(span, 0) + shift + 2 * GUARD,), torch.nan, dtype=tensor.dtype, device=device)
    return storage.as_strided(tensor.shape, strides, GUARD + shift).copy_(tensor)


def _large(tensors: dict[str, torch.Tensor]) -> None:
    """Scores of hundreds: exp overflows unless the row maximum is subtracted first."""
    tensors["q"] *= 16
    tensors["k"] *= 16


def _outliers(tensors: dict[str, torch.Tensor]) -> None:
    """A few channels fifty times larger than the rest, as in real models, and a few such values."""
    tensors["q"][..., ::29] *= 50
    tensors["k"][..., ::29] *= 50
    tensors["v"][:, ::17] *= 50


def _huge(tensors: dict[str, torch.Tensor]) -> None:
    """Scores of 10^10: their last bit is worth thousands, and one key has all the weight."""
    tensors["q"] *= 3e4
    tensors["k"] *= 3e4


def _rising(tensors: dict[str, torch.Tensor]) -> None:
    """Later keys score higher, so that the running row maximum changes in every block."""
    seqlen = tensors["k"].shape[1]
    tensors["q"].abs_()
    tensors["k"].abs_().mul_(torch.linspace(0.1, 4, seqlen)[:, None, None])


VALUES = {"normal": lambda tensors: None, "large": _large, "outliers": _outliers, "huge": _huge, "rising": _rising}

def _slopes(case: Case, device: str | torch.device) -> torch.Tensor:
    return torch.linspace(0.05, 0.5, case.heads_q, device=device)


def _alibi(case: Case, device: str | torch.device):
    slopes, offset = _slopes(case, device), case.seqlen_k - case.seqlen_q
    return lambda score, batch, head, query, key: score - slopes[head] * abs(query + offset - key)


def _bias(case: Case, device: str | torch.device):
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(1, case.heads_q, case.seqlen_q, case.seqlen_k, generator=generator).to(device, torch.bfloat16)
    return lambda score, batch, head, query, key: score + table[batch * 0, head, query, key]


def _prefix(case: Case, device: str | torch.device):
    """What is hidden by a score: the keys beyond the query, but for the first 20."""
    return lambda score, batch, head, query, key: torch.where((key <= query) | (key < 20), score, -math.inf)


# Written for symbols and for tensors alike.
SCORES = {
    "softcap": lambda case, device: lambda score, *_: 2.0 * torch.tanh(score / 2.0),
    "alibi": _alibi,
    "bias": _bias,
    "prefix": _prefix,
}

# Lengths beside the tile sizes 64, 80, 96, 128, 176, 192 and 256, and far from all.
ODD_LENGTHS = (1, 63, 64, 65, 127, 128, 129, 191, 193, 257, 511, 513)
HEAD_DIMS = (8, 40, 64, 72, 80, 96, 128, 192, 256)

CASES: tuple[Case, ...] = (
    # Lengths. Queries and keys get different ones, each of the list once on either side.
    *(Case(f"full_{q}x{k}", seqlen_q=q, seqlen_k=k) for q, k in zip(ODD_LENGTHS, ODD_LENGTHS[::-1], strict=True)),
    *(Case(f"causal_{s}", seqlen_q=s, seqlen_k=s, causal=True) for s in ODD_LENGTHS),
    Case("full_one_query_one_key", seqlen_q=1, seqlen_k=1),
    Case("causal_one_query", seqlen_q=1, seqlen_k=257, causal=True),
    Case("causal_more_keys", seqlen_q=65, seqlen_k=257, causal=True),
    Case("causal_many_more_keys", seqlen_q=129, seqlen_k=1031, causal=True),
    Case("causal_one_more_key", seqlen_q=128, seqlen_k=129, causal=True),
    Case("causal_one_empty_row", seqlen_q=129, seqlen_k=128, causal=True),
    Case("causal_empty_rows", seqlen_q=193, seqlen_k=65, causal=True),
    Case("causal_empty_tiles", seqlen_q=513, seqlen_k=63, causal=True),
    Case("causal_all_but_one_row_empty", seqlen_q=257, seqlen_k=1, causal=True),
    Case("full_long", batch=1, seqlen_q=1031, seqlen_k=2053, heads_q=2, heads_k=2),
    Case("causal_long", batch=1, seqlen_q=2053, seqlen_k=2053, heads_q=2, heads_k=2, causal=True),
    Case("many_small_tiles", batch=16, seqlen_q=65, seqlen_k=65, heads_q=12, heads_k=12, causal=True),
    # Nothing to multiply.
    Case("no_keys", seqlen_k=0),
    Case("no_keys_causal", seqlen_k=0, causal=True),
    Case("no_queries", seqlen_q=0),
    Case("no_batch", batch=0),
    # Grouped heads.
    Case("gqa_4_to_1", heads_q=8, heads_k=2, seqlen_q=129, seqlen_k=193),
    Case("gqa_4_to_1_causal", heads_q=8, heads_k=2, seqlen_q=193, seqlen_k=193, causal=True),
    Case("gqa_3_to_1_more_keys", heads_q=6, heads_k=2, seqlen_q=65, seqlen_k=193, causal=True),
    Case("mqa", heads_q=8, heads_k=1, seqlen_q=65, seqlen_k=129, head_dim=128),
    Case("mqa_7_causal_empty_rows", heads_q=7, heads_k=1, seqlen_q=129, seqlen_k=65, causal=True),
    # Few queries on many keys.
    *(
        Case(f"{layout}_one_query", layout=layout, seqlen_q=1, seqlen_k=333, heads_q=8, heads_k=2)
        for layout in ("packed", "bhsd", "offset", "misaligned", "odd_row", "last_strided", "negated", "expanded")
    ),
    Case("two_queries_causal", seqlen_q=2, seqlen_k=777, heads_q=8, heads_k=2, head_dim=128, causal=True),
    Case("seven_queries_empty_rows", seqlen_q=7, seqlen_k=5, heads_q=3, heads_k=3, head_dim=40, causal=True),
    Case("one_query_rising_scores", values="rising", seqlen_q=1, seqlen_k=1031, heads_q=7, heads_k=1),
    # Head dimensions, in both half types.
    *(Case(f"full_d{d}", seqlen_q=129, seqlen_k=193, heads_q=2, heads_k=2, head_dim=d) for d in HEAD_DIMS),
    *(
        Case(f"causal_d{d}", seqlen_q=257, seqlen_k=257, heads_q=2, heads_k=1, head_dim=d, causal=True, dtype="float16")
        for d in HEAD_DIMS
    ),
    Case("d1", head_dim=1, seqlen_q=33, seqlen_k=65),
    Case("d20_not_a_multiple_of_8", head_dim=20, seqlen_q=65, seqlen_k=33, causal=True),
    Case("d320", head_dim=320, seqlen_q=65, seqlen_k=65, causal=True),
    Case("narrow_values", head_dim=128, head_dim_v=64, causal=True),
    Case("wide_values", head_dim=64, head_dim_v=128, seqlen_q=65, seqlen_k=129, heads_k=2),
    # Types.
    Case("float16", dtype="float16", seqlen_q=129, seqlen_k=191),
    Case("float32", dtype="float32", seqlen_q=65, seqlen_k=129, heads_k=2),
    Case("float32_causal", dtype="float32", seqlen_q=65, seqlen_k=129, causal=True),
    Case("float64_causal_empty_rows", dtype="float64", seqlen_q=65, seqlen_k=33, heads_k=1, causal=True),
    # Memory layouts.
    *(
        Case(f"{layout}_causal", layout=layout, seqlen_q=193, seqlen_k=193, heads_k=2, causal=True)
        for layout in ("packed", "bhsd", "offset", "misaligned", "odd_row", "last_strided", "negated", "expanded")
    ),
    Case("packed_d128", layout="packed", head_dim=128, seqlen_q=129, seqlen_k=129),
    Case("bhsd_d80_more_keys", layout="bhsd", head_dim=80, seqlen_q=65, seqlen_k=129, causal=True),
    # Scales and values.
    Case("scale_small", scale=0.01, seqlen_q=65, seqlen_k=193, causal=True),
    Case("scale_one", scale=1.0, seqlen_q=65, seqlen_k=193),
    Case("scale_zero", scale=0.0, seqlen_q=129, seqlen_k=129, causal=True),
    Case("scale_negative", scale=-0.25, seqlen_q=129, seqlen_k=129, causal=True),
    Case("large_scores", values="large", seqlen_q=129, seqlen_k=257),
    Case("large_scores_causal", values="large", seqlen_q=257, seqlen_k=257, causal=True, dtype="float16"),
    Case("outliers", values="outliers", seqlen_q=129, seqlen_k=257, head_dim=128),
    Case("rising_scores", values="rising", seqlen_q=129, seqlen_k=513),
    Case("huge_scores", values="huge", seqlen_q=256, seqlen_k=256),
    Case("huge_scores_causal", values="huge", seqlen_q=513, seqlen_k=513, causal=True, head_dim=128),
    Case("huge_scores_one_query", values="huge", seqlen_q=1, seqlen_k=777, heads_k=1),
    # Windows: their edges beside tiles, without a mask and under the causal one.
    *(
        Case(f"window_{left}_{right}", seqlen_q=259, seqlen_k=259, heads_k=2, window=(left, right), head_dim=64)
        for left, right in ((0, 0), (0, None), (None, 5), (63, 64), (64, 1), (65, 127), (300, 0), (128, 300))
    ),
    *(
        Case(f"window_{n}_causal_d{d}", seqlen_q=513, seqlen_k=513, heads_k=1, window=(n, 0), causal=True, head_dim=d)
        for n, d in ((0, 64), (1, 128), (79, 128), (80, 128), (127, 64), (128, 64), (129, 128), (63, 256), (64, 256),
                     (95, 192), (1000, 128), (200, 256))
    ),
    Case("window_more_keys", seqlen_q=129, seqlen_k=1031, window=(100, 0), causal=True),
    Case("window_more_queries", seqlen_q=513, seqlen_k=200, window=(64, 10)),
    Case("window_one_query", seqlen_q=1, seqlen_k=1031, heads_q=8, heads_k=2, window=(100, 0), causal=True),
    Case("window_few_queries", seqlen_q=4, seqlen_k=333, heads_q=2, heads_k=1, head_dim=128, window=(37, 0)),
    Case("window_long", batch=1, seqlen_q=2053, seqlen_k=2053, heads_q=2, heads_k=2, window=(300, 0), causal=True,
         head_dim=128),
    Case("window_many_small_tiles", batch=16, seqlen_q=257, seqlen_k=257, heads_q=12, heads_k=12, window=(40, 0)),
    # Scores and sinks.
    *(
        Case(f"{score}_d{d}", score=score, seqlen_q=200, seqlen_k=333, heads_k=2, causal=True, head_dim=d, batch=1)
        for score in SCORES for d in (64, 128, 256)
    ),
    *(Case(f"{score}_one_query", score=score, seqlen_q=1, seqlen_k=333, heads_k=1) for score in SCORES),
    Case("softcap_window_sink", score="softcap", sink=True, window=(70, 0), causal=True, seqlen_q=300, seqlen_k=300),
    Case("alibi_full_float16", score="alibi", dtype="float16", seqlen_q=129, seqlen_k=129),
    Case("sink", sink=True, seqlen_q=129, seqlen_k=257),
    Case("sink_causal_d128", sink=True, causal=True, seqlen_q=257, seqlen_k=257, heads_k=1, head_dim=128),
    Case("sink_empty_rows", sink=True, causal=True, seqlen_q=193, seqlen_k=65),
    Case("sink_one_query", sink=True, seqlen_q=1, seqlen_k=333, heads_q=8, heads_k=2),
    Case("sink_few_tiles", sink=True, batch=1, heads_q=2, heads_k=2, seqlen_q=64, seqlen_k=2000),
    # Values of another head_dim.
    *(
        Case(f"d{d}_dv{dv}", head_dim=d, head_dim_v=dv, seqlen_q=257, seqlen_k=257, heads_k=2, causal=True)
        for d, dv in ((192, 128), (64, 128), (64, 256), (128, 64), (256, 64), (80, 96), (72, 8), (96, 96))
    ),
    Case("d192_dv128_window", head_dim=192, head_dim_v=128, seqlen_q=257, seqlen_k=257, window=(100, 0), causal=True),
    Case("d64_dv128_one_query", head_dim=64, head_dim_v=128, seqlen_q=1, seqlen_k=333, heads_k=1),
    Case("rising_scores_causal", values="rising", seqlen_q=513, seqlen_k=513, head_dim=128, causal=True),
)  # fmt: skip

BY_NAME: dict[str, Case] = {case.name: case for case in CASES}


def accepted(cases: Iterable, device: str) -> list:
    """The (backend, case) pairs to run on `device`; empty cases go to no backend and are run once, as "auto"."""
    pairs = []
    for case in cases:
        problem = case.problem(device)
        names = [name for name in backends.ATTENTION.providers if backends.ATTENTION.refusal(name, problem) is None]
        names = [name for name in names if backends.ATTENTION.load(name).unavailable() is None]
        pairs += [pytest.param(name, case, id=f"{name}-{case}") for name in (["auto"] if problem.is_empty else names)]
    return pairs
