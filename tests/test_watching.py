"""Calls that somebody records, answers, differentiates or batches: what kernels do must not escape them."""

import ctypes
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import flashcore
from flashcore.backends import recompute, reference
from flashcore.backends.sdpa import scaled_dot_product_attention as torch_sdpa
from flashcore.errors import InvalidInputError, UnsupportedError
from flashcore.integrations import sdpa
from tests.tolerance import assert_forward, assert_gradients

JIT = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")


def inputs(seqlen_q=5, seqlen_k=7, heads_k=2, requires_grad=False):
    shapes = (2, seqlen_q, 4, 16), (2, seqlen_k, heads_k, 16), (2, seqlen_k, heads_k, 16)
    return [torch.randn(shape, requires_grad=requires_grad) for shape in shapes]


@pytest.fixture
def opaque(add_backend):
    """A first backend that reads and writes memory, as kernels do: nobody who watches operators sees anything."""

    def memory(tensor):
        floats = (ctypes.c_float * tensor.numel()).from_address(tensor.data_ptr())
        return torch.frombuffer(floats, dtype=torch.float32).view(tensor.shape)

    def forward(problem, config, q, *others):
        inputs = [t.detach().contiguous() for t in (q, *others)]
        results = reference.forward(problem, config, *map(memory, inputs))
        made = tuple(q.new_empty(result.shape) for result in results)
        for tensor, result in zip(made, results, strict=True):
            memory(tensor).copy_(result)
        return made

    def backward(problem, config, *tensors):
        return tuple(grad.clone() for grad in recompute.reference.backward(problem, None, *tensors))

    return add_backend("opaque", forward=forward, backward=backward)


def test_opaque_backend(opaque):
    q, k, v = inputs()
    assert_forward(flashcore.attention(q, k, v, causal=True), None, q, k, v, causal=True)


@JIT
@pytest.mark.parametrize("function", [flashcore.attention, flashcore.scaled_dot_product_attention])
@pytest.mark.parametrize("record", ["jit", "make_fx"])
def test_recorded_calls_are_operators(opaque, function, record):
    def program(q, k, v):
        return function(q, k, v) + 1

    example, others = torch.randn(2, 3, 2, 4, 6, 8)
    recorded = torch.jit.trace(program, tuple(example)) if record == "jit" else make_fx(program)(*example)
    torch.testing.assert_close(recorded(*others), program(*others))


def featured(q, k, v, slopes, sink, backend="auto"):
    return flashcore.attention(q, k, v, window=(3, 0), score=flashcore.alibi(slopes), sink=sink, backend=backend)


@JIT
@pytest.mark.parametrize("record", ["jit", "make_fx", "symbolic"])
def test_recorded_features(opaque, record):
    example, others = ((*inputs(), torch.rand(4), torch.randn(4)) for _ in range(2))

    def program(q, k, v, slopes, sink):
        return featured(q, k, v, slopes, sink) + 1

    if record == "jit":
        recorded = torch.jit.trace(program, example)
    else:
        recorded = make_fx(program, tracing_mode="real" if record == "make_fx" else "symbolic")(*example)
    torch.testing.assert_close(recorded(*others), program(*others))


