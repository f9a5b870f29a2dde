"""The rule that all results are held to can fail, and for the right reasons."""

import pytest
import torch

from tests.cases import BY_NAME
from tests.tolerance import assert_forward, assert_gradients, attention_math

CASE = BY_NAME["causal_empty_rows"]


@pytest.fixture(params=["bfloat16", "float16", "float32"])
def right(request):
    """q, k, v with an output and an LSE that pass."""
    q, k, v = (t.to(getattr(torch, request.param)) for t in CASE.inputs())
    out, lse = attention_math(q, k, v, causal=True, scale=None, dtype=torch.float64)
    return q, k, v, out.to(q.dtype).contiguous(), lse.float().contiguous()


def refuse(q, k, v, out, lse, message, **options):
    with pytest.raises(AssertionError, match=message):
        assert_forward(out, lse, q, k, v, **{"causal": True, **options})


def test_right_passes(right):
    q, k, v, out, lse = right
    assert_forward(out, lse, q, k, v, causal=True)


def test_textbook_is_attention():
    """The truth itself, against PyTorch's own, where that is defined the same way."""
    q, k, v = (t.double() for t in BY_NAME["causal_129"].inputs())
    out, lse = attention_math(q, k, v, causal=True, scale=None)
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    assert torch.allclose(lse[:, :, 0], (q[:, 0] * k[:, 0]).sum(-1) / 8)


def test_one_wrong_element_fails(right):
    q, k, v, out, lse = right
    roundings = 64 if out.dtype is torch.float32 else 4
    out[1, -1, 2, 3] += roundings * torch.finfo(out.dtype).eps * out.abs().max()
    refuse(q, k, v, out, lse, "out: error .* allowed")


def test_wrong_mask_fails(right):
    q, k, v, out, lse = right
    refuse(q, k, v, out, lse, "NaN|-inf|error", causal=False)


def test_wrong_scale_fails(right):
    q, k, v, out, lse = right
    refuse(q, k, v, out, lse, "error", scale=0.13)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_special_values_fail(right, bad):
    q, k, v, out, lse = right
    out[0, -1, 0, 0] = bad
    refuse(q, k, v, out, lse, r"out: .* in the wrong places: 1 of .* the first at \(0, 192, 0, 0\)")


def test_wrong_lse_fails(right):
    q, k, v, out, lse = right
    refuse(q, k, v, out, lse * 1.0001, "lse: error")
    refuse(q, k, v, out, torch.where(lse.isneginf(), 0, lse), "lse: -inf in the wrong places")
    refuse(q, k, v, out, lse.double(), "lse is torch.float64")
    refuse(q, k, v, out, lse.transpose(1, 2).contiguous().transpose(1, 2), "lse has strides")


def test_wrong_kind_of_output_fails(right):
    q, k, v, out, lse = right
    refuse(q, k, v, out.double(), lse, "out is torch.float64")
    refuse(q, k, v, out[:, 1:].contiguous(), lse, "out has shape")
    refuse(q, k, v, out.transpose(1, 2).contiguous().transpose(1, 2), lse, "out has strides")


def test_gradients_can_fail():
    q, k, v = (t.requires_grad_() for t in BY_NAME["causal_65"].inputs())
    out, _ = attention_math(q, k, v, causal=True, scale=None)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    assert_gradients(grads, q, k, v, dout, causal=True)
    for index, name in enumerate(("dq", "dk", "dv")):
        wrong = list(grads)
        wrong[index] = wrong[index] * 1.1
        with pytest.raises(AssertionError, match=f"{name}: error"):
            assert_gradients(wrong, q, k, v, dout, causal=True)
