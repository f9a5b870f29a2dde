"""The backward kernels on a Hopper GPU, against float64, with NaN wherever nobody wrote."""

import dataclasses

import pytest
import torch

from flashcore.backends import hopper
from flashcore.backends.hopper import backward_configs, tma
from flashcore.backends.hopper.backward import BackwardLauncher, WideLauncher
from flashcore.backends.hopper.backward_configs import (
    WideConfig,
    choose_backward,
    declared_backward_configs,
    declared_wide_configs,
)
from flashcore.problem import AttentionProblem
from flashcore.score import PLAIN, bind
from tests.cases import CASES
from tests.poison import poisoned_outputs
from tests.tolerance import assert_gradients, attention_math

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.is_available() and hopper.unavailable() is not None, reason="no Hopper GPU"),
]

CONFIGS = dict(declared_backward_configs() + declared_wide_configs())
WAIT_LIMIT = 100_000  # a wait that would hang ends the kernel instead

# (batch, seqlen_q, seqlen_k, heads_q, heads_k): few and many tiles, all kinds of ends.
SHAPES = [
    (1, 1, 2, 8, 8),
    (2, 63, 65, 2, 2),
    (2, 129, 511, 4, 1),
    (1, 513, 100, 2, 2),  # under the causal mask most rows see nothing
    (3, 700, 1300, 7, 1),
    (2, 200, 900, 40, 10),
    (32, 512, 512, 32, 32),
    (1, 2100, 2100, 9, 3),
]


def launcher(q, k, v, causal=False, scale=None, window=None, spec=PLAIN):
    problem = AttentionProblem.from_tensors(q, k, v, causal=causal, scale=scale, window=window)
    problem = dataclasses.replace(problem, score=spec)
    config = dataclasses.replace(choose_backward(problem), wait_limit=WAIT_LIMIT)
    return (WideLauncher if isinstance(config, WideConfig) else BackwardLauncher)(problem, config)


