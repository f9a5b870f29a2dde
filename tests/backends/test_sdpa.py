"""How problems are put to PyTorch's SDPA. That the answers are right is shown by the cases."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flashcore
from flashcore.backends import sdpa
from flashcore.mask import CAUSAL
from flashcore.problem import AttentionProblem
from tests.cases import BY_NAME, VALUES, Case
from tests.tolerance import assert_forward

GROUPED = replace(Case("", heads_q=8, heads_k=2).problem(), device="cuda", arch=(9, 0), sm_count=132)


@pytest.fixture
def calls(monkeypatch):
    """What reaches PyTorch's scaled_dot_product_attention."""
    seen = []
    original = sdpa.scaled_dot_product_attention

    def record(q, k, v, **options):
        seen.append({"q": q, "k": k, "v": v, **options})
        return original(q, k, v, **options)

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", record)
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
        "causal_all_but_one_row_empty",
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


def test_lse_is_rejected():
    q, k, v = Case("").inputs()
    problem = AttentionProblem.from_tensors(q, k, v, return_lse=True)
    assert sdpa.rejects(problem).startswith("return_lse=True")
    assert sdpa.rejects(replace(problem, return_lse=False)) is None


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
