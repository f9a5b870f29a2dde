"""Inputs that kernels, autograd and other programs' use of a GPU get wrong."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import flashcore
from flashcore.backends import hopper
from flashcore.errors import UnsupportedError
from tests.tolerance import assert_forward, assert_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::flashcore.errors.FlashCoreWarning")]

BACKENDS = ["auto", "triton"]
HOPPER = pytest.param(
    "hopper",
    marks=pytest.mark.skipif(torch.cuda.is_available() and hopper.unavailable() is not None, reason="no Hopper GPU"),
)


def inputs(seqlen=70, requires_grad=True):
    shapes = (2, seqlen, 4, 64), (2, seqlen, 2, 64), (2, seqlen, 2, 64)
    options = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": requires_grad}
    return [torch.randn(shape, **options) for shape in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", [torch.sum, lambda out: out.square().sum()])
def test_second_derivative_is_refused(backend, loss):
    q, k, v = inputs()
    with pytest.raises(UnsupportedError, match="second derivatives"):
        torch.autograd.grad(loss(flashcore.attention(q, k, v, backend=backend)), q, create_graph=True)


def test_second_derivative_of_a_product():
    options = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    x, weight = torch.randn(64, 128, **options), torch.randn(72, 128, **options)

    def penalty(linear):
        (grad,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().mean(), (x, weight))

    for found, expected in zip(penalty(flashcore.linear), penalty(F.linear), strict=True):
        assert found.any()
        torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2 * expected.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_batched_output_gradients(backend):
    q, k, v = inputs()
    out = flashcore.attention(q, k, v, causal=True, backend=backend)
    douts = torch.randn(3, *out.shape, device="cuda", dtype=out.dtype)
    batched = torch.autograd.grad(out, (q, k, v), douts, is_grads_batched=True, retain_graph=True)
    for i, dout in enumerate(douts):
        grads = tuple(grad[i] for grad in batched)
        assert_gradients(grads, q.detach(), k.detach(), v.detach(), dout, causal=True)


def test_vectorized_jacobian():
    q, k, v = (t[:1, :2, :2] for t in inputs(requires_grad=False))
    attend = partial(flashcore.attention, scale=0.3)
    jacobians = [torch.autograd.functional.jacobian(attend, (q, k, v), vectorize=yes) for yes in (False, True)]
    torch.testing.assert_close(*jacobians, rtol=2e-2, atol=1e-3)
    assert jacobians[0][0].any()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("forward", BACKENDS)
def test_compiled_autograd_over_an_eager_forward(backend, forward):
    q, k, v = inputs()
    out = flashcore.attention(q, k, v, causal=True, backend=forward)
    dout = torch.randn_like(out)
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(partial(torch.compile, backend=backend, fullgraph=True)):
        out.backward(dout)
    assert_gradients((q.grad, k.grad, v.grad), q.detach(), k.detach(), v.detach(), dout, causal=True)


def test_gradients_of_rows_far_apart():
    """The last row of a tile of 64 lies 2^31 elements behind its first one, in what is read and in what is written."""
    heads, last = 2**25 // 128 + 8192, slice(-4, None)
    assert heads * 128 * 63 >= 2**31
    tensors = [torch.randn(1, 64, heads, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    for tensor in tensors:
        tensor.requires_grad_()
    out, lse = flashcore.attention(*tensors, causal=True, return_lse=True, backend="triton")
    out.backward(out.new_ones(()).expand_as(out))
    q, k, v = (t.detach()[:, :, last] for t in tensors)
    assert_forward(out.detach()[:, :, last].contiguous(), lse[:, last].contiguous(), q, k, v, causal=True)
    grads = tuple(t.grad[:, :, last] for t in tensors)
    assert_gradients(grads, q, k, v, torch.ones_like(q), causal=True)


@pytest.mark.parametrize("backend", ["auto", HOPPER, "triton", "sdpa", "reference"])
@pytest.mark.parametrize("lengths", [(1, 2**31), (2**31, 1), (2**31, 2**31)])
def test_lengths_that_do_not_fit_32_bits_are_refused(backend, lengths):
    q, k = (torch.zeros(1, device="cuda", dtype=torch.bfloat16).expand(1, length, 1, 64) for length in lengths)
    with pytest.raises(UnsupportedError, match=rf"seqlen {2**31} > "):
        flashcore.attention(q, k, k, backend=backend)


@pytest.mark.parametrize("backend", [HOPPER, "triton"])
@pytest.mark.parametrize("seqlen_q", [256, 1])
def test_scores_beyond_two_to_the_31(backend, seqlen_q):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 256, 4, 64, generator=generator) * 3e4 for _ in range(2))
    v = torch.randn(1, 256, 4, 64, generator=generator)
    q, k, v = (t.bfloat16().cuda() for t in (q[:, :seqlen_q], k, v))
    out, lse = flashcore.attention(q, k, v, return_lse=True, backend=backend)
    assert lse.isfinite().all()
    assert_forward(out, lse, q, k, v, causal=False)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_goes_where_tensor_cores_are(precision):
    q, k, v = (t.float() for t in inputs(512, requires_grad=False))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert flashcore.explain(q, k, v, causal=True).backend == "sdpa"
        if precision == "highest":
            assert_forward(flashcore.attention(q, k, v, causal=True), None, q, k, v, causal=True)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("causal", [False, True])
def test_the_lse_of_pytorch_costs_no_second_attention(causal):
    q, k, v = inputs(512, requires_grad=False)
    flashcore.attention(q, k, v, causal=causal, return_lse=True, backend="sdpa")
    with torch.profiler.profile() as profile:
        out, lse = flashcore.attention(q, k, v, causal=causal, return_lse=True, backend="sdpa")
    called = {event.key for event in profile.key_averages()}
    assert "aten::logsumexp" not in called
    assert "aten::_scaled_dot_product_flash_attention" in called
    assert_forward(out, lse, q, k, v, causal=causal)


def test_a_hopper_machine_without_nvrtc_is_told_so_for_products_and_attention():
    """Other GPUs have no kernel of ours to miss."""
    code = """
