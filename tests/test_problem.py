"""Validation: every rule has a message that names the argument, what was given and what to do."""

import dataclasses
import math

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flashcore
from flashcore.errors import InvalidInputError
from flashcore.mask import CAUSAL
from flashcore.problem import AttentionProblem
from flashcore.score import bind
from tests.cases import CASES


def tensors(q=(2, 5, 4, 16), k=(2, 7, 2, 16), v=(2, 7, 2, 16), dtype=torch.float32):
    return [torch.zeros(shape, dtype=dtype) for shape in (q, k, v)]


def with_bad(index: int, bad):
    inputs = tensors()
    inputs[index] = bad(inputs[index]) if callable(bad) else bad
    return inputs


def nested(tensor):
    return torch.nested.as_nested_tensor(tensor, layout=torch.jagged)


INVALID = {
    "not a tensor": (with_bad(0, [1.0]), {}, r"q must be a torch.Tensor \(given list\)"),
    "numpy": (with_bad(2, lambda t: t.numpy()), {}, r"v must be a torch.Tensor \(given ndarray\)"),
    "none": (with_bad(1, None), {}, r"k must be a torch.Tensor \(given NoneType\)"),
    "sparse": (with_bad(1, torch.Tensor.to_sparse), {}, r"k must be a dense tensor \(given a sparse_coo one\)"),
    "nested": (with_bad(1, nested), {}, r"k must be a dense tensor \(given a nested one\)"),
    "integers": (with_bad(0, torch.Tensor.int), {}, r"q has dtype int32 \(supported: bfloat16, float16, "),
    "complex": (tensors(dtype=torch.complex64), {}, r"q has dtype complex64 \(supported: .*Cast it first"),
    "fp8": (tensors(dtype=torch.float8_e4m3fn), {}, r"q has dtype float8_e4m3fn"),
    "meta": (with_bad(2, lambda t: t.to("meta")), {}, r"v is on meta \(supported: cuda, cpu\)"),
    "rank 3": (with_bad(1, lambda t: t[0]), {}, r"k must have 4 dimensions, .*\(given 3: \(7, 2, 16\)\)"),
    "rank 5": (with_bad(0, lambda t: t[None]), {}, r"q must have 4 dimensions, .*\(given 5: \(1, 2, 5, 4, 16\)\)"),
    "no heads": (with_bad(1, lambda t: t[:, :, :0]), {}, r"k has heads=0 \(supported: 1 or more; given \(2, 7, 0, 16"),
    "head_dim 0": (with_bad(0, lambda t: t[..., :0]), {}, r"q has head_dim=0 .*Only batch and seqlen may be 0"),
    "mixed dtypes": (with_bad(2, torch.Tensor.half), {}, r"one dtype \(given q float32, k float32, v float16\)"),
    "batch": (with_bad(0, lambda t: t[:1]), {}, r"one batch size \(given q \(1, 5, 4, 16\), k \(2, 7, 2, 16\)"),
    "kv seqlen": (with_bad(2, lambda t: t[:, 1:]), {}, r"k and v must have one seqlen .*v \(2, 6, 2, 16\)"),
    "kv heads": (with_bad(2, lambda t: t[:, :, :1]), {}, r"k and v must have the same number of heads"),
    "head_dim": (with_bad(1, lambda t: t[..., 1:]), {}, r"q and k must have one head_dim .*k \(2, 7, 2, 15\)"),
    "ratio": (with_bad(0, lambda t: t[:, :, 1:]), {}, r"heads_q=3 is not a multiple of heads_k=2 .*swapped\?"),
    "fewer q heads": (with_bad(0, lambda t: t[:, :, 3:]), {}, r"heads_q=1 is not a multiple of heads_k=2"),
    "nan scale": (tensors(), {"scale": math.nan}, r"scale=nan is not finite"),
    "inf scale": (tensors(), {"scale": -math.inf}, r"scale=-inf is not finite"),
    "tensor scale": (tensors(), {"scale": torch.tensor(0.1)}, r"scale must be a number or None \(given Tensor\).*item"),
    "bool scale": (tensors(), {"scale": True}, r"scale must be a number or None \(given bool\)"),
    "string scale": (tensors(), {"scale": "0.1"}, r"scale must be a number or None \(given str\)"),
    "causal": (tensors(), {"causal": "yes"}, r"causal must be True or False \(given 'yes'\)"),
    "causal None": (tensors(), {"causal": None}, r"causal must be True or False \(given None\)"),
    "return_lse": (tensors(), {"return_lse": 2}, r"return_lse must be True or False \(given 2\)"),
    "unhashable": (tensors(), {"causal": [True]}, r"causal must be True or False"),
}  # fmt: skip


@pytest.mark.parametrize("call", [flashcore.attention, flashcore.explain, AttentionProblem.from_tensors])
@pytest.mark.parametrize("name", INVALID)
def test_invalid(call, name):
    inputs, options, message = INVALID[name]
    with pytest.raises(InvalidInputError, match=message) as caught:
        call(*inputs, **options)
    assert str(caught.value).startswith("attention: ")


