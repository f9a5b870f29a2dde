"""Parts of the keys, by each provider that takes them: merged they are the whole, and nothing was rounded."""

from dataclasses import replace

import pytest
import torch

import flashcore
from flashcore import plan as planning
from flashcore.backends import ATTENTION_BACKWARD, reference
from flashcore.problem import AttentionProblem

MASKS = {"full": {}, "causal": {"causal": True}, "window": {"window": (9, 4)}}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("forward", ["reference", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parts_are_the_whole(forward, mask, dtype):
    check_parts(forward, "reference", dtype, MASKS[mask])


def check_parts(forward: str, backward: str, dtype: torch.dtype, options: dict, device: str = "cpu") -> None:
    """Two ranks' keys, seen by the queries of both, as a ring would compute them."""
    # With these PyTorch imports Triton, which tests of its kernels must be the first to do.
    from flashcore.distributed.layout import Layout, Share, bands
    from flashcore.distributed.ring import merge

    torch.manual_seed(0)
    where, length = Layout("zigzag", 2), 24
    q, k, v = (torch.randn(2, 2 * length, heads, 16, dtype=dtype, device=device) for heads in (4, 2, 2))
    dout = torch.randn_like(q)
    exact = torch.float64 if dtype is torch.float64 else torch.float32
    problem = AttentionProblem.from_tensors(q, k, v, return_lse=True, **options)

    tensors = [t.double().requires_grad_() for t in (q, k, v)]
    whole, _ = flashcore.attention(*tensors, backend="reference", return_lse=True, **options)
    right = (whole.detach(), *torch.autograd.grad(whole, tensors, dout.double()))

    parts, tokens = [], torch.arange(2 * length, device=device)
    for rank, source in ((0, 0), (0, 1), (1, 0), (1, 1)):
        for part in bands(problem.mask, 0, Share(where, rank, length), Share(where, source, length)):
            rows = where.shard(tokens, rank, 0)[slice(*part.rows)]
            keys = where.shard(tokens, source, 0)[slice(*part.keys)]
            lengths = {"seqlen_q": len(rows), "seqlen_k": len(keys)}
            one = replace(problem, **lengths, mask=part.mask, partial=True, needs_grad=True)
            with planning.override(backward=backward):
                parts.append((rows, keys, planning.prepared_plan(one, forward)))
    assert {plan.backward.backend for _, _, plan in parts} == {backward}

    out = torch.zeros(problem.out_shape, dtype=exact, device=device)
    lse = torch.full(problem.lse_shape, -torch.inf, dtype=exact, device=device)
    for rows, keys, plan in parts:
        one, one_lse = plan.run(q[:, rows], k[:, keys], v[:, keys], None)
        assert one.dtype == one_lse.dtype == exact
        of_rows, lse_of_rows = out[:, rows], lse[:, :, rows]
        merge(of_rows, lse_of_rows, one, one_lse)
        out[:, rows], lse[:, :, rows] = of_rows, lse_of_rows

    grads = [torch.zeros(t.shape, dtype=exact, device=device) for t in (q, k, v)]
    final = out.to(dtype)
    for rows, keys, plan in parts:
        of_part = plan.backward.run(
            q[:, rows], k[:, keys], v[:, keys], final[:, rows], lse[:, :, rows].contiguous(), dout[:, rows], None, None
        )
        assert {grad.dtype for grad in of_part} == {exact}
        for total, grad, at in zip(grads, of_part, (rows, keys, keys), strict=True):
            total[:, at] += grad
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 3e-2)
    for name, result, expected in zip(("out", "dq", "dk", "dv"), (out, *grads), right, strict=True):
        error = (result - expected).norm() / expected.norm()
        assert error < (1e-5 if name == "out" and dtype is torch.bfloat16 and forward == "reference" else tolerance), (
            f"{name}: {error:.2g}"
        )


@pytest.mark.parametrize("name", ["sdpa-recompute", "reference-recompute"])
def test_who_computes_the_forward_again_would_find_another_lse(name):
    q = torch.zeros(1, 4, 2, 8)
    problem = AttentionProblem.from_tensors(q, q, q)
    assert ATTENTION_BACKWARD.refusal(name, problem) is None
    part = replace(problem, partial=True)
    assert "the LSE of all in the backward pass" in ATTENTION_BACKWARD.refusal(name, part)


@pytest.mark.parametrize("options", [{"causal": True}, {"window": (3, 1)}])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(7, 7), (9, 4), (3, 8)])
def test_gradients_of_the_whole_from_its_lse(seqlen_q, seqlen_k, options, monkeypatch):
    """The reference's are autograd's: in chunks of queries, for rows without keys, with the LSE's own gradient."""
    torch.manual_seed(0)
    monkeypatch.setattr(reference, "CHUNK_SCORES", 2 * 6 * seqlen_k * 2)
    q, k, v = (torch.randn(2, n, heads, 5, dtype=torch.float64) for n, heads in ((seqlen_q, 6), *[(seqlen_k, 3)] * 2))
    problem = replace(AttentionProblem.from_tensors(q, k, v, return_lse=True, **options), partial=True)
    tensors = [t.requires_grad_() for t in (q, k, v)]
    out, lse = reference.forward(problem, None, *tensors)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    total = (out * dout).sum() + (lse.masked_fill(lse.isneginf(), 0.0) * dlse).sum()
    run = ATTENTION_BACKWARD.prepare("reference", problem, None)
    grads = run(*(t.detach() for t in (q, k, v, out, lse)), dout, dlse, None)
    for grad, expected in zip(grads, torch.autograd.grad(total, tensors), strict=True):
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)
