"""Is an answer right? Every implementation is held against float64 before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

import flashcore
from flashcore.bench.cases import Case, GemmCase, PackedCase

FACTOR = 2.0  # FlashAttention's rule: at most twice the error that PyTorch makes in the same dtype
FLOPS = 5e11  # what the float64 reference may cost; beyond it, blocks of rows stand for all of them
BLOCKS = 16
SCORES = 2**27  # float64 scores alive at once: 1 GiB


def slopes(case: Case, device: str | torch.device) -> torch.Tensor:
    """ALiBi's, float32 (heads,): 2 ** (-8 h / heads) for h from 1 on."""
    return torch.tensor([2 ** (-8 * (head + 1) / case.heads) for head in range(case.heads)], device=device)


def sinks(case: Case, device: str | torch.device, seed: int = 0) -> torch.Tensor:
    """N(0, 1) in the case's dtype, (heads,)."""
    generator = torch.Generator(device).manual_seed(seed + 2)
    return torch.randn(case.heads, generator=generator, device=device).to(getattr(torch, case.dtype))


def make_inputs(case: Case, device: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random q, k, v of the case, contiguous (batch, seqlen, heads, head_dim), packed ones (total, heads, head_dim)."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(rows: tuple[int, ...], heads: int, factor: float = 1, channel: float | None = None) -> torch.Tensor:
        shape = (*rows, heads, case.head_dim)
        x = factor * torch.randn(shape, generator=generator, device=device)
        if channel is not None:
            x[..., 0] = channel
        if case.inputs == "outliers":
            x = torch.where(torch.rand(shape, generator=generator, device=device) < 1e-3, 100 * x, x)
        return x.to(getattr(torch, case.dtype))

    away = 64 if case.inputs == "negative" else None
    of_queries, of_keys = case.rows
    q = draw(of_queries, case.heads, 64 if case.inputs == "large" else 1, away)
    k = draw(of_keys, case.kv_heads, channel=None if away is None else -away)
    return q, k, draw(of_keys, case.kv_heads)


def parts(case: Case, q, k, v, *of_queries: torch.Tensor) -> Iterator[tuple[Case, list[torch.Tensor]]]:
    """The dense cases that a case is made of, each with its q, k, v and what else there is a row of for each query."""
    tensors = case.split(q), case.split(k, True), case.split(v, True), *map(case.split, of_queries)
    for one, *own in zip(case.parts, *tensors, strict=True):
        yield one, own


def joined(case: Case, own: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor again of what each part has."""
    return torch.cat([rows[0] for rows in own]) if isinstance(case, PackedCase) else own[0]


@dataclass(frozen=True)
class Errors:
    rel_err: float  # ||out - truth|| / ||truth||, Frobenius
    max_abs_err: float

    def columns(self) -> dict[str, float]:
        """Of a recorded row."""
        return asdict(self)


def distance(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Errors:
    """How far results lie from their float64 answers, all pairs (result, answer) together."""
    error2 = norm2 = worst = 0.0
    for result, answer in pairs:
        error = result.double() - answer
        error2 += error.square().sum().item()
        norm2 += answer.square().sum().item()
        worst = max(worst, error.abs().max().item())
    return Errors((error2 / norm2) ** 0.5 if norm2 else error2**0.5, worst)


class Truth:
    """The float64 answer for all query rows, or for evenly spread blocks of them where all would take too long."""

    def __init__(self, case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, flops: float = FLOPS) -> None:
        self.case = case
        # Of each part: (first row, last row + 1, answer) of each block
        self.blocks = [list(_blocks(one, *own, flops * one.flops / case.flops)) for one, own in parts(case, q, k, v)]

    def errors(self, out: torch.Tensor) -> Errors:
        return distance(
            (own[:, start:stop], answer)
            for own, blocks in zip(self.case.split(out), self.blocks, strict=True)
            for start, stop, answer in blocks
        )


def _blocks(case: Case, q, k, v, flops: float) -> Iterator[tuple[int, int, torch.Tensor]]:
    k64, v64 = k.double(), v.double()
    step = max(1, SCORES // (case.batch * case.heads * case.seqlen_k))
    for start, stop in checked_rows(case, flops):
        for a in range(start, stop, step):
            b = min(a + step, stop)
            if case.features:
                yield a, b, written_out(case, q, k, v, a, b, torch.float64)
                continue
            # Rows a..b of a causal problem are the causal problem whose last key is the last that row b - 1 sees.
            keys = max(0, b + case.seqlen_k - case.seqlen_q) if case.causal else case.seqlen_k
            answer = flashcore.attention(
                q[:, a:b].double(), k64[:, :keys], v64[:, :keys], causal=case.causal, backend="reference"
            )
            yield a, b, answer


def checked_rows(case: Case, flops: float) -> list[tuple[int, int]]:
    """Half-open ranges of query rows: everything if that costs no more than ``flops``, else ``BLOCKS`` spread blocks,
    the first and the last rows among them."""
    pairs = case.visible.pairs() if case.window else case.seqlen_q * case.seqlen_k
    total = 4 * case.batch * case.heads * pairs * case.head_dim
    return spread_blocks(case.seqlen_q, total, flops)


def spread_blocks(rows: int, total: float, flops: float) -> list[tuple[int, int]]:
    """All rows if their cost ``total`` is no more than ``flops``, else ``BLOCKS`` ranges spread over them."""
    if total <= flops:
        return [(0, rows)]
    size = max(1, int(rows * flops / total) // BLOCKS)
    starts = [i * (rows - size) // (BLOCKS - 1) for i in range(BLOCKS)]
    return [(start, start + size) for start in starts]


def written_out(
    case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, stop: int, exact: torch.dtype
) -> torch.Tensor:
    """The answer for query rows [start, stop), step by step in the dtype ``exact`` and rounded to it.

    In float64 it is the truth; in float32, which rounds the probabilities to the case's dtype before they multiply
    values as flash kernels do, it is as near to the truth as a kernel for that dtype can be expected to be.
    """
    low = torch.float64 if exact is torch.float64 else getattr(torch, case.dtype)
    begin, end = case.visible.kv_range(start, stop)
    q = q[:, start:stop].to(exact).unflatten(2, (case.kv_heads, -1))
    k, v = k[:, begin:end].to(exact), v[:, begin:end].to(exact)
    scores = torch.einsum("bikgd,bjkd->bkgij", q, k) * case.head_dim**-0.5
    i = torch.arange(start, stop, device=q.device)[:, None]
    j = torch.arange(begin, end, device=q.device)
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    if case.alibi:
        distance = (i + case.visible.offset - j).abs()
        scores = scores - slopes(case, q.device).to(exact).view(case.kv_heads, -1, 1, 1) * distance
    scores = scores.masked_fill(~case.visible.keep(i, j), -torch.inf)
    if case.sink:
        sink = sinks(case, q.device).to(exact).view(case.kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., : end - begin]  # NaN: a row without a key
    out = torch.einsum("bkgij,bjkd->bikgd", weights.to(low).to(exact), v)
    return out.flatten(2, 3)


def in_blocks(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """All rows of :func:`written_out` in float32, rounded once to the case's dtype."""
    step = max(1, SCORES // (case.batch * case.heads * case.seqlen_k))
    starts = range(0, case.seqlen_q, step)
    parts = [written_out(case, q, k, v, a, min(a + step, case.seqlen_q), torch.float32).to(q.dtype) for a in starts]
    return torch.cat(parts, dim=1)


def judge(
    case: Case | GemmCase, truth, out: torch.Tensor, pytorch: torch.Tensor, pytorch_errors: Errors
) -> tuple[Errors | None, str | None]:
    """The errors of ``out``, and why it is no acceptable answer (None if it is one).

    ``pytorch`` is PyTorch's answer in the same dtype. Errors are None if there is nothing to compare.
    """
    apart = case.apart if case.inputs == "normal" else None  # outliers have no such common scale
    return compare(out, pytorch, truth.errors, pytorch_errors, FACTOR, apart)


def compare(
    out: torch.Tensor,
    pytorch: torch.Tensor,
    errors_of: Callable[[torch.Tensor], Errors],
    pytorch_errors: Errors,
    factor: float,
    apart: float | None,
) -> tuple[Errors | None, str | None]:
    """``factor`` times PyTorch's errors are allowed, and a distance of ``apart`` from its answer if that is given."""
    if out.shape != pytorch.shape or out.dtype != pytorch.dtype:
        given, expected = (f"{x.dtype} {tuple(x.shape)}" for x in (out, pytorch))
        return None, f"returned {given} instead of {expected}"
    if bad := int((~torch.isfinite(out)).sum()):
        return None, f"{bad} elements are NaN or Inf"
    errors = errors_of(out)
    for name in ("rel_err", "max_abs_err"):
        error, limit = getattr(errors, name), factor * getattr(pytorch_errors, name) + 1e-5
        if error > limit:
            return errors, f"{name} {error:.3g} against float64, allowed {limit:.3g} ({factor:g} x PyTorch's + 1e-5)"
    if apart is not None:  # all elements, also those that the float64 answer left out
        found = ((out - pytorch).abs() / (1 + pytorch.abs())).max().item()
        if found > apart:
            return errors, f"differs from PyTorch's answer by {found:.3g} x (1 + |value|), allowed {apart:.3g}"
    return errors, None
