"""matmul and linear: right on every device, clear about what they do not take, differentiable."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import flashcore
from flashcore import gemm
from flashcore import plan as planning
from flashcore.backends import torch_matmul
from flashcore.errors import FlashCoreWarning
from flashcore.gemm_problem import GemmProblem
from flashcore.plan import Plan, _plan, plan
from tests.gemm_cases import CASES, GemmCase, product
from tests.poison import poisoned_outputs
from tests.tolerance import assert_as_good_as

COPIES = "ignore:matmul.*is copied:flashcore.errors.FlashCoreWarning"


@pytest.fixture(autouse=True)
def _no_memory_between_tests():
    yield
    gemm._runs.clear()
    _plan.cache_clear()


def check(case: GemmCase, device: str) -> None:
    a, b, bias = case.inputs(device)
    with poisoned_outputs():
        out = flashcore.matmul(a, b, bias=bias, **case.options)
    assert out.dtype == getattr(torch, case.out_dtype or case.dtype)
    assert out.is_contiguous()
    exact = product(a, b, bias, case.activation, torch.float64)
    by_torch = product(a, b, bias, case.activation, out.dtype)
    assert_as_good_as(by_torch, out, exact, case.name, factor=2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case):
    check(case, "cpu")


@pytest.mark.gpu
@pytest.mark.filterwarnings(COPIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_on_a_gpu(case):
    check(case, "cuda")


def test_no_terms_leave_the_bias():
    bias = torch.tensor([1.0, -2.0])
    assert torch.equal(flashcore.matmul(torch.ones(3, 0), torch.ones(0, 2), bias=bias), bias.expand(3, 2))


# ---- gradients ----

SHAPES = {
    "matrices": ((5, 7), (7, 6)),
    "batch_of_a": ((3, 5, 7), (7, 6)),
    "batch_of_b": ((5, 7), (3, 7, 6)),
    "batches": ((3, 5, 7), (3, 7, 6)),
}


@pytest.mark.parametrize("activation", [None, "gelu", "silu", "swiglu"])
@pytest.mark.parametrize("shapes", SHAPES)
def test_gradients(shapes, activation):
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in (*SHAPES[shapes], (6,))
    ]
    assert torch.autograd.gradcheck(
        lambda a, b, bias: flashcore.matmul(a, b, bias=bias, activation=activation), inputs, fast_mode=True
    )


def test_only_the_gradients_that_are_needed(monkeypatch):
    a, b = torch.randn(3, 4), torch.randn(4, 5, requires_grad=True)
    out = flashcore.matmul(a, b)
    calls = []
    multiply = gemm._matmul
    monkeypatch.setattr(gemm, "_matmul", lambda *args: calls.append(args) or multiply(*args))
    out.sum().backward()
    assert len(calls) == 1
    assert a.grad is None
    assert torch.allclose(b.grad, a.t() @ torch.ones(3, 5))


def check_linear(shape, device, dtype, *, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def leaves(dtype):
        return [t.detach().to(device, dtype).requires_grad_() for t in tensors]

    tensors = [torch.randn(shape, generator=generator), torch.randn(72, shape[-1], generator=generator) / 8]
    tensors = [t.to(dtype) for t in (*tensors, *([torch.randn(72, generator=generator)] if bias else []))]
    dout = torch.randn(*shape[:-1], 72, generator=generator).to(device, dtype)
    ours, theirs, exact = leaves(dtype), leaves(dtype), leaves(torch.float64)
    out, out_theirs, out_exact = flashcore.linear(*ours), F.linear(*theirs), F.linear(*exact)
    assert_as_good_as(out_theirs.detach(), out.detach(), out_exact.detach(), "out", factor=2)
    out.backward(dout)
    out_theirs.backward(dout)
    out_exact.backward(dout.double())
    for name, x, y, z in zip(("x", "weight", "bias"), ours, theirs, exact, strict=False):
        assert x.grad.dtype == x.dtype
        assert_as_good_as(y.grad, x.grad, z.grad, f"gradient of {name}", factor=2)


@pytest.mark.parametrize("shape", [(64,), (33, 64), (2, 33, 64), (2, 3, 5, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(shape, dtype, bias):
    check_linear(shape, "cpu", dtype, bias=bias)


@pytest.mark.gpu
@pytest.mark.filterwarnings(COPIES)
@pytest.mark.parametrize("shape", [(64,), (33, 64), (2, 33, 64), (2, 3, 5, 64), (1000, 520)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_on_a_gpu(shape, dtype, bias):
    check_linear(shape, "cuda", dtype, bias=bias)


@pytest.mark.parametrize("activation", [None, "gelu", "silu", "swiglu"])
@pytest.mark.parametrize("shapes", SHAPES)
def test_second_derivatives(shapes, activation):
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in (*SHAPES[shapes], (6,))]
    assert torch.autograd.gradgradcheck(
        lambda a, b, bias: flashcore.matmul(a, b, bias=bias, activation=activation), inputs, fast_mode=True
    )


@pytest.fixture
def opaque(monkeypatch):
    """Products read memory, as the Hopper kernel does: what has none shows."""
    by_torch = torch_matmul.multiply

    def reading(problem, a, b, bias, **options):
        assert options or (a.data_ptr() and b.data_ptr())
        return by_torch(problem, a, b, bias, **options)

    monkeypatch.setattr(torch_matmul, "multiply", reading)


@pytest.mark.parametrize("activation", [None, "swiglu"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_batched_output_gradients(opaque, activation, create_graph):
    a, b = torch.randn(5, 7, requires_grad=True), torch.randn(7, 6, requires_grad=True)
    out = flashcore.matmul(a, b, activation=activation)
    douts = torch.randn(3, *out.shape)
    options = {"retain_graph": True, "create_graph": create_graph}
    batched = torch.autograd.grad(out, (a, b), douts, is_grads_batched=True, **options)
    one_by_one = [torch.autograd.grad(out, (a, b), dout, **options) for dout in douts]
    torch.testing.assert_close(batched, tuple(map(torch.stack, zip(*one_by_one, strict=True))))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 3, 0), (0, 0), (2, 0, 4), (0, 3, 4)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_linear_with_nothing_to_multiply(shape, bias, device):
    """No features leave the bias, in any number of dimensions and where the operands are."""

    def leaves():
        tensors = torch.ones(shape), torch.ones(2, shape[-1]), *([torch.tensor([1.0, -2.0])] if bias else [])
        return [t.to(device, torch.bfloat16).requires_grad_() for t in tensors]

    ours, theirs = leaves(), leaves()
    out, expected = flashcore.linear(*ours), F.linear(*theirs)
    assert torch.equal(out, expected)
    assert out.device == expected.device
    out.sum().backward()
    expected.sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("wide", [False, True])
def test_the_fallback_is_one_product(shapes, wide, device):
    """With the bias inside; on a GPU it makes float32 out of 16 bits without copies of the operands."""
    a, b, bias = (torch.randn(shape, device=device).bfloat16() for shape in (*SHAPES[shapes], (6,)))
    options = {"out_dtype": torch.float32} if wide else {}
    with torch.profiler.profile() as profile:
        out = torch_matmul.multiply(GemmProblem.from_tensors(a, b, bias=bias, **options), a, b, bias)
    exact = product(a, b, bias, None, torch.float64)
    assert_as_good_as(product(a, b, bias, None, out.dtype), out, exact, shapes, factor=2)
    called = [event.name for event in profile.events()]
    assert not {"aten::add", "aten::add_"} & set(called)
    if device == "cuda":
        assert called.count("aten::_to_copy") == wide, "of the bias alone"


# ---- errors ----

A, B = torch.zeros(4, 6), torch.zeros(6, 8)

ERRORS = {
    "not_a_tensor": (lambda: flashcore.matmul(A, [1]), "b must be a torch.Tensor .*list"),
    "sparse": (lambda: flashcore.matmul(A.to_sparse(), B), "a must be a dense tensor"),
    "integers": (lambda: flashcore.matmul(A.int(), B.int()), "dtype int32"),
    "dtypes": (lambda: flashcore.matmul(A, B.half()), "one dtype"),
    "devices": (lambda: flashcore.matmul(A, torch.zeros(6, 8, device="meta")), "meta"),
    "vector": (lambda: flashcore.matmul(A, B[:, 0]), "2 dimensions, or 3"),
    "inner": (lambda: flashcore.matmul(A, A), "a has 6 columns, but b has 4 rows"),
    "batches": (lambda: flashcore.matmul(A.expand(2, 4, 6), B.expand(3, 6, 8)), "one batch size"),
    "activation": (lambda: flashcore.matmul(A, B, activation="relu"), "'relu' does not exist .*gelu"),
    "odd_swiglu": (lambda: flashcore.matmul(A, B[:, :7], activation="swiglu"), "even number of columns"),
    "bias": (lambda: flashcore.matmul(A, B, bias=torch.zeros(4)), "one element per column"),
    "out_dtype": (lambda: flashcore.matmul(A, B, out_dtype=torch.float16), "out_dtype=float16 is not supported"),
    "out_dtype_name": (lambda: flashcore.matmul(A, B, out_dtype="float32"), "out_dtype='float32'"),
    "linear_not_a_tensor": (lambda: flashcore.linear(A, None), "weight must be a torch.Tensor"),
    "linear_inner": (lambda: flashcore.linear(A, A[:, :5]), "must share k"),
    "linear_bias": (lambda: flashcore.linear(A, A, torch.zeros(3)), "one element per column"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_error(name):
    call, message = ERRORS[name]
    with pytest.raises(flashcore.InvalidInputError, match=message):
        call()


@pytest.mark.parametrize("name", ["not_a_tensor", "dtypes", "inner", "bias"])
def test_error_where_a_gradient_is_needed(name, monkeypatch):
    monkeypatch.setattr(gemm, "_needs_grad", lambda *tensors: True)
    test_error(name)


# ---- plans ----


def test_explain_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flashcore.explain_matmul(A, B).problem.dtype == "bfloat16"


def test_explain_shows_copies(monkeypatch):
    monkeypatch.setattr(planning, "plan", lambda problem: Plan("matmul", problem, "hopper", None, "fake"))
    a, b = (torch.zeros(16, 16, dtype=torch.bfloat16) for _ in "ab")
    assert flashcore.explain_matmul(a, b).copied == ()
    plan = flashcore.explain_matmul(a[:, 1:9], b[:8, ::2])
    assert [name for name, _ in plan.copied] == ["a", "b"]
    assert "copied    a: its data is not aligned to 16 bytes\ncopied    b: neither of its last two" in str(plan)


def test_explain_on_the_cpu():
    plan = flashcore.explain_matmul(A, B)
    assert plan.backend == "torch"
    assert "device cpu is not a GPU" in str(plan)


def test_explain_names_config_and_schedule(monkeypatch):
    from flashcore.backends import hopper

    monkeypatch.setattr(hopper, "unavailable", lambda: None)
    problem = GemmProblem("bfloat16", "bfloat16", "cuda", (9, 0), 132, 1, 8192, 8192, 8192)
    text = str(plan(problem))
    assert "hopper" in text
    assert "tile 256 x 192" in text
    assert "66 clusters" in text


def test_one_warning_when_the_gpu_could_do_better(monkeypatch):
    """A missing library on a Hopper GPU; not another GPU, or a problem that the kernel does not take."""
    from flashcore.backends import hopper

    reason = "NVRTC cannot be loaded (a reason of this test's own)"
    monkeypatch.setattr(hopper, "unavailable", lambda: reason)
    problem = GemmProblem("bfloat16", "bfloat16", "cuda", (9, 0), 132, 1, 136, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in (replace(problem, arch=(8, 0)), replace(problem, dtype="float32", out_dtype="float32")):
            assert plan(other).backend == "torch"
        assert plan(problem, anywhere=True).backend == "hopper"
    with pytest.warns(FlashCoreWarning, match="matmul: backend hopper would .* cannot: NVRTC cannot be loaded"):
        assert plan(problem).rejected == (("hopper", reason),)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(replace(problem, m=144))
    _plan.cache_clear()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "dtype float32"),
        ({"arch": (8, 0)}, "not Hopper"),
        ({"k": 0}, "nothing to multiply"),
        ({"n": 33, "activation": "swiglu"}, "odd number"),
        ({"m": 2**31}, "2\\^31"),
        ({"batch": 2**20, "m": 2**12, "n": 2**14}, "tiles"),
    ],
)
def test_what_the_kernel_rejects(changes, reason):
    rejects = pytest.importorskip("flashcore.backends.hopper.gemm").rejects
    problem = GemmProblem("bfloat16", "bfloat16", "cuda", (9, 0), 132, 1, 64, 64, 64)
    assert rejects(problem) is None
    assert re.search(reason, rejects(replace(problem, **changes)))


def test_batches_that_share_b_are_one_matrix():
    a = torch.zeros(3, 5, 7)
    assert flashcore.explain_matmul(a, B[:1].expand(7, 8)).problem.m == 15
    assert flashcore.explain_matmul(a.transpose(0, 1), B[:1].expand(7, 8)).problem.batch == 5


def test_problems_name_the_memory_direction():
    problem = GemmProblem.from_tensors(A.t().contiguous().t(), B)
    assert problem.a_mn_major
    assert problem.b_mn_major
    assert not GemmProblem.from_tensors(A, B.t().contiguous().t()).b_mn_major
