"""What the harness must know of an operation besides how to time it: inputs, the right answer, the plan."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from flashcore.bench import backward, check, gemm, packed, timing
from flashcore.bench.cases import Case
from flashcore.bench.peers import PEERS, Peer, options


@dataclass(frozen=True)
class Operation:
    """Functions get a case and its tensors."""

    name: str  # what its peers compute
    inputs: str  # in words
    ours: str  # the implementation whose plan is recorded
    make_inputs: Callable[..., tuple[torch.Tensor, ...]]
    truth: Callable[..., check.Truth | gemm.Truth | backward.Truth]
    pytorch_answer: Callable[..., torch.Tensor | backward.Gradients]
    plan: Callable[..., dict]
    prepare: Callable[..., Callable[[], object]] = lambda peer, case, *tensors: peer.prepare(case, *tensors)
    result: Callable = lambda peer, case, returned: peer.result(case, returned)  # what pytorch_answer's is compared to
    judge: Callable[..., tuple] = check.judge


def _pytorch_answer(case: Case, device: str, *tensors: torch.Tensor) -> torch.Tensor:
    """PyTorch's result in the same dtype: FlashAttention-2 where it runs, else what SDPA dispatches to."""
    return check.joined(case, [_of_part(one, device, *own) for one, own in check.parts(case, *tensors)])


def _of_part(case: Case, device: str, q, k, v) -> torch.Tensor:
    if case.features:  # SDPA has none of them; PyTorch's plain operations have all
        return check.in_blocks(case, q, k, v)
    if case.causal and (keyless := case.seqlen_q - case.seqlen_k) > 0:
        # PyTorch aligns such a mask elsewhere. Rows without a key are 0, and behind them the mask is a square one.
        seen = _of_part(replace(case, seqlen_q=case.seqlen_k), device, q[:, keyless:], k, v)
        return torch.cat((seen.new_zeros(case.batch, keyless, *seen.shape[2:]), seen), dim=1)
    if PEERS["sdpa"].rejects(case):  # such a mask, too, with fewer queries than keys
        return check.in_blocks(case, q, k, v)
    candidates = (PEERS["fa2"], PEERS["sdpa"]) if device == "cuda" else (PEERS["sdpa"],)
    for peer in candidates[:-1]:
        if peer.rejects(case) is None:
            try:
                with peer.context():
                    return peer.result(case, peer.prepare(case, q, k, v)())
            except RuntimeError:  # no such kernel for this case
                continue
    return candidates[-1].result(case, candidates[-1].prepare(case, q, k, v)())


def _plan(case: Case, q, k, v) -> dict:
    """What FlashCore's plan chose: a row must say which backend its number belongs to."""
    import flashcore

    k, v = packed.stored(case, k, v)
    plan = flashcore.explain(q, k, v, causal=case.causal, **options(case, q.device))
    return {"backend": plan.backend} | ({"config": str(plan.config)} if plan.config is not None else {})


def _in_turns(peer: Peer, case: Case, q, k, v) -> Callable[[], object]:
    """Calls take turns on copies of K and V that together exceed L2: a model's other layers displace a cache there."""
    copies = min(64, -(-timing.FLUSH_BYTES // case.kv_bytes))
    kv = [(k, v), *((k.clone(), v.clone()) for _ in range(copies - 1))]
    turns = itertools.cycle([peer.prepare(case, q, *one) for one in kv])
    return lambda: next(turns)()


_ATTENTION = Operation(
    "attention",
    "random N(0, 1), (batch, seqlen, heads, head_dim)",
    "flashcore",
    check.make_inputs,
    check.Truth,
    _pytorch_answer,
    _plan,
)

# By a suite's op, where it is not attention's forward; and by what a peer computes.
OPERATIONS = {
    "attention": _ATTENTION,
    "attention_bwd": replace(
        _ATTENTION,
        inputs="random N(0, 1), the output's gradient too, (batch, seqlen, heads, head_dim)",
        make_inputs=backward.make_inputs,
        truth=backward.Truth,
        pytorch_answer=backward.pytorch_answer,
        plan=backward.plan,
        prepare=backward.prepare,
        result=lambda peer, case, returned: returned,
        judge=backward.judge,
    ),
    "attention_decode": replace(
        _ATTENTION, inputs=f"{_ATTENTION.inputs}; K and V in turn from copies that L2 cannot hold", prepare=_in_turns
    ),
    "gemm": Operation(
        "gemm",
        "random a N(0, 1), b N(0, 1 / k)",
        "flashcore-matmul",
        gemm.make_inputs,
        gemm.Truth,
        gemm.pytorch_answer,
        gemm.plan,
    ),
}
