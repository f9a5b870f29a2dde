"""How problems are put to PyTorch's SDPA. That the answers are right is shown by the cases."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flashcore
from flashcore.backends import sdpa
from flashcore.mask import CAUSAL
from tests.cases import BY_NAME, VALUES, Case
from tests.tolerance import assert_forward, assert_gradients

GROUPED = replace(Case("", heads_q=8, heads_k=2).problem(), device="cuda", arch=(9, 0), sm_count=132)


@pytest.fixture
def calls(monkeypatch):
    """What reaches PyTorch's scaled_dot_product_attention, or its CPU kernel."""
    seen = []

    def record(original, q, k, v, **options):
        seen.append({"q": q, "k": k, "v": v, **options})
        return original(q, k, v, **options)

    for name in ("scaled_dot_product_attention", "_cpu_kernel"):
        monkeypatch.setattr(sdpa, name, partial(record, getattr(sdpa, name)))
    return seen


def attention(case: Case) -> torch.Tensor:
    return flashcore.attention(*case.inputs(), causal=case.causal, scale=case.scale, backend="sdpa")


@pytest.mark.parametrize(
    ("change", "expand"),
    [
        ({}, False),
        ({"heads_q": 2}, False),
        ({"mask": CAUSAL}, False),
        ({"mask": CAUSAL, "seqlen_q": 256}, False),  # more queries than keys: a square problem and zeros
        ({"mask": CAUSAL, "seqlen_q": 1}, False),
        ({"mask": CAUSAL, "seqlen_q": 64}, True),
        ({"dtype": "float32"}, True),
        ({"head_dim_v": 32}, True),
        ({"head_dim": 512, "head_dim_v": 512}, True),
        ({"arch": (7, 5)}, True),
        ({"device": "cpu", "arch": None, "mask": CAUSAL, "seqlen_q": 64}, torch.__version__ < (2, 9)),
        ({"device": "cpu", "arch": None, "head_dim_v": 32}, True),
    ],
)
def test_grouped_heads_never_reach_the_unfused_path(change, expand):
    config = sdpa.configure(replace(GROUPED, **change))
    assert config.expand_heads == expand
    assert config.why
    assert str(config) == f"SdpaConfig(expand_heads={expand})"


def test_no_mask_where_none_is_needed(calls):
    for name in (
        "causal_128",
        "causal_empty_rows",
        "causal_empty_tiles",
        "causal_one_query",
        "full_64x193",
    ):
        attention(BY_NAME[name] if name in BY_NAME else Case(name, seqlen_q=64, seqlen_k=193))
    assert len(calls) == 5
    assert not any("attn_mask" in call for call in calls)


def test_masks_stay_small(calls, monkeypatch):
    monkeypatch.setattr(sdpa, "CHUNK_MASK", 257 * 10)
    case = BY_NAME["causal_more_keys"]
    q, k, v = case.inputs()
    out = attention(case)
    assert_forward(out, None, q, k, v, causal=True)
    assert len(calls) == 7
    assert all(call["attn_mask"].numel() <= 257 * 10 for call in calls)


def test_inputs_are_views_unless_the_last_dimension_is_strided(calls):
    for layout in ("packed", "bhsd", "offset", "expanded"):
        calls.clear()
        inputs = Case("", layout=layout).inputs()
        flashcore.attention(*inputs, backend="sdpa")
        assert [calls[0][name].data_ptr() for name in "qkv"] == [t.data_ptr() for t in inputs]
    attention(Case("", layout="last_strided"))
    assert all(calls[-1][name].stride(-1) == 1 for name in "qkv")