def test_flops_of_features(opaque):
    q, k, v = inputs(requires_grad=True)
    with FlopCounterMode(display=False) as plain:
        flashcore.attention(q, k, v).sum().backward()
    with FlopCounterMode(display=False) as counter:
        featured(q, k, v, torch.rand(4), torch.randn(4, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == plain.get_total_flops() > 0


@JIT
@pytest.mark.parametrize("lengths", [(6, 9), (6, 4), (6, 6)])
def test_traced_causal_sdpa_of_other_lengths(opaque, lengths):
    def program(q, k, v):
        return flashcore.scaled_dot_product_attention(q, k, v, is_causal=True)

    traced = torch.jit.trace(program, tuple(torch.randn(3, 2, 4, 6, 8)))
    query, *keys = torch.randn(2, 4, lengths[0], 8), *torch.randn(2, 2, 4, lengths[1], 8)
    torch.testing.assert_close(traced(query, *keys), torch_sdpa(query, *keys, is_causal=True))


@JIT
@pytest.mark.parametrize("record", ["jit", "make_fx", "export"])
def test_recorded_without_gradients_and_run_with_them(opaque, record):
    class Program(torch.nn.Module):
        def forward(self, q, k, v):
            return flashcore.attention(q, k, v, causal=True)

    example = tuple(inputs())
    recorded = {
        "jit": lambda: torch.jit.trace(Program(), example),
        "make_fx": lambda: make_fx(Program())(*example),
        "export": lambda: torch.export.export(Program(), example).module(),
    }[record]()
    q, k, v = inputs(requires_grad=True)
    out = recorded(q, k, v)
    dout = torch.randn_like(out)
    assert_gradients(torch.autograd.grad(out, (q, k, v), dout), q, k, v, dout, causal=True)


def test_recorded_arguments_are_checked():
    q, k, v = inputs()
    with FlopCounterMode(display=False):
        with pytest.raises(InvalidInputError, match=r"q must be a torch.Tensor"):
            flashcore.attention(1, 2, 3)
        with pytest.raises(InvalidInputError, match="scale must be a number"):
            flashcore.attention(q, k, v, scale=torch.tensor(1.0))


def test_fake_tensors(opaque):
    """In their mode and, as a model's example inputs are, outside of it; also after a call that looks the same."""
    plain = inputs()
    flashcore.attention(*plain, return_lse=True)
    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(t) for t in plain]
        assert flashcore.attention(*tensors).shape == (2, 5, 4, 16)
    out = flashcore.attention(*tensors, return_lse=True)
    assert [type(t) for t in out] == [FakeTensor] * 2
    assert out[1].shape == (2, 4, 5)
    with pytest.raises(InvalidInputError, match="one seqlen"):
        flashcore.attention(tensors[0], tensors[1], tensors[2][:, 1:])


def test_fake_tensors_with_features(opaque):
    plain = *inputs(), torch.rand(4), torch.randn(4)
    featured(*plain)
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(t) for t in plain]
    assert type(featured(*fakes)) is FakeTensor
    with pytest.raises(InvalidInputError, match="sink must be"):
        featured(*fakes[:4], fakes[4][1:])


def test_products_of_fake_tensors():
    a, b, bias = torch.randn(5, 7), torch.randn(7, 6), torch.randn(6)
    flashcore.matmul(a, b, bias=bias)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    assert type(flashcore.matmul(mode.from_tensor(a), mode.from_tensor(b), bias=mode.from_tensor(bias))) is FakeTensor
    assert type(flashcore.matmul(a, b, bias=mode.from_tensor(bias))) is FakeTensor
    with pytest.raises(InvalidInputError):
        flashcore.matmul(mode.from_tensor(a), mode.from_tensor(a))


