"""PyTorch for AMD calls its GPUs "cuda", too, and some have a "capability" of (9, 0)."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from flashcore import plan as planning
from flashcore import problem
from flashcore.backends import ATTENTION, hopper, triton
from flashcore.gemm_problem import GemmProblem
from flashcore.mask import CAUSAL
from flashcore.plan import plan
from flashcore.problem import AttentionProblem


@pytest.fixture(autouse=True)
def mi200(monkeypatch):
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=110)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *device: properties)
    cached = hopper.unavailable, triton._no_gpu, problem._gpu, planning._plan
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def arch_and_sms():
    return problem._gpu(torch.device("cuda"))


def test_no_kernel_of_ours_runs_there():
    verdicts = {name: ATTENTION.load(name).unavailable() for name in ATTENTION.providers}
    assert "no CUDA device" in verdicts["hopper"]
    assert verdicts["triton"]
    assert verdicts["sdpa"] is None


@pytest.mark.parametrize("heads_k", [4, 2])
@pytest.mark.parametrize("grad", [False, True])
def test_pytorch_computes_and_nobody_is_warned(grad, heads_k):
    """Nothing that could be installed would make it faster."""
    sizes = (1, 64, 64, 4, heads_k, 64, 64)
    attention = AttentionProblem("bfloat16", "cuda", *arch_and_sms(), *sizes, CAUSAL, 0.1, needs_grad=grad)
    product = GemmProblem("bfloat16", "bfloat16", "cuda", *arch_and_sms(), 1, 8, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan(attention).backend == "sdpa"
        assert plan(product).backend == "torch"