def random_inputs(batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, dtype=torch.bfloat16, seed=0):
    """q, k, v and the output's gradient."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = (seqlen_q, heads_q), (seqlen_k, heads_k), (seqlen_k, heads_k), (seqlen_q, heads_q)
    return [torch.randn(batch, *s, head_dim, dtype=dtype, device="cuda", generator=generator) for s in shapes]


def forward(q, k, v, causal=False, scale=None, **features):
    with torch.no_grad():
        out, lse = attention_math(q, k, v, causal=causal, scale=scale, dtype=torch.float32, **features)
    return out.to(q.dtype).contiguous(), lse.contiguous()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_on_every_kind_of_shape(name, shape):
    config = CONFIGS[name]
    q, k, v, dout = random_inputs(*shape, config.head_dim, getattr(torch, config.dtype))
    mask = {"causal": config.bounded_right and not config.bounded_left}
    if config.bounded_left:
        mask["window"] = (90, 40)
    out, lse = forward(q, k, v, **mask)
    launch = launcher(q, k, v, **mask)
    with poisoned_outputs():
        grads = launch(q, k, v, out, lse, dout)
    assert not any(grad.isnan().any() for grad in grads)
    one = slice(0, 1)  # the reference in float64 is large
    assert_gradients([t[one] for t in grads], q[one], k[one], v[one], dout[one], **mask)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(launch(q, k, v, out, lse, dout), grads, strict=True))


def suits(case) -> bool:
    return (
        min(case.batch, case.seqlen_q, case.seqlen_k) > 0
        and case.head_dim % 8 == 0
        and case.head_dim <= 256
        and (case.head_dim_v or 8) % 8 == 0
        and case.dtype in ("bfloat16", "float16")
        and case.values != "huge"
        and case.seqlen_k > 1  # with one key dS is 0, and only rounding is left of dQ and dK
    )


@pytest.mark.parametrize("case", [case for case in CASES if suits(case)], ids=str)
def test_named_cases(case):
    q, k, v = (t.resolve_neg() for t in case.inputs("cuda"))
    options = case.options("cuda")
    out, lse = forward(q, k, v, **options)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to("cuda", q.dtype)
    spec, extras = bind(options["score"], options["sink"])
    mask = {name: options[name] for name in ("causal", "scale", "window")}
    with poisoned_outputs():
        grads = launcher(q, k, v, **mask, spec=spec)(q, k, v, out, lse, dout, None, None, *extras)
    assert_gradients(grads, q, k, v, dout, **options)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_huge_scores_stay_finite(head_dim):
    """The rounding of a huge LSE is a factor of all P of a row, which must not overflow."""
    q, k, v, dout = random_inputs(2, 300, 300, 4, 2, head_dim)
    q, k = q * 3e4, k * 3e4
    grads = launcher(q, k, v, True)(q, k, v, *forward(q, k, v, True), dout)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_gradient_of_the_lse(head_dim, causal):
    q, k, v, dout = random_inputs(1, 300, 260, 4, 2, head_dim)
    dlse = torch.randn(1, 4, 300, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    inputs = [t.double().requires_grad_() for t in (q, k, v)]
    exact_out, exact_lse = attention_math(*inputs, causal=causal, scale=None)
    seen = exact_lse.isfinite()
    exact = torch.autograd.grad(
        (exact_out * dout.double()).sum() + (exact_lse[seen] * dlse[seen].double()).sum(), inputs
    )
    grads = launcher(q, k, v, causal)(q, k, v, *forward(q, k, v, causal), dout, dlse)
    for grad, truth in zip(grads, exact, strict=True):
        assert (grad.double() - truth).abs().max() <= 0.02 * truth.abs().max()


@pytest.mark.parametrize("tiles", [3, 16])  # of the 8 of a key head, or of two heads
def test_rounds(monkeypatch, tiles):
    """The memory for dS is bounded: what does not fit is computed in rounds, with the same bits."""
    q, k, v, dout = random_inputs(3, 400, 500, 6, 3, 256)
    out, lse = forward(q, k, v, True)
    whole = launcher(q, k, v, True)(q, k, v, out, lse, dout)
    monkeypatch.setattr(backward_configs, "DS_BYTES", tiles * 2 * 7 * 8192)
    launch = launcher(q, k, v, True)
    assert launch.workspace_bytes < 4 * 2**20
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(launch(q, k, v, out, lse, dout), whole, strict=True))


def test_a_gradient_that_is_one_number(monkeypatch):
    monkeypatch.setattr(tma, "_warned", set())
    q, k, v, _ = random_inputs(2, 300, 300, 4, 4, 128)
    dout = torch.ones(1, 1, 1, 1, dtype=q.dtype, device="cuda").expand(q.shape)
    with pytest.warns(match="dout is copied"):
        grads = launcher(q, k, v)(q, k, v, *forward(q, k, v), dout)
    assert_gradients(grads, q, k, v, dout)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_cuda_graph_replay(head_dim):
    tensors = random_inputs(2, 600, 600, 4, 2, head_dim)
    out, lse = forward(*tensors[:3], True)
    launch = launcher(*tensors[:3], True)
    launch(*tensors[:3], out, lse, tensors[3])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = launch(*tensors[:3], out, lse, tensors[3])
    for seed in (1, 2):
        for old, new in zip(tensors, random_inputs(2, 600, 600, 4, 2, head_dim, seed=seed), strict=True):
            old.copy_(new)
        for old, new in zip((out, lse), forward(*tensors[:3], True), strict=True):
            old.copy_(new)
        graph.replay()
        expected = launch(*tensors[:3], out, lse, tensors[3])
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("causal", [False, True])
def test_several_streams_at_once(causal):
    """Each call has more CTAs than the GPU has SMs, so those of two calls share them."""
    inputs = [random_inputs(2, 2048, 2048, 16, 16, 128, seed=seed) for seed in range(4)]
    results = [forward(*t[:3], causal) for t in inputs]
    launch = launcher(*inputs[0][:3], causal)
    expected = [launch(*t[:3], *r, t[3]) for t, r in zip(inputs, results, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(10):
        found = []
        for stream, t, r in zip(streams, inputs, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(launch(*t[:3], *r, t[3]))
        torch.cuda.synchronize()
        for grads, right in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(grads, right, strict=True))
