"""The decoding kernel on a Hopper GPU, beyond the named cases of tests/backends."""

import dataclasses
import threading
import warnings

import pytest
import torch

import flashcore
from flashcore.backends import hopper
from flashcore.backends.hopper import tma
from flashcore.backends.hopper.decode import DecodeLauncher
from flashcore.backends.hopper.decode_configs import CLUSTERS, DecodeConfig, choose_decode
from flashcore.errors import FlashCoreWarning
from flashcore.problem import AttentionProblem
from tests.poison import poisoned_outputs
from tests.tolerance import assert_forward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.is_available() and hopper.unavailable() is not None, reason="no Hopper GPU"),
]


def random_inputs(batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, dtype=torch.bfloat16, seed=0):
    """A query, and a cache that lies head by head as that of Transformers does."""
    generator = torch.Generator("cuda").manual_seed(seed)
    q = torch.randn(batch, seqlen_q, heads_q, head_dim, dtype=dtype, device="cuda", generator=generator)
    shape = batch, heads_k, seqlen_k, head_dim
    k, v = (torch.randn(shape, dtype=dtype, device="cuda", generator=generator).transpose(1, 2) for _ in "kv")
    return q, k, v


def launch(q, k, v, causal=False, cluster=None):
    problem = AttentionProblem.from_tensors(q, k, v, causal=causal, return_lse=True)
    config = choose_decode(problem)
    assert isinstance(config, DecodeConfig)
    if cluster is not None:
        config = dataclasses.replace(config, cluster=cluster)
    with poisoned_outputs():
        return DecodeLauncher(problem, config)(q, k, v)


# (batch, seqlen_q, seqlen_k, heads_q, heads_k): one block of keys and many, warps and CTAs without any, few rows and 8.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 1, 15, 4, 1),
    (1, 1, 16, 8, 8),
    (3, 1, 17, 8, 2),
    (1, 2, 333, 8, 2),
    (2, 8, 65, 2, 2),
    (1, 5, 3, 2, 2),  # under the causal mask two rows see nothing
    (2, 3, 130, 4, 2),
    (4, 1, 2049, 32, 8),
    (1, 7, 5000, 1, 1),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 96, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_cluster_on_every_kind_of_shape(shape, head_dim, causal):
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = random_inputs(*shape, head_dim, dtype)
        for cluster in CLUSTERS:
            out, lse = launch(q, k, v, causal, cluster)
            assert_forward(out, lse, q, k, v, causal=causal)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_same_bits_each_time(cluster):
    q, k, v = random_inputs(2, 1, 3000, 32, 8, 128)
    first = launch(q, k, v, cluster=cluster)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(launch(q, k, v, cluster=cluster), first, strict=True))


def test_any_strides(monkeypatch):
    """Packed projections, one query of a prompt, a slice of a longer cache, and what has to be copied first."""
    packed = torch.randn(2, 700, 3, 4, 64, dtype=torch.bfloat16, device="cuda")
    q, k, v = packed[:, 5:6, 0], packed[:, 10:650, 1], packed[:, 20:660, 2]
    assert_forward(*launch(q, k, v), q, k, v)
    k, v = (t[:, :, :1] for t in (k, v))
    assert_forward(*launch(q, k, v), q, k, v)
    k, v = (t.expand(-1, -1, 4, -1) for t in (k, v))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_forward(*launch(q, k, v), q, k, v)
    k = torch.randn(2, 640, 1, 65, dtype=torch.bfloat16, device="cuda")[..., 1:]
    monkeypatch.setattr(tma, "_warned", set())
    with pytest.warns(FlashCoreWarning, match="k is copied"):
        out, lse = launch(q, k, v[:, :, :1])
    assert_forward(out, lse, q, k, v[:, :, :1])


