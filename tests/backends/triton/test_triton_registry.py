"""PyTorch's packed attention by Triton's kernels, behind its registry: they get an LSE as PyTorch has it."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch

from flashcore.integrations import torch_registry
from flashcore.plan import override
from tests.backends.triton.conftest import INTERPRET
from tests.packed import BY_NAME, assert_packed_forward, assert_packed_gradients

varlen = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no registry")
AuxRequest, varlen_attn = varlen.AuxRequest, varlen.varlen_attn

CAUSAL = {"window_size": (-1, 0)} if "window_size" in inspect.signature(varlen_attn).parameters else {"is_causal": True}

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of hidden infinities


@pytest.fixture(autouse=True)
def _active(monkeypatch):
    library = torch.library.Library("aten", "IMPL")
    if INTERPRET:  # for want of PyTorch's own on a CPU

        def missing(*_, **__):
            raise AssertionError("FlashCore's kernels take it")

        for name in torch_registry._OPERATORS:
            library.impl(name, missing, "CPU")
        monkeypatch.setattr(torch_registry, "_KEY", "CPU")
    torch_registry.register()
    torch.nn.attention.activate_flash_attention_impl("flashcore")
    yield
    torch.nn.attention._registry.restore_flash_attention_impl()
    library._destroy()


@pytest.mark.parametrize("name", ["edges_other_keys_causal", "many_short"])
def test_rows_without_keys(name, device):
    case = replace(BY_NAME[name], heads_q=2, heads_k=2)
    q, k, v = (t.detach().requires_grad_() for t in case.inputs(device))
    queries, keys = case.packed(device).values()
    arguments = q, k, v, queries.offsets, keys.offsets, queries.longest, keys.longest
    with override(backend="triton", backward="triton"):
        out, lse = varlen_attn(*arguments, **CAUSAL, return_aux=AuxRequest(lse=True))
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        grads = torch.autograd.grad(out, (q, k, v), dout)
    assert lse.isposinf().any() == (name == "edges_other_keys_causal")
    lse = torch.where(lse.isposinf(), -torch.inf, lse)
    assert_packed_forward(case, out.detach(), lse, q.detach(), k.detach(), v.detach())
    assert_packed_gradients(case, grads, q.detach(), k.detach(), v.detach(), dout)
