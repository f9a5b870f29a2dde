"""The backward pass as the harness sees it: inputs, the float64 gradients, and how a forward is differentiated.

The forward runs once, before the clock does; a call is the backward pass alone, through autograd as a training step
runs it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch

from flashcore.bench import check
from flashcore.bench.cases import Case
from flashcore.bench.check import Errors
from flashcore.bench.peers import PEERS, Peer, options

NAMES = ("dq", "dk", "dv")
FACTOR = 3.0  # FlashAttention's rule for gradients: at most three times the error that PyTorch makes in the same dtype
SLICES = 16  # heads that are held against float64, at most; all are held against PyTorch's

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_inputs(case: Case, device: str, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Random q, k, v of the case, and the output's gradient: N(0, 1), contiguous (batch, seqlen, heads, head_dim)."""
    generator = torch.Generator(device).manual_seed(seed + 1)
    dout = torch.randn(case.out_shape, generator=generator, device=device)
    return *check.make_inputs(case, device, seed), dout.to(getattr(torch, case.dtype))


def prepare(peer: Peer, case: Case, q, k, v, dout) -> Callable[[], Gradients]:
    """Run the peer's forward and return its backward, which may be called again and again."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad(), peer.context():
        returned = peer.prepare(case, *inputs)()
    out = returned[0] if isinstance(returned, tuple | list) else returned
    dout = dout.transpose(1, 2) if peer.transposed else dout.view(out.shape)
    return partial(torch.autograd.grad, out, inputs, dout, retain_graph=True)


def pytorch_answer(case: Case, device: str, *tensors: torch.Tensor) -> Gradients:
    """PyTorch's gradients in the same dtype: FlashAttention-2's where it runs, else of what SDPA dispatches to."""
    found = [_of_part(one, device, *own) for one, own in check.parts(case, *tensors)]
    return tuple(check.joined(case, own) for own in zip(*found, strict=True))


def _of_part(case: Case, device: str, *tensors: torch.Tensor) -> Gradients:
    if case.features or PEERS["sdpa"].rejects(case):
        return written_out(case, *tensors)
    if device == "cuda" and PEERS["fa2"].rejects(case) is None:
        with contextlib.suppress(RuntimeError):  # no such kernel for this case, or none on this GPU
            return prepare(PEERS["fa2"], case, *tensors)()
    return prepare(PEERS["sdpa"], case, *tensors)()


def plan(case: Case, q, k, v, dout) -> dict:
    """What FlashCore's plan chose for both passes: the backward need not be one of FlashCore's own."""
    import flashcore

    with torch.enable_grad():
        inputs = (x.detach().requires_grad_() for x in (q, k, v))
        chosen = flashcore.explain(*inputs, causal=case.causal, **options(case, q.device))
    found = {"backend": chosen.backend, "backward": chosen.backward.backend}
    return found | ({"config": str(chosen.config)} if chosen.config is not None else {})


@dataclass(frozen=True)
class GradientErrors:
    dq: Errors
    dk: Errors
    dv: Errors

    def columns(self) -> dict[str, float]:
        """Of a recorded row: the largest errors of the three, and each one's relative error."""
        each = asdict(self)
        worst = {name: max(errors[name] for errors in each.values()) for name in ("rel_err", "max_abs_err")}
        return worst | {f"rel_err_{name}": errors["rel_err"] for name, errors in each.items()}


class Truth:
    """The float64 gradients of a few heads: of evenly spread pairs of a batch entry and a key head.

    Of packed sequences, the same of each.
    """

    def __init__(self, case: Case, q, k, v, dout, flops: float = check.FLOPS) -> None:
        self.case = case
        self.slices = [
            list(_slices(one, *own, flops * one.flops / case.flops)) for one, own in check.parts(case, q, k, v, dout)
        ]

    def errors(self, grads: Gradients) -> GradientErrors:
        return GradientErrors(*(self.error(index, grad) for index, grad in enumerate(grads)))

    def error(self, index: int, grad: torch.Tensor) -> Errors:
        """Of the gradient called ``NAMES[index]``."""
        return check.distance(
            (own[batch, :, head if index else heads], answer[index])
            for own, slices in zip(self.case.split(grad, index > 0), self.slices, strict=True)
            for batch, heads, head, answer in slices
        )


