"""What only a GPU can show: other people's interfaces on its kernels, and CUDA graphs of whole layers."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import flashcore
from flashcore.compat.flash_attn import flash_attn_qkvpacked_func
from flashcore.integrations import sdpa
from tests.tolerance import assert_forward, assert_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::flashcore.errors.FlashCoreWarning")]


def inputs(seqlen_q, seqlen_k, heads_k=8, requires_grad=False):
    """(batch, heads, seqlen, head_dim) tensors, as SDPA wants them."""
    shapes = (2, 8, seqlen_q, 64), (2, heads_k, seqlen_k, 64), (2, heads_k, seqlen_k, 64)
    options = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": requires_grad}
    return [torch.randn(shape, **options) for shape in shapes]


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((129, 129), {}),
        ((129, 129), {"is_causal": True}),
        ((65, 200), {"is_causal": True}),
        ((129, 193, 2), {"enable_gqa": True}),
        ((1, 300), {}),
    ],
)
def test_sdpa(shape, options):
    query, key, value = inputs(*shape, requires_grad=True)
    causal = options.get("is_causal", False)
    with sdpa.replace_torch():
        out = F.scaled_dot_product_attention(query, key, value, **options)
    seen = shape[0] if causal else shape[1]
    q, k, v = (t.detach().transpose(1, 2) for t in (query, key[:, :, :seen], value[:, :, :seen]))
    assert_forward(out.detach().transpose(1, 2), None, q, k, v, causal=causal)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (query, key, value), dout)
    grads = [grad[:, :, : t.shape[1]].transpose(1, 2) for grad, t in zip(grads, (q, k, v), strict=True)]
    assert_gradients(grads, q, k, v, dout.transpose(1, 2), causal=causal)


def test_flash_attn_packed():
    qkv = torch.randn(2, 257, 3, 4, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out, lse, _ = flash_attn_qkvpacked_func(qkv, causal=True, return_attn_probs=True)
    q, k, v = qkv.detach().unbind(2)
    assert_forward(out.detach(), lse, q, k, v, causal=True)
    dout = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, qkv, dout)
    assert_gradients(grad.unbind(2), q, k, v, dout, causal=True)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(256, 3 * 256)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 4, 64)).unbind(2)
        return flashcore.attention(q, k, v, causal=True).flatten(2)


def test_graph_of_forward_and_backward():
    """``make_graphed_callables`` captures both; a replay reads the inputs of its own call."""
    torch.manual_seed(0)
    layer = Layer().to("cuda", torch.bfloat16)
    sample = torch.randn(2, 128, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    eager = Layer().to("cuda", torch.bfloat16)
    eager.load_state_dict(layer.state_dict())
    graphed = torch.cuda.make_graphed_callables(layer, (sample,))
    for _ in range(3):
        x = torch.randn_like(sample).requires_grad_()
        out, expected = graphed(x), eager(x)
        torch.testing.assert_close(out, expected)
        dout = torch.randn_like(out)
        (grad,), (expected_grad,) = (torch.autograd.grad(o, x, dout) for o in (out, expected))
        torch.testing.assert_close(grad, expected_grad, rtol=2e-2, atol=2e-2)


CAPTURE = """
import torch, flashcore
q, k, v = (torch.randn(1, 256, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
stream = torch.cuda.Stream()
with torch.cuda.stream(stream):
    flashcore.attention(q, k, v, causal=True)
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out = flashcore.attention(q, k, v, causal=True)
q.normal_()
graph.replay()
assert torch.equal(out, flashcore.attention(q, k, v, causal=True))
print("replayed")
"""


def test_graph_after_a_cold_and_a_warm_start(tmp_path):
    """The second process reads its kernel from the disk cache."""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", CAPTURE],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "FLASHCORE_CACHE_DIR": str(tmp_path)},
        )
        assert done.stdout.strip() == "replayed"