@pytest.mark.parametrize("recorder", ["none", "flops", "make_fx", "compile"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "closed_over"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_transformed_sdpa(opaque, transform, recorder):
    """PyTorch computes it, whoever records it."""
    query, key, value, tangent = torch.randn(4, 2, 4, 6, 8)

    def program(function):
        def loss(query):
            return function(query, key, value).square().sum()

        return {
            "grad": lambda: torch.func.grad(loss)(query),
            "jvp": lambda: torch.func.jvp(lambda q: function(q, key, value), (query,), (tangent,))[1],
            "vmap": lambda: torch.func.vmap(lambda q: function(q, key, value))(torch.stack((query, tangent))),
            "closed_over": lambda: torch.func.grad(lambda s: (s * function(query, key, value)).sum())(torch.ones(())),
        }[transform]

    def result(function):
        run = program(function)
        if recorder == "flops":
            with FlopCounterMode(display=False):
                return run()
        if recorder == "make_fx":
            return make_fx(run)()()
        if recorder == "compile":
            torch._dynamo.reset()
            return torch.compile(run, backend="aot_eager")()
        return run()

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the one that has tangents
        found, expected = result(flashcore.scaled_dot_product_attention), result(torch_sdpa)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(found, expected)


def test_transforms_need_pytorchs_operations(opaque):
    q, k, v = inputs()
    expected = torch.autograd.grad(flashcore.attention(q.requires_grad_(), k, v, backend="sdpa").sum(), q)[0]

    def loss(q, **options):
        return flashcore.attention(q, k, v, **options).sum()

    with pytest.raises(UnsupportedError, match=r"backend 'opaque' cannot be transformed by torch.func"):
        torch.func.grad(loss)(q.detach())
    torch.testing.assert_close(torch.func.grad(partial(loss, backend="sdpa"))(q.detach()), expected)
    with sdpa.replace_torch():
        swapped = torch.func.grad(lambda q: F.scaled_dot_product_attention(q, q, q).sum())(q.detach())
    torch.testing.assert_close(
        swapped, torch.func.grad(lambda q: F.scaled_dot_product_attention(q, q, q).sum())(q.detach())
    )
    with pytest.raises(UnsupportedError, match="cannot be transformed"):
        torch.func.grad(lambda s: (s * flashcore.attention(q, k, v)).sum())(torch.ones(()))


def test_transformed_features(opaque):
    q, k, v = inputs()
    slopes, sinks = torch.rand(4), torch.randn(3, 4)
    tensors = [q.requires_grad_(), sinks[0].clone().requires_grad_()]
    expected = torch.autograd.grad(featured(tensors[0], k, v, slopes, tensors[1], backend="reference").sum(), tensors)

    def loss(q, sink, backend="auto"):
        return featured(q, k, v, slopes, sink, backend).sum()

    with pytest.raises(UnsupportedError, match=r'cannot be transformed .* Pass backend="reference"'):
        torch.func.grad(loss)(q.detach(), sinks[0])
    by_reference = partial(loss, backend="reference")
    found = torch.func.grad(by_reference, argnums=(0, 1))(q.detach(), sinks[0])
    torch.testing.assert_close(found, expected)
    one_by_one = torch.stack([by_reference(q.detach(), sink) for sink in sinks])
    torch.testing.assert_close(torch.func.vmap(by_reference, (None, 0))(q.detach(), sinks), one_by_one)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(sinks[0], torch.ones(4))
        tangent = forward_ad.unpack_dual(by_reference(q.detach(), dual)).tangent
    torch.testing.assert_close(tangent, expected[1].sum())


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_transformed_lse(backend):
    q, k, v = inputs(17, 23)

    def loss(q):
        out, lse = flashcore.attention(q, k, v, return_lse=True, backend=backend)
        return out.square().sum() + lse.square().sum()

    found = torch.func.grad(loss)(q)
    torch.testing.assert_close(found, torch.autograd.grad(loss(q.requires_grad_()), q)[0])
    assert not torch.allclose(found, torch.autograd.grad(flashcore.attention(q, k, v).square().sum(), q)[0])


def test_transforms_under_autocast():
    q, k, v = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = torch.func.vmap(lambda q: flashcore.attention(q, k, v))(torch.stack((q, q)))
    assert out.dtype == torch.bfloat16


def test_transformed_products():
    a, b, biases = torch.randn(5, 7), torch.randn(7, 6), torch.randn(3, 6)
    rows = torch.func.vmap(lambda bias: flashcore.matmul(a, b, bias=bias))(biases)
    torch.testing.assert_close(rows, a @ b + biases[:, None])
    grad = torch.func.grad(lambda a: flashcore.matmul(a, b, activation="silu").sum())(a)
    torch.testing.assert_close(grad, torch.func.grad(lambda a: F.silu(a @ b).sum())(a))
    weight = torch.randn(6, 7, requires_grad=True)
    sums = torch.func.vmap(lambda s: (flashcore.linear(a, weight) * s).sum())(torch.arange(2.0))
    torch.testing.assert_close(sums[1], F.linear(a, weight).sum())


@pytest.mark.parametrize("recorded", [False, True])
def test_products_under_autocast(recorded):
    """As PyTorch's: the operands are cast first."""
    a, b = torch.randn(5, 7), torch.randn(7, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if recorded:
            with FlopCounterMode(display=False):
                out, wide = flashcore.matmul(a, b), flashcore.matmul(a, b, out_dtype=torch.float32)
        else:
            out, wide = flashcore.matmul(a, b), flashcore.matmul(a, b, out_dtype=torch.float32)
        assert torch.equal(out, torch.matmul(a, b))
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide, a.bfloat16().float() @ b.bfloat16().float())


def test_tangents_are_not_lost(opaque):
    q, k, v = inputs()
    with forward_ad.dual_level():
        flashcore.attention(q, k, v)  # has none
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(UnsupportedError, match="forward-mode"):
            flashcore.attention(dual, k, v)
        out = flashcore.attention(dual, k, v, backend="reference")
        assert forward_ad.unpack_dual(out).tangent.abs().sum() > 0


@pytest.mark.gpu
@JIT
@pytest.mark.parametrize("seqlen_q", [1, 70])
@pytest.mark.parametrize("record", ["jit", "make_fx"])
def test_recorded_on_a_gpu(record, seqlen_q):
    def program(q, k, v):
        return flashcore.attention(q[:, -seqlen_q:], k, v, causal=True) + 1

    example, others = torch.randn(2, 3, 2, 70, 4, 64, device="cuda", dtype=torch.bfloat16)
    recorded = torch.jit.trace(program, tuple(example)) if record == "jit" else make_fx(program)(*example)
    torch.testing.assert_close(recorded(*others), program(*others))
