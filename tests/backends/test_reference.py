"""The specification in its corners. That it is attention at all is shown by the cases."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flashcore
from flashcore.backends import reference
from flashcore.problem import AttentionProblem
from tests.cases import BY_NAME, Case
from tests.tolerance import assert_forward


def run(q, k, v, **options):
    problem = AttentionProblem.from_tensors(q, k, v, **options)
    return reference.forward(problem, None, q, k, v)


@pytest.mark.parametrize("scores", [1, 300, 5000])
@pytest.mark.parametrize(
    "name", ["causal_more_keys", "causal_empty_rows", "gqa_4_to_1", "float64_causal_empty_rows"]
)
def test_chunks_change_nothing(monkeypatch, name, scores):
    case = BY_NAME[name]
    q, k, v = case.inputs()
    whole = run(q, k, v, causal=case.causal)
    monkeypatch.setattr(reference, "CHUNK_SCORES", scores * case.batch * case.heads_q)
    for chunked, expected in zip(run(q, k, v, causal=case.causal), whole, strict=True):
        torch.testing.assert_close(chunked, expected)
        assert chunked.is_contiguous()


def test_chunks_bound_the_memory(monkeypatch):
    """No tensor of scores is larger than CHUNK_SCORES as long as one row of them fits."""
    sizes = []
    softmax = torch.Tensor.softmax

    def measured(scores, *args, **kwargs):
        sizes.append(scores.numel())
        return softmax(scores, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "softmax", measured)
    monkeypatch.setattr(reference, "CHUNK_SCORES", 10_000)
    q, k, v = Case("", seqlen_q=65, seqlen_k=129, heads_k=2).inputs()
    run(q, k, v)
    assert len(sizes) > 1
    assert max(sizes) <= 10_000
    assert sum(sizes) == 2 * 4 * 65 * 129


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_hidden_keys_do_not_matter(value):
    q, k, v = Case("", seqlen_q=9, seqlen_k=9, causal=True, dtype="float32").inputs()
    out, lse = run(q, k, v, causal=True)
    k[:, 6:] = value
    changed, changed_lse = run(q, k, v, causal=True)
    assert torch.equal(changed[:, :6], out[:, :6])
    assert torch.equal(changed_lse[..., :6], lse[..., :6])
    assert changed[:, 6:].isnan().all() or value == -torch.inf


def test_a_hidden_nan_value_is_nan():
    """Documented, and the same as PyTorch's: 0 x NaN."""
    q, k, v = Case("", seqlen_q=4, seqlen_k=4, causal=True, dtype="float32").inputs()
    v[:, 3] = torch.nan
    assert run(q, k, v, causal=True)[0].isnan().all()


def test_scores_of_minus_infinity_only():
    """Nothing to attend to, although no mask says so: zeros and -inf, not NaN."""
    q, k, v = torch.ones(1, 2, 1, 8), torch.full((1, 3, 1, 8), -torch.inf), torch.randn(1, 3, 1, 8)
    out, lse = run(q, k, v)
    assert not out.any()
    assert lse.isneginf().all()


def test_float64_is_float64_all_the_way():
    q, k, v = (t.double() for t in Case("", dtype="float32", seqlen_q=17, seqlen_k=33).inputs())
    out, lse = run(q, k, v)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 8
    expected = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    assert (out - expected).abs().max() < 1e-14
    assert out.dtype == torch.float64
    assert lse.dtype == torch.float32


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "causal", "heads_q"),
    [(3, 3, False, 2), (3, 3, True, 2), (4, 2, True, 2), (2, 5, True, 4), (1, 4, True, 2)],
)
def test_gradcheck(seqlen_q, seqlen_k, causal, heads_q):
    """The derivative that autograd finds is the one that finite differences find, empty rows included."""
    shapes = (1, seqlen_q, heads_q, 3), (1, seqlen_k, 2, 3), (1, seqlen_k, 2, 2)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    torch.autograd.gradcheck(lambda q, k, v: run(q, k, v, causal=causal, scale=0.7)[0], inputs)


@given(
    batch=st.integers(1, 3),
    seqlen_q=st.integers(1, 20),
    seqlen_k=st.integers(1, 20),
    heads_k=st.integers(1, 3),
    group_size=st.integers(1, 3),
    head_dim=st.integers(1, 12),
    head_dim_v=st.integers(1, 12),
    causal=st.booleans(),
    scale=st.one_of(st.none(), st.floats(-2, 2)),
)
def test_any_shape(batch, seqlen_q, seqlen_k, heads_k, group_size, head_dim, head_dim_v, causal, scale):
    q = torch.randn(batch, seqlen_q, heads_k * group_size, head_dim)
    k = torch.randn(batch, seqlen_k, heads_k, head_dim)
    v = torch.randn(batch, seqlen_k, heads_k, head_dim_v)
    out, lse = run(q, k, v, causal=causal, scale=scale)
    assert_forward(out, lse, q, k, v, causal=causal, scale=scale)


def test_gradients_of_a_query_whose_scores_are_all_infinite():
    """It sees as little as a query without a key."""
    q, k, v = (torch.randn(1, 3, 2, 8, requires_grad=True) for _ in range(3))
    hidden = torch.zeros(1, 1, 3, 3)
    hidden[0, 0, 1] = -torch.inf
    out = flashcore.attention(q, k, v, score=flashcore.bias(hidden), backend="reference")
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert not out[0, 1].any()
    assert not grads[0][0, 1].any()
    assert all(grad.isfinite().all() for grad in grads)