def test_scale_is_positive_when_it_reaches_sdpa(calls):
    """PyTorch's CPU kernel answers NaN to a causal problem whose scale is not."""
    for scale in (-0.25, 0.0, 0.25):
        attention(Case("", causal=True, scale=scale))
    assert all(call["scale"] > 0 for call in calls)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"mask": CAUSAL, "seqlen_q": 256}, None),
        ({"head_dim": 80, "head_dim_v": 80}, None),
        ({"head_dim": 264, "head_dim_v": 264}, None),
        ({"head_dim_v": 32}, None),
        ({"dtype": "float32"}, None),
        ({"dtype": "float32", "arch": (7, 5)}, None),
        ({"dtype": "float32", "head_dim": 36, "head_dim_v": 36}, None),
        ({"mask": CAUSAL, "seqlen_q": 64}, "a mask that is not its own"),
        ({"head_dim": 36, "head_dim_v": 36}, "head_dim 36, not a multiple of 8"),
        ({"head_dim_v": 36}, "head_dim_v 36, not a multiple of 8"),
        ({"dtype": "float32", "head_dim": 37, "head_dim_v": 37}, "head_dim 37, not a multiple of 4"),
        ({"dtype": "float64"}, "dtype float64"),
        ({"device": "cpu", "arch": None}, None),
        ({"device": "cpu", "arch": None, "dtype": "float64", "mask": CAUSAL, "seqlen_q": 64}, None),
        ({"device": "cpu", "arch": None, "seqlen_k": 3}, None),
        ({"device": "cpu", "arch": None, "head_dim_v": 32}, "head_dim_v 32 != head_dim 64"),
    ],
)
def test_where_pytorch_gives_the_lse(change, reason):
    problem = replace(GROUPED, **change)
    assert sdpa.rejects(problem) is None
    expected = reason and f"return_lse=True with {reason}: PyTorch gives the LSE by its fused kernels alone"
    assert sdpa.rejects(replace(problem, return_lse=True)) == expected


