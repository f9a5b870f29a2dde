"""Packed sequences on the Triton kernels, forward and backward, with the chosen tiles and with others."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import flashcore
from flashcore import api, backends
from flashcore.backends.triton import backward as triton_backward
from flashcore.plan import override
from tests.backends.triton.test_triton_attention import APART, PLAIN, SMALL, SMALL_AHEAD
from tests.packed import BY_NAME, PACKED_CASES, PackedCase, assert_packed_forward, assert_packed_gradients
from tests.poison import poisoned_outputs

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of hidden infinities

REFUSED = {"d320", "float64"}
RUNNABLE = [case for case in PACKED_CASES if case.name not in REFUSED and not case.problem().is_empty]
CONFIGS = {"small": SMALL, "ahead": SMALL_AHEAD, "plain": PLAIN, "apart": APART, "chosen": None}
# Each case with two of the configs, each config with many cases.
PAIRS = [
    pytest.param(case, name, id=f"{case}-{name}")
    for case, names in zip(RUNNABLE, itertools.cycle(itertools.combinations(CONFIGS, 2)), strict=False)
    for name in names
    if (case.name, name) != ("d256", "plain")  # more shared memory than a GPU has
]


def call(case: PackedCase, config, device: str):
    """q, k, v, out, lse, dout and the gradients, by the public call."""
    q, k, v = (t.detach().requires_grad_() for t in case.inputs(device))
    options = case.options(device)
    leaves = [q, k, v]
    if options["sink"] is not None:
        leaves.append(options["sink"].requires_grad_())
    with override(config=config), poisoned_outputs():
        out, lse = flashcore.attention(q, k, v, **options, **case.packed(device), return_lse=True, backend="triton")
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        grads = torch.autograd.grad(out, leaves, dout)
    return q, k, v, out.detach(), lse, dout, grads


@pytest.mark.parametrize(("case", "config"), PAIRS)
def test_forward_and_backward(case, config, device):
    q, k, v, out, lse, dout, grads = call(case, CONFIGS[config], device)
    assert_packed_forward(case, out, lse, q, k, v)
    assert_packed_gradients(case, grads, q, k, v, dout)


def test_what_is_left_out_is_refused(device):
    for case in PACKED_CASES:
        if not case.problem(device).is_empty:
            refusal = backends.ATTENTION.refusal("triton", case.problem(device))
            assert (refusal is not None) == (case.name in REFUSED), case


@pytest.mark.parametrize("pack_gqa", [False, True])
@pytest.mark.parametrize("name", ["few_queries_each", "sink_one_query_each", "random_1", "rows_around"])
def test_splits(name, pack_gqa, device):
    """Their number is for the longest: others have empty ones. Sinks join once, and only where there is a row."""
    case = BY_NAME[name]
    q, k, v = case.inputs(device)
    call = {**case.options(device), **case.packed(device), "return_lse": True, "backend": "triton"}
    with override(config=replace(SMALL, splits=3, pack_gqa=pack_gqa)), poisoned_outputs():
        out, lse = flashcore.attention(q, k, v, **call)
    assert_packed_forward(case, out, lse, q, k, v)


@pytest.mark.parametrize("factor", [1, 3e4])
@pytest.mark.parametrize("config", [SMALL, APART], ids=["small", "apart"])
def test_each_sequence_is_what_it_is_alone(config, factor, device):
    """Bit for bit, huge scores included, forward and backward."""
    case = PackedCase("", (65, 0, 33, 1), (70, 5, 64, 33), causal=True, before=3, after=9, more=100)
    q, k, v = ((t * factor).detach().requires_grad_() if i < 2 else t.requires_grad_()
               for i, t in enumerate(case.inputs(device)))  # fmt: skip
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q)
    call = {"causal": True, "return_lse": True, "backend": "triton"}
    with override(config=config):
        out, lse = flashcore.attention(q, k, v, **case.packed(device), **call)
        grads = torch.autograd.grad(out, (q, k, v), dout)
        for rows, rows_k in zip(case.places(case.lengths_q), case.places(case.keys), strict=True):
            alone = [t[None, at].detach().requires_grad_() for t, at in ((q, rows), (k, rows_k), (v, rows_k))]
            expected, expected_lse = flashcore.attention(*alone, **call)
            expected_grads = torch.autograd.grad(expected, alone, dout[None, rows])
            assert torch.equal(out[rows], expected[0])
            assert torch.equal(lse[:, rows], expected_lse[0])
            for grad, at, right in zip(grads, (rows, rows_k, rows_k), expected_grads, strict=True):
                assert torch.equal(grad[at], right[0])


def test_a_gradient_of_the_lse(device):
    case = BY_NAME["rows_around"]
    q, k, v = case.inputs(device)
    packed = tuple(case.packed(device).values())
    spec, extras, _ = api._specs(None, None, *packed)
    problem = api._problem(q, k, v, extras, True, None, None, spec, packed, True)
    out, lse = flashcore.attention(
        q, k, v, causal=True, **case.packed(device), return_lse=True, backend="triton"
    )
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    grads = triton_backward.prepare(problem, SMALL)(q, k, v, out, lse, dout, dlse, None, *extras)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    exact, exact_lse = case.math(*leaves)
    owned = exact_lse.isfinite()
    loss = (exact * dout.double()).sum() + (exact_lse[owned] * dlse.double()[owned]).sum()
    for grad, right in zip(grads, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(grad.double(), right, rtol=0.05, atol=0.05)


def test_lengths_that_change_in_place(device, monkeypatch):
    """As a captured graph replays a launch: the same plan, forward and backward."""
    before = PackedCase("", (30, 0, 50, 1), (20, 40, 33, 3), causal=True, more=30)
    after = PackedCase("", (1, 60, 17, 3), (70, 1, 0, 25), causal=True)
    packed = before.packed(device)
    with override(config=SMALL):
        for case in (before, after):
            for name, rows in case.packed(device).items():
                packed[name].offsets.copy_(rows.offsets)
            q, k, v = (t.detach().requires_grad_() for t in case.inputs(device))
            out, lse = flashcore.attention(q, k, v, causal=True, return_lse=True, backend="triton", **packed)
            dout = torch.randn_like(out)
            assert_packed_forward(case, out.detach(), lse, q, k, v)
            assert_packed_gradients(case, torch.autograd.grad(out, (q, k, v), dout), q, k, v, dout)
            monkeypatch.setattr(api, "_problem", None)  # nobody describes the second call
