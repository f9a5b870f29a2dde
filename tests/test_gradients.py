"""The borrowed backward passes: on a GPU as they are, elsewhere the signature of PyTorch's and the layouts it gets."""

from dataclasses import replace

import pytest
import torch

import flashcore
from flashcore.backends import torch_flash
from flashcore.plan import override
from tests.cases import BY_NAME, Case
from tests.tolerance import assert_gradients, attention_math

CASE = Case("square", seqlen_q=65, seqlen_k=65, dtype="float32", causal=True)


def run_torch_flash(case: Case, device: str = "cpu"):
    q, k, v = (t.to(device) for t in case.inputs())
    out, lse = attention_math(q, k, v, causal=case.causal, scale=case.scale)
    dout = torch.randn_like(out).to(device)
    grads = torch_flash.backward(case.problem(), None, q, k, v, out, lse, dout, None)
    return grads, q, k, v, dout


@pytest.mark.parametrize("change", [{}, {"heads_k": 1}, {"causal": False, "seqlen_k": 33}])
def test_signature(change):
    """PyTorch's shape function accepts the arguments; it sees what the CUDA kernel will see."""
    grads, q, k, v, _ = run_torch_flash(replace(CASE, **change), "meta")
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "packed", "last_strided", "negated", "expanded"])
@pytest.mark.parametrize("causal", [True, False])
def test_layouts(monkeypatch, layout, causal):
    """The CPU's flash backward, which takes the same (B, H, S, D) tensors, gives the right gradients from them."""

    def on_cpu(dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, seed, offset, *, scale):
        assert (cum_q, cum_k, max_q, max_k) == (None, None, q.shape[2], k.shape[2])
        assert all(t.stride(-1) == 1 for t in (dout, q, k, v, out)), (
            "the kernel demands a contiguous last dimension"
        )
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(dout, q, k, v, out, lse, dropout, causal, scale=scale)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_backward", on_cpu)
    case = Case("", seqlen_q=65, seqlen_k=65, dtype="float32", causal=causal, layout=layout, scale=0.3)
    grads, q, k, v, dout = run_torch_flash(case)
    assert_gradients(grads, q, k, v, dout, causal=causal, scale=0.3)


GPU_CASES = (
    "causal_129", "full_191x127", "gqa_4_to_1", "gqa_4_to_1_causal", "mqa", "causal_d40", "causal_d128",
    "causal_d256", "float16", "packed_causal", "bhsd_causal", "expanded_causal", "last_strided_causal", "scale_one",
    "large_scores_causal", "causal_long",
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("case", [BY_NAME[name] for name in GPU_CASES], ids=str)
@pytest.mark.parametrize("backward", ["torch-flash", "sdpa-recompute"])
def test_borrowed_backward_on_a_gpu(add_backend, case, backward):
    """Fed with the output and LSE of the reference, so that only the backward is in question."""
    add_backend("fake")
    q, k, v = (t.detach().requires_grad_() for t in case.inputs("cuda"))
    with override(backward=backward):
        out = flashcore.attention(q, k, v, causal=case.causal, scale=case.scale)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    assert_gradients(grads, q, k, v, dout, causal=case.causal, scale=case.scale)