def _slices(case: Case, q, k, v, dout, flops: float) -> Iterator[tuple[int, slice, int, Gradients]]:
    """(batch entry, query heads, key head, (dq, dk, dv)) of those that are held against float64."""
    group = case.heads // case.kv_heads
    pairs = case.batch * case.kv_heads
    seen = case.visible.pairs() if case.window else case.seqlen_q * case.seqlen_k
    cost = 14 * group * seen * case.head_dim  # seven products
    count = min(pairs, max(2, min(SLICES, int(flops / cost))))
    for i in range(count):
        batch, head = divmod(i * (pairs - 1) // max(1, count - 1), case.kv_heads)
        heads = slice(head * group, (head + 1) * group)
        own = q[batch, :, heads], k[batch, :, head], v[batch, :, head], dout[batch, :, heads]
        yield batch, heads, head, gradients(case, *own)


def gradients(case: Case, q, k, v, dout, exact: torch.dtype = torch.float64) -> Gradients:
    """(dq, dk, dv) of one key head, written out in the dtype ``exact``: q and dout (seqlen_q, group, head_dim), k and v
    (seqlen_k, head_dim). In float32 what flash kernels round to the case's dtype before a product is rounded here, too.
    """
    if case.features - {"window"}:
        raise NotImplementedError(f"no gradients are written out for {case.mask}")
    low = torch.float64 if exact is torch.float64 else getattr(torch, case.dtype)
    q, dout = (x.to(exact).transpose(0, 1) for x in (q, dout))
    k, v = k.to(exact), v.to(exact)
    scale = case.head_dim**-0.5
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    step = max(1, check.SCORES // (q.shape[0] * case.seqlen_k))
    for a in range(0, case.seqlen_q, step):
        b = min(a + step, case.seqlen_q)
        begin, end = case.visible.kv_range(a, b)
        i, j = torch.arange(a, b, device=q.device)[:, None], torch.arange(begin, end, device=q.device)
        hidden = ~case.visible.keep(i, j)
        p = (scale * q[:, a:b] @ k[begin:end].T).masked_fill(hidden, -torch.inf).softmax(-1)
        p = p.masked_fill(hidden, 0)  # a row without a key is NaN
        dp = dout[:, a:b] @ v[begin:end].T
        ds = scale * p * (dp - (p * dp).sum(-1, keepdim=True))
        p, ds = (x.to(low).to(exact) for x in (p, ds))
        dq[:, a:b] = ds @ k[begin:end]
        dk[begin:end] += (ds.mT @ q[:, a:b]).sum(0)
        dv[begin:end] += (p.mT @ dout[:, a:b]).sum(0)
    return dq.transpose(0, 1), dk, dv


def written_out(case: Case, q, k, v, dout) -> Gradients:
    """All gradients in float32, rounded once to the case's dtype: what stands for PyTorch's where it has no kernel."""
    group = case.heads // case.kv_heads
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for batch in range(case.batch):
        for head in range(case.kv_heads):
            heads = slice(head * group, (head + 1) * group)
            found = gradients(
                case, q[batch, :, heads], k[batch, :, head], v[batch, :, head], dout[batch, :, heads], torch.float32
            )
            dq[batch, :, heads], dk[batch, :, head], dv[batch, :, head] = found
    return dq, dk, dv


def judge(
    case: Case, truth: Truth, grads: Gradients, pytorch: Gradients, pytorch_errors: GradientErrors
) -> tuple[GradientErrors | None, str | None]:
    """The errors of ``grads``, and why they are not acceptable; as :func:`flashcore.bench.check.judge`."""
    found, reasons = [], []
    for index, name in enumerate(NAMES):
        grad, theirs = grads[index], pytorch[index]
        errors, wrong = check.compare(
            grad, theirs, partial(truth.error, index), getattr(pytorch_errors, name), FACTOR, apart=None
        )
        found.append(errors)
        split = (case.split(x, index > 0) for x in (grad, theirs))
        if wrong is None and (distance := max(map(head_distance, *split))) > case.apart:
            wrong = f"a head differs from PyTorch's by {distance:.3g} of its norm, allowed {case.apart:.3g}"
        if wrong:
            reasons.append(f"{name}: {wrong}")
    return None if None in found else GradientErrors(*found), "; ".join(reasons) or None


def head_distance(grad: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest distance of a head of a batch entry from PyTorch's, over its norm, or the mean norm if it has less.

    Gradients shrink with the sequence length, so that no distance between elements means the same for all cases.
    """
    apart, norm = (x.float().square().sum(dim=(1, 3)).sqrt() for x in (grad - theirs, theirs))
    return (apart / norm.clamp_min(norm.mean().item() + 1e-30)).max().item()