def test_invalid_stays_invalid_after_a_valid_call_of_that_shape():
    """The memory of valid calls must not let an invalid one pass."""
    valid = tensors()
    flashcore.attention(*valid)
    for index in range(3):
        for bad in (torch.Tensor.to_sparse, torch.Tensor.double, lambda t: t.to("meta")):
            inputs = list(valid)
            inputs[index] = bad(inputs[index])
            with pytest.raises(InvalidInputError):
                flashcore.attention(*inputs)


def test_dimensions_are_named():
    q, k, v = torch.zeros(2, 5, 6, 16), torch.zeros(2, 7, 3, 16), torch.zeros(2, 7, 3, 24)
    problem = AttentionProblem.from_tensors(q, k, v, causal=True, return_lse=True)
    assert problem == AttentionProblem(
        dtype="float32", device="cpu", arch=None, sm_count=0, batch=2, seqlen_q=5, seqlen_k=7, heads_q=6, heads_k=3,
        head_dim=16, head_dim_v=24, mask=CAUSAL, scale=0.25, needs_grad=False, return_lse=True,
    )  # fmt: skip
    assert problem.group_size == 2
    assert (problem.q_shape, problem.k_shape, problem.v_shape) == (q.shape, k.shape, v.shape)
    assert (problem.out_shape, problem.lse_shape) == ((2, 5, 6, 24), (2, 6, 5))
    assert str(problem) == (
        "float32 on cpu, q (2, 5, 6, 16), k (2, 7, 3, 16), v (2, 7, 3, 24), scale 0.25, causal, return_lse"
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, 0.25), (1, 1.0), (0, 0.0), (-0.5, -0.5), (numpy.float32(0.5), 0.5), (numpy.int64(2), 2.0)],
)
def test_scale(given, expected):
    problem = AttentionProblem.from_tensors(*tensors(), scale=given)
    assert problem.scale == expected
    assert type(problem.scale) is float


def test_needs_grad():
    inputs = tensors()
    assert not AttentionProblem.from_tensors(*inputs).needs_grad
    for tensor in inputs:
        tensor.requires_grad_()
        assert AttentionProblem.from_tensors(*inputs).needs_grad
        with torch.no_grad():
            assert not AttentionProblem.from_tensors(*inputs).needs_grad
        tensor.requires_grad_(False)


def test_needs_lse():
    problem = AttentionProblem.from_tensors(*tensors())
    assert not problem.needs_lse
    assert dataclasses.replace(problem, return_lse=True).needs_lse
    assert dataclasses.replace(problem, needs_grad=True).needs_lse


def described(case, q, k, v):
    options = case.options()
    spec, extras = bind(options.pop("score"), options.pop("sink"))
    return AttentionProblem.from_tensors(q, k, v, **options, score=spec, extras=extras)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases_are_described_as_validation_describes_them(case):
    q, k, v = case.inputs()
    assert case.problem() == described(case, q, k, v)
    assert case.problem().is_empty == (q.numel() == 0 or k.numel() == 0)


dims = st.integers(0, 3)
shapes = st.tuples(dims, dims, dims, dims)


@given(shapes, shapes, shapes)
def test_any_shapes_are_either_described_or_refused(q, k, v):
    """Validation is complete: what passes it is consistent, and what does not raises nothing but its own error."""
    consistent = (
        min(*q[2:], *k[2:], *v[2:]) > 0
        and q[0] == k[0] == v[0]
        and k[1:3] == v[1:3]
        and q[3] == k[3]
        and q[2] % k[2] == 0
    )
    try:
        problem = AttentionProblem.from_tensors(*tensors(q, k, v))
    except InvalidInputError:
        assert not consistent
    else:
        assert consistent
        assert (problem.q_shape, problem.k_shape, problem.v_shape) == (q, k, v)


def test_a_hypothetical_problem_is_that_of_such_tensors():
    q, k = (2, 64, 8, 64), (2, 96, 2, 64)
    real = AttentionProblem.from_tensors(
        torch.empty(q), torch.empty(k), torch.empty(*k[:3], 32), causal=True, scale=0.5, return_lse=True
    )
    made = AttentionProblem.hypothetical(
        q, k, (*k[:3], 32), dtype=torch.float32, causal=True, scale=0.5, return_lse=True
    )
    if not torch.cuda.is_available():
        assert made == real
    elsewhere = AttentionProblem.hypothetical(q, k, arch=(9, 0), needs_grad=True)
    assert (elsewhere.device, elsewhere.arch, elsewhere.needs_grad) == ("cuda", (9, 0), True)
    assert elsewhere.dtype == "bfloat16"
    assert elsewhere.head_dim_v == 64


@pytest.mark.parametrize("q", [(10**20, 1, 1, 64), (2**32, 2**32, 1, 64), (0, 10**20, 1, 64), (1, 64, 3, 64)])
def test_a_hypothetical_problem_is_checked(q):
    with pytest.raises(InvalidInputError, match=r"larger than any memory|not a multiple"):
        AttentionProblem.hypothetical(q, (q[0], 1, 2 if q[2] == 3 else 1, 64), arch=(9, 0))