def test_what_lies_behind_the_keys_does_not_matter():
    """The cache is longer than what is attended to, and full of NaN there; and so is what hides behind the mask."""
    q, k, v = random_inputs(1, 2, 1000, 4, 1, 128)
    clean = flashcore.attention(q, k[:, :777], v[:, :777], causal=True, backend="hopper")
    k[:, 777:], v[:, 777:] = torch.nan, torch.nan
    assert torch.equal(flashcore.attention(q, k[:, :777], v[:, :777], causal=True, backend="hopper"), clean)
    k[:, 776] = torch.nan  # the second query sees it
    spoiled = flashcore.attention(q, k[:, :777], v[:, :777], causal=True, backend="hopper")
    assert torch.equal(spoiled[:, 0], clean[:, 0])
    assert spoiled[:, 1].isnan().all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_growing_maxima(scale):
    q, k, v = random_inputs(1, 1, 2000, 8, 2, 64)
    ramp = torch.linspace(0.01, 3, 2000, device="cuda", dtype=k.dtype)[None, :, None, None]
    for keys in (k.abs() * ramp, -k.abs() * ramp.flip(1)):
        for cluster in (1, 8):
            problem = AttentionProblem.from_tensors(q.abs(), keys, v, causal=False, scale=scale, return_lse=True)
            config = dataclasses.replace(choose_decode(problem), cluster=cluster)
            out, lse = DecodeLauncher(problem, config)(q.abs(), keys, v, scale)
            assert_forward(out, lse, q.abs(), keys, v, scale=scale)


def test_an_unchanged_maximum_changes_nothing():
    """Many blocks of large scores of the same size: what a block multiplies in must not be a factor beside 1."""
    q, k, v = random_inputs(1, 1, 131072, 4, 1, 64)
    q, k = torch.full_like(q, 8.0), k / 64 - 1.0  # scores near -64 * 8 * scale
    problem = AttentionProblem.from_tensors(q, k, v, causal=False, scale=1.0, return_lse=True)
    out, lse = DecodeLauncher(problem, dataclasses.replace(choose_decode(problem), cluster=1))(q, k, v, 1.0)
    scores = torch.einsum("bqhd,bkd->bhqk", q.double(), k[:, :, 0].double())
    assert (lse - scores.logsumexp(-1)).abs().max() < 2e-4
    assert_forward(out, lse, q, k, v, scale=1.0)


def test_infinity_in_the_last_value_stays_infinity():
    q, k, v = random_inputs(1, 1, 777, 8, 2, 128)
    v[0, 776, 0, 5] = torch.inf
    out = flashcore.attention(q, k, v, backend="hopper")
    assert (out[0, 0, :4, 5] == torch.inf).all()
    out[0, 0, :4, 5] = 0
    assert out.isfinite().all()


def test_a_known_stride_at_an_address_that_is_not_aligned(monkeypatch):
    q, k, v = random_inputs(1, 1, 300, 4, 1, 64)
    problem = AttentionProblem.from_tensors(q, k, v, causal=False)
    attend = DecodeLauncher(problem, choose_decode(problem))
    expected, _ = attend(q, k, v)
    memory = torch.empty(k.numel() + 1, dtype=k.dtype, device="cuda")
    moved = memory[1:].as_strided(k.shape, k.stride(), 1).copy_(k)
    monkeypatch.setattr(tma, "_warned", set())
    with pytest.warns(FlashCoreWarning, match="k is copied"):
        out, _ = attend(q, moved, v)
    assert torch.equal(out, expected)


def test_in_a_thread_that_has_done_nothing_yet():
    tensors = random_inputs(1, 1, 300, 8, 2, 128)
    expected = flashcore.attention(*tensors, backend="hopper")
    torch.cuda.synchronize()
    results = []
    thread = threading.Thread(target=lambda: results.append(flashcore.attention(*tensors, backend="hopper")))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(results[0], expected)


def test_more_than_two_to_the_31_elements():
    k = torch.randn(3, 8, 100_000, 128, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    k = torch.cat([k, k[:1].expand(20, -1, -1, -1)])
    assert k.numel() > 2**31
    q = torch.randn(23, 1, 8, 128, dtype=torch.bfloat16, device="cuda")
    out, lse = flashcore.attention(q, k, k, return_lse=True, backend="hopper")
    some = slice(21, 23)
    assert_forward(out[some], lse[some].contiguous(), q[some], k[some], k[some])


def test_a_growing_cache_in_a_loop():
    q, k, v = random_inputs(2, 1, 200, 8, 2, 64)
    for seqlen in range(1, 200):
        assert flashcore.explain(q, k[:, :seqlen], v[:, :seqlen], causal=True).backend == "hopper"
        out = flashcore.attention(q, k[:, :seqlen], v[:, :seqlen], causal=True)
        expected = flashcore.attention(q, k[:, :seqlen], v[:, :seqlen], causal=True, backend="reference")
        assert (out - expected).abs().max() < 0.03