import sys, warnings, torch
sys.modules["cuda.bindings.nvrtc"] = None
import flashcore
q = torch.randn(1, 512, 8, 64, device="cuda", dtype=torch.bfloat16)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    out = flashcore.attention(q, q, q)
    product = flashcore.matmul(q[0, :, 0], q[0, :, 0].t())
assert out.isfinite().all() and product.isfinite().all()
told = {str(one.message).partition(":")[0] for one in caught if one.category is flashcore.FlashCoreWarning}
print(sorted(told), torch.cuda.get_device_capability() == (9, 0))
"""
    assert run(code) in ("['attention', 'matmul'] True", "[] False")


def run(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


def test_the_interpreter_of_triton_gets_no_call():
    """Somebody debugs a kernel of their own."""
    code = """
import torch, flashcore
q, k, v = torch.randn(3, 2, 130, 4, 64, device="cuda", dtype=torch.bfloat16).unbind()
q.requires_grad_()
plan = flashcore.explain(q, k, v, causal=True)
out = flashcore.attention(q, k, v, causal=True)
(grad,) = torch.autograd.grad(out.sum(), q)
expected = flashcore.attention(q, k, v, causal=True, backend="reference")
torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
torch.testing.assert_close(grad, *torch.autograd.grad(expected.sum(), q), rtol=5e-2, atol=5e-2)
print("triton" in (plan.backend, plan.backward.backend))
"""
    assert run(code, TRITON_INTERPRET="1") == "False"


def test_workers_of_a_parent_that_used_the_gpu():
    """They are forked, so that none may touch CUDA; their calls are on CPU tensors."""
    code = """
import torch, flashcore

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        q = torch.randn(1, 20, 2, 16, requires_grad=True)
        flashcore.attention(q, q, q, causal=True).sum().backward()
        flashcore.linear(q, q[0, :, 0]).sum().backward()
        return q.grad[0]

q = torch.randn(1, 64, 2, 64, device="cuda", dtype=torch.bfloat16)
flashcore.attention(q, q, q)
loader = torch.utils.data.DataLoader(Data(), num_workers=2, multiprocessing_context="fork")
print(sum(batch.isfinite().all().item() for batch in loader))
"""
    assert run(code) == "4"