def test_amd_gives_no_lse(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "return_lse=True with an AMD GPU" in sdpa.rejects(replace(GROUPED, return_lse=True))


def test_the_lse_costs_no_second_attention():
    """On a CPU it comes from the kernel that computes the output; the reference holds every score."""
    with torch.profiler.profile() as profile:
        flashcore.attention(*Case("", dtype="float32").inputs(), causal=True, return_lse=True)
    operators = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in operators
    assert "aten::logsumexp" not in operators


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize(
    "change", [{}, {"heads_k": 1}, {"causal": True}, {"causal": True, "seqlen_q": 65}, {"causal": True, "seqlen_k": 65}]
)
def test_lse_and_the_gradients_beside_it(change, dtype):
    case = replace(Case("", batch=1, heads_q=2, heads_k=2, dtype=dtype), **change)
    q, k, v = (t.requires_grad_() for t in case.inputs())
    out, lse = flashcore.attention(q, k, v, causal=case.causal, return_lse=True, backend="sdpa")
    assert_forward(out.detach(), lse.detach(), q, k, v, causal=case.causal)
    dout = torch.randn_like(out)
    assert_gradients(torch.autograd.grad(out, (q, k, v), dout), q, k, v, dout, causal=case.causal)


def test_lse_of_masks_in_chunks(monkeypatch):
    monkeypatch.setattr(sdpa, "CHUNK_MASK", 257 * 10)
    q, k, v = BY_NAME["causal_more_keys"].inputs()
    out, lse = flashcore.attention(q, k, v, causal=True, return_lse=True, backend="sdpa")
    assert_forward(out, lse, q, k, v, causal=True)


def test_lse_of_zero_and_of_nothing_to_see():
    """PyTorch's CPU kernel gives 0 for both: one key with a score of 0, and scores that are all -inf."""
    q, k, v = torch.ones(1, 20, 2, 8), torch.randn(1, 20, 1, 8), torch.randn(1, 20, 1, 8)
    k[:, 0] = 0
    out, lse = flashcore.attention(q, k, v, causal=True, return_lse=True, backend="sdpa")
    assert_forward(out, lse, q, k, v, causal=True)
    assert not lse[..., 0].any()
    k[:] = -torch.inf
    q[:, :, 1] = -torch.inf
    out, lse = flashcore.attention(q, k, v, return_lse=True, backend="sdpa")
    assert not out[:, :, 0].any()
    assert lse[:, 0].isneginf().all()
    assert out[:, :, 1].isnan().all()


def test_lse_of_windows_with_nothing_to_see():
    """Each row is judged by the first key of its own window."""
    q, k, v = torch.ones(1, 40, 2, 8), torch.zeros(1, 40, 1, 8), torch.randn(1, 40, 1, 8)
    k[:, :20] = -torch.inf
    options = {"causal": True, "window": (0, 0), "return_lse": True}
    out, lse = flashcore.attention(q, k, v, backend="sdpa", **options)
    right, right_lse = flashcore.attention(q, k, v, backend="reference", **options)
    torch.testing.assert_close((out, lse), (right, right_lse))
    assert lse[..., :20].isneginf().all()
    assert not lse[..., 20:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lse_of_scores_of_minus_infinity_on_a_gpu(dtype):
    q, k, v = (torch.randn(1, 128, 2, 64, device="cuda", dtype=dtype).abs() for _ in range(3))
    k[:, :, 0] = -torch.inf
    k[:, 0, 1] = torch.nan
    out, lse = flashcore.attention(q, k, v, return_lse=True, backend="sdpa")
    assert lse[:, 1].isnan().all()
    assert out[:, :, 1].isnan().all()
    # PyTorch's flash kernel gives 0, its kernel for float32 NaN, as a softmax of -inf alone does: the LSE tells which.
    nothing = out[:, :, 0].isnan().all() if dtype is torch.float32 else not out[:, :, 0].any()
    assert nothing
    assert (lse[:, 0].isnan() if dtype is torch.float32 else lse[:, 0].isneginf()).all()


# ---- what PyTorch's CPU kernel gets wrong ------------------------------------------------------------------------

SPECIAL = {
    "nan_query": lambda q, k: q[:, 1].fill_(torch.nan),
    "nan_in_a_query": lambda q, k: q[:, 1, :, 3].fill_(torch.nan),
    "inf_in_a_query": lambda q, k: q[:, 1, :, 3].fill_(torch.inf),
    "minus_inf_in_a_query": lambda q, k: q[:, 1, :, 3].fill_(-torch.inf),
    "nan_keys": lambda q, k: k.fill_(torch.nan),
    "nan_in_the_first_key": lambda q, k: k[:, 0].fill_(torch.nan),
    "inf_in_a_key": lambda q, k: k[:, 0, :, 3].fill_(torch.inf),
    "scores_of_minus_inf": lambda q, k: (q.abs_(), k.fill_(-torch.inf)),
    "scores_of_inf": lambda q, k: (q.abs_(), k.fill_(torch.inf)),
}


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("special", SPECIAL)
def test_what_is_not_finite_is_not_lost(special, dtype, return_lse):
    """The NaN, and the zeros, of the reference: with few keys, with whole vectors of keys, with more than a block."""
    for seqlen_q, seqlen_k, causal in (
        *((3, seqlen_k, False) for seqlen_k in (1, 2, 7, 8, 9, 15, 16, 17, 32, 33, 513)),
        *((3, seqlen_k, True) for seqlen_k in (2, 3, 5, 16, 17, 32)), (20, 16, True), (16, 16, True),
    ):  # fmt: skip
        case = Case("", seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads_k=2, head_dim=8, dtype=dtype)
        q, k, v = (t.clone() for t in case.inputs())
        SPECIAL[special](q, k)
        options = {"causal": causal, "return_lse": return_lse}
        result, expected = (flashcore.attention(q, k, v, backend=name, **options) for name in ("sdpa", "reference"))
        out, right = (r[0] if return_lse else r for r in (result, expected))
        torch.testing.assert_close(out, right, rtol=0.05, atol=0.05, equal_nan=True)
        if return_lse:  # of what is NaN it may be NaN or inf
            lse, right_lse = (torch.where(r[1].isposinf(), torch.nan, r[1]) for r in (result, expected))
            torch.testing.assert_close(lse, right_lse, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("options", [{"causal": True}, {"window": (3, 2)}, {"causal": True, "window": (18, 0)}])
def test_hidden_keys_do_not_matter(options, value, dtype):
    q, k, v = (t.clone() for t in Case("", seqlen_q=20, seqlen_k=40, head_dim=8, dtype=dtype).inputs())
    expected = flashcore.attention(q, k, v, return_lse=True, backend="sdpa", **options)
    k[:, -5:] = value
    out, lse = flashcore.attention(q, k, v, return_lse=True, backend="sdpa", **options)
    torch.testing.assert_close(out[:, :13], expected[0][:, :13], rtol=0.02, atol=0.02)
    torch.testing.assert_close(lse[:, :, :13], expected[1][:, :, :13])


def test_infinite_scores_of_finite_inputs():
    q, k, v = (t.abs() for t in Case("", seqlen_q=3, seqlen_k=32, head_dim=8).inputs())
    assert flashcore.attention(q * 1e30, k * 1e30, v, backend="sdpa").isnan().all()


@pytest.mark.parametrize(("dtype", "apart"), [(torch.bfloat16, 0.05), (torch.float32, 1e-5)])
@pytest.mark.parametrize("return_lse", [False, True])
def test_rows_that_overlap(dtype, apart, return_lse):
    """Any of q, k, v may be a window that slides over memory, in any of its dimensions."""

    def attend(inputs):
        inputs = [t.detach().requires_grad_() for t in inputs]
        out = flashcore.attention(*inputs, causal=True, return_lse=return_lse, backend="sdpa")
        out, lse = out if return_lse else (out, None)
        return out, lse, *torch.autograd.grad(out, inputs, dout)

    memory, dout = torch.randn(400).to(dtype), torch.randn(2, 20, 3, 8).to(dtype)
    for strides, place in itertools.product(itertools.product((0, 1, 8), repeat=3), range(3)):
        inputs = [torch.randn(2, 20, 3, 8).to(dtype) for _ in range(3)]
        inputs[place] = memory.as_strided((2, 20, 3, 8), (*strides, 1))
        copied = [t.contiguous() for t in inputs]
        torch.testing.assert_close(attend(inputs), attend(copied), rtol=apart, atol=apart)


def test_the_sliding_window_of_a_signal():
    q = torch.randn(1, 1, 10).unfold(2, 8, 1).transpose(1, 2)
    assert q.stride() == (10, 1, 10, 1)
    k = torch.randn(1, 20, 1, 8)
    assert_forward(flashcore.attention(q, k, k), None, q, k, k)


sizes = st.integers(1, 20)


@given(
    seqlen_q=sizes,
    seqlen_k=sizes,
    heads_k=st.integers(1, 2),
    group_size=st.integers(1, 3),
    head_dim=st.integers(1, 20),
    causal=st.booleans(),
    dtype=st.sampled_from(["bfloat16", "float16", "float32", "float64"]),
    layout=st.sampled_from(
        ["bshd", "packed", "bhsd", "offset", "misaligned", "odd_row", "last_strided", "expanded"]
    ),
    values=st.sampled_from(sorted(VALUES)),
)
def test_any_shape_and_layout(
    seqlen_q, seqlen_k, heads_k, group_size, head_dim, causal, dtype, layout, values
):
    """sdpa and reference against the textbook, which is against each other."""
    case = Case(
        "", seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads_q=heads_k * group_size, heads_k=heads_k, head_dim=head_dim,
        causal=causal, dtype=dtype, layout=layout, values=values,
    )  # fmt: skip
    q, k, v = case.inputs()
    for backend in ("sdpa", "reference"):
        out = flashcore.attention(q, k, v, causal=causal, backend=backend)
        assert_forward(out, None, q, k, v, causal=causal)


@pytest.mark.parametrize("change", [{}, {"heads_k": 1}, {"causal": True}, {"causal": True, "seqlen_q": 65}])
def test_pytorch_agrees_that_it_is_fused(change):
    """Ask PyTorch which kernel it takes for the (expanded or grouped) heads that the config gives it."""
    case = replace(Case("", heads_q=8, heads_k=2), **change)
    with torch.profiler.profile() as profile:
        attention(case)
    operators = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in operators
    assert "aten::_scaled_dot_product_attention_math" not in operators
