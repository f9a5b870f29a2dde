"""What only the kernels on a Hopper GPU can show, beyond the named cases of tests/backends."""

import dataclasses
import threading

import pytest
import torch

import flashcore
from flashcore.backends import hopper
from flashcore.backends.hopper.attention import ForwardLauncher
from flashcore.backends.hopper.configs import declared_configs
from flashcore.problem import AttentionProblem
from tests.poison import poisoned_outputs
from tests.tolerance import assert_forward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.is_available() and hopper.unavailable() is not None, reason="no Hopper GPU"),
]

CONFIGS = dict(declared_configs())
WAIT_LIMIT = 2_000_000  # a barrier wait that would hang ends the kernel instead


def random_inputs(batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = (batch, seqlen_q, heads_q, head_dim), *[(batch, seqlen_k, heads_k, head_dim)] * 2
    return [torch.randn(shape, dtype=dtype, device="cuda", generator=generator) for shape in shapes]


# (batch, seqlen_q, seqlen_k, heads_q, heads_k): few and many tiles a CTA, all kinds of ends.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 63, 65, 2, 2),
    (2, 129, 511, 4, 1),
    (1, 513, 100, 2, 2),  # under the causal mask most rows see nothing
    (3, 700, 1300, 7, 1),
    (2, 200, 900, 40, 10),
    (32, 512, 512, 32, 32),
    (8, 1000, 1000, 16, 4),  # windows: many tiles a CTA, and warpgroups with one block of a tile
    (2, 2100, 2100, 9, 3),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_on_every_kind_of_shape(name, shape):
    config = CONFIGS[name]
    dtype = getattr(torch, config.dtype)
    q, k, v = random_inputs(*shape, config.head_dim, dtype)
    window = (max(1, shape[2] // 3), None) if config.bounded_left else None
    options = {"causal": config.bounded_right, "window": window}
    problem = AttentionProblem.from_tensors(q, k, v, **options, return_lse=True)
    config = dataclasses.replace(config, wait_limit=WAIT_LIMIT)
    if config.one_tile and shape[0] * shape[3] * -(-shape[1] // config.tile_m) > problem.sm_count:
        with pytest.raises(ValueError, match="more tiles"):
            ForwardLauncher(problem, config)
        return
    launch = ForwardLauncher(problem, config)
    with poisoned_outputs():
        out, lse = launch(q, k, v)
    assert not out.isnan().any()
    assert not lse.isnan().any()
    some = slice(0, 2)  # the reference in float64 is large
    assert_forward(out[some], lse[some].contiguous(), q[some], k[some], v[some], **options)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_close_to_sdpa_in_fp16(head_dim, causal):
    q, k, v = random_inputs(2, 1000, 1000, 4, 4, head_dim, torch.float16)
    ours = flashcore.attention(q, k, v, causal=causal, backend="hopper")
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal
    ).transpose(1, 2)
    assert (ours - theirs).abs().max() < 2e-3


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_same_bits_each_time(head_dim, causal):
    q, k, v = random_inputs(4, 777, 777, 8, 2, head_dim)
    first = flashcore.attention(q, k, v, causal=causal, return_lse=True, backend="hopper")
    for _ in range(100):
        again = flashcore.attention(q, k, v, causal=causal, return_lse=True, backend="hopper")
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_keys_behind_the_mask_do_not_reach_the_output(bad):
    q, k, v = random_inputs(1, 300, 300, 2, 2, 128)
    clean = flashcore.attention(q, k, v, causal=True, backend="hopper")
    k[:, 200:] = bad  # visible to rows 200 and later only
    spoiled = flashcore.attention(q, k, v, causal=True, backend="hopper")
    assert torch.equal(spoiled[:, :200], clean[:, :200])


@pytest.mark.parametrize(("shape", "row", "head"), [((1, 300, 300, 2, 2), 77, 1), ((2, 1, 300, 8, 2), 0, 3)])
def test_nan_stays_in_its_row(shape, row, head):
    q, k, v = random_inputs(*shape, 128)
    clean = flashcore.attention(q, k, v, backend="hopper")
    q[0, row, head] = torch.nan
    out, lse = flashcore.attention(q, k, v, return_lse=True, backend="hopper")
    assert out[0, row, head].isnan().all()
    assert lse[0, head, row].isnan()
    out[0, row, head] = clean[0, row, head]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_growing_maxima(scale):
    """Scores that grow along the keys rescale the output over and over; all-negative ones take the slow maximum."""
    q, k, v = random_inputs(1, 130, 2000, 2, 2, 64)
    ramp = torch.linspace(0.01, 3, 2000, device="cuda", dtype=k.dtype)[None, :, None, None]
    for keys in (k.abs() * ramp, -k.abs() * ramp.flip(1)):
        out, lse = flashcore.attention(q.abs(), keys, v, scale=scale, return_lse=True, backend="hopper")
        assert_forward(out, lse, q.abs(), keys, v, scale=scale)


def test_more_than_two_to_the_31_elements():
    q = torch.randn(3, 70_000, 80, 128, dtype=torch.bfloat16, device="cuda")
    assert q.numel() > 2**31
    k, v = q[:, :129, :8], q[:, 129:258, :8]
    out, lse = flashcore.attention(q, k, v, return_lse=True, backend="hopper")
    last = slice(2, 3), slice(69_900, None)
    assert_forward(out[last], lse[2:3, :, 69_900:].contiguous(), q[last], k[2:3], v[2:3])


def test_runs_on_the_current_stream():
    q, k, v = random_inputs(8, 4096, 4096, 16, 16, 128)
    expected = flashcore.attention(q, k, v, backend="hopper")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = q * 2  # ready only after the sleep
        out = flashcore.attention(late, k * 0.5, v, backend="hopper")
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("shape", [(2, 300, 300, 4, 4, 64), (2, 1, 3000, 8, 2, 128)], ids=str)
def test_cuda_graph_replay(shape):
    q, k, v = random_inputs(*shape)
    flashcore.attention(q, k, v, causal=True, backend="hopper")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flashcore.attention(q, k, v, causal=True, backend="hopper")
    for seed in (1, 2):
        for old, new in zip((q, k, v), random_inputs(*shape, seed=seed), strict=True):
            old.copy_(new)
        graph.replay()
        assert torch.equal(out, flashcore.attention(q, k, v, causal=True, backend="hopper"))


def test_threads():
    tensors = [random_inputs(2, 500, 500, 4, 4, 128, seed=seed) for seed in range(8)]
    expected = [flashcore.attention(*t, backend="hopper") for t in tensors]
    results = [None] * 8

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                results[i] = flashcore.attention(*tensors[i], backend="hopper")
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_a_call_keeps_no_tensor_alive():
    def used():
        q, k, v = random_inputs(1, 4096, 4096, 8, 8, 128)
        flashcore.attention(q, k, v, backend="hopper")
        del q, k, v
        return torch.cuda.memory_allocated()

    assert used() == used()
