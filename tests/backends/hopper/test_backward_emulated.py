"""The backward kernels on emulated instructions (emulated.py)."""

import ctypes
import math
from dataclasses import replace

import pytest
import torch

from flashcore.backends.hopper import backward_configs
from flashcore.backends.hopper.backward import _outer_strides
from flashcore.backends.hopper.backward_configs import (
    BACKWARD_TABLE,
    DqConfig,
    ProductConfig,
    RowsConfig,
    WideConfig,
    choose_backward,
    m_begin,
    m_blocks,
    n_blocks,
    section,
    wide_rounds,
)
from flashcore.backends.hopper.launch import diagonals
from flashcore.problem import AttentionProblem
from flashcore.score import bind
from flashcore.sequences import Packed
from tests.backends.hopper.emulated import built, maps
from tests.backends.hopper.test_decode_emulated import address, compiler, sequence_arguments
from tests.packed import PackedCase, assert_packed_gradients
from tests.tolerance import assert_gradients, attention_math

LN2 = math.log(2)

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++ with C++20's <barrier>")

def backward(q, k, v, out, lse, dout, dlse=None, causal=False, scale=None, window=None, score=None, places=None):
    """(dq, dk, dv) of the emulated kernels. Everything that they write is NaN before."""
    spec, captured = bind(score, None)
    problem = AttentionProblem.from_tensors(q, k, v, causal=causal, scale=scale, window=window, **places or {})
    problem = replace(problem, score=spec)
    config = choose_backward(problem)
    if isinstance(config, WideConfig):
        return wide_backward(problem, config, q, k, v, out, lse, dout, dlse, captured)
    blocks, tile_m, packed = m_blocks(config, problem), config.tile_m, problem.packed
    batches = 1 if packed else problem.batch
    tiles = batches * problem.heads_q * blocks
    rows = torch.full((tiles, 2 * tile_m + 4), torch.nan)
    sums = torch.full((tiles, 2, 4096), torch.nan)
    turns = torch.full((tiles, 2), -1, dtype=torch.int32)
    dq, dk, dv = (torch.full(t.shape, torch.nan, dtype=t.dtype) for t in (q, k, v))
    strides = (ctypes.c_uint64 * 6)(*(int(n) for tensor in (out, dout) for n in _outer_strides(tensor)))

    built(RowsConfig("bfloat16", config.head_dim, tile_m, packed)).run(
        tiles, None, address(out), address(dout), address(lse), address(dlse), address(rows), address(turns), strides,
        problem.heads_q, problem.seqlen_q, blocks, problem.head_dim,
        *sequence_arguments(places, problem, problem.head_dim, dq, dk, dv),
    )  # fmt: skip
    keys = n_blocks(config, problem)
    built(config).run(
        keys * problem.heads_k * batches,
        maps((q, tile_m), (k, 128), (v, 128), (dout, tile_m), (dk, 64), (dv, 64)),
        address(rows), address(sums), address(turns), ctypes.c_float(problem.scale),
        ctypes.c_float(problem.scale / LN2), problem.batch, problem.heads_k, problem.group_size, problem.seqlen_q,
        problem.seqlen_k, *map(int, diagonals(problem)), blocks, keys, section(config, problem),
        *sequence_arguments(places, problem, 0),
    )  # fmt: skip
    assert packed or (turns >= 0).all()
    built(DqConfig("bfloat16", tile_m, packed)).run(
        tiles, maps((dq, 64)), address(sums), ctypes.c_float(problem.scale), problem.heads_q, blocks,
        int(diagonals(problem)[1]) if packed else m_begin(config, problem, 0),
        *sequence_arguments(places, problem, 0),
    )  # fmt: skip
    return dq, dk, dv


def wide_backward(problem, config, q, k, v, out, lse, dout, dlse, captured=()):
    """The same where dS lies in memory, of some key heads at a time."""
    blocks, keys = m_blocks(config, problem), n_blocks(config, problem)
    tiles, group = problem.batch * problem.heads_q * blocks, problem.group_size
    rows = torch.full((tiles, 2 * 64 + 4), torch.nan)
    dq, dk, dv = (torch.full(t.shape, torch.nan, dtype=t.dtype) for t in (q, k, v))
    strides = (ctypes.c_uint64 * 6)(*out.stride()[:3], *dout.stride()[:3])
    built(RowsConfig("bfloat16", 256, 64)).run(
        tiles, None, address(out), address(dout), address(lse), address(dlse), address(rows), None, strides,
        problem.heads_q, problem.seqlen_q, blocks, problem.head_dim_v,
    )  # fmt: skip
    extra = [] if config.score.change is None else [ctypes.c_float(problem.scale)]
    for tensor in captured:
        extra += [address(tensor), *map(ctypes.c_uint64, tensor.stride()), *tensor.shape]
    factor = problem.score.factor
    exponent = (problem.scale if config.score.change is None else factor) / LN2
    rounds = wide_rounds(config, problem)
    product = ProductConfig(
        "bfloat16", config.head_dim, config.bounded_left, config.bounded_right, len(rounds[0][1]) < keys
    )
    sums = torch.full((len(rounds[0][0]) * group * blocks * 64 * config.head_dim,), torch.nan)
    for some, tiles_n in rounds:
        count = len(some)
        lengths = problem.seqlen_k, *map(int, diagonals(problem)), blocks, tiles_n.start, len(tiles_n)
        ds = torch.full((count * group * blocks * len(tiles_n), 64 * 64), torch.nan, dtype=torch.bfloat16)
        built(config).run(
            len(tiles_n) * count, maps((q, 64), (k, 64), (v, 64), (dout, 64), (dk, 64), (dv, 64)), address(rows),
            address(ds), ctypes.c_float(problem.scale * factor), ctypes.c_float(exponent), some.start, count,
            problem.heads_k, group, problem.seqlen_q, *lengths, min(count, section(config, problem)), *extra,
        )  # fmt: skip
        built(product).run(
            -(-blocks // product.groups) * count * group, maps((k, 64), (dq, 64)), address(ds), address(sums),
            tiles_n.start > 0, tiles_n.stop == keys, ctypes.c_float(problem.scale * factor), some.start * group,
            problem.heads_q, group, *lengths,
        )  # fmt: skip
    return dq, dk, dv


def random_inputs(batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, head_dim_v=None):
    generator = torch.Generator().manual_seed(0)
    shapes = (seqlen_q, heads_q), (seqlen_k, heads_k), (seqlen_k, heads_k), (seqlen_q, heads_q)
    head_dims = head_dim, head_dim, head_dim_v or head_dim, head_dim_v or head_dim
    sizes = [(batch, *shape, n) for shape, n in zip(shapes, head_dims, strict=True)]
    return [torch.randn(size, generator=generator).bfloat16() for size in sizes]


def forward(q, k, v, causal=False, scale=None, window=None, score=None):
    out, lse = attention_math(q, k, v, causal=causal, scale=scale, window=window, score=score, dtype=torch.float32)
    return out.to(q.dtype).contiguous(), lse.contiguous()


SHAPES = [
    # (batch, seqlen_q, seqlen_k, heads_q, heads_k)
    (1, 64, 128, 1, 1),
    (1, 1, 2, 1, 1),
    (2, 130, 200, 2, 1),
    (1, 300, 129, 1, 1),  # under the causal mask most rows see nothing
    (1, 65, 300, 3, 1),
    (1, 257, 257, 2, 2),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape, head_dim, causal):
    q, k, v, dout = random_inputs(*shape, head_dim)
    out, lse = forward(q, k, v, causal)
    grads = backward(q, k, v, out, lse, dout, causal=causal)
    assert_gradients(grads, q, k, v, dout, causal=causal)


WINDOWS = [
    # (seqlen_q, seqlen_k, (left, right))
    (300, 300, (70, 0)),
    (300, 300, (1, 0)),
    (200, 520, (127, 0)),  # most keys are nobody's
    (520, 200, (64, 30)),
    (257, 257, (100, None)),
    (129, 400, (None, 60)),
]


@pytest.mark.parametrize(
    ("case", "head_dim"),
    [(case, head_dim) for i, case in enumerate(WINDOWS) for head_dim in ((64, 256), (128, 256))[i % 2]],
    ids=str,
)
def test_windows(case, head_dim):
    seqlen_q, seqlen_k, window = case
    q, k, v, dout = random_inputs(1, seqlen_q, seqlen_k, 2, 1, head_dim)
    out, lse = forward(q, k, v, window=window)
    grads = backward(q, k, v, out, lse, dout, window=window)
    assert_gradients(grads, q, k, v, dout, window=window)


SLOPES = torch.tensor([0.3, 0.05])
SCORES = {
    "softcap": lambda score, *_: 2.0 * torch.tanh(score / 2.0),
    "alibi": lambda score, batch, head, query, key: score - SLOPES[head] * abs(query - 10 - key),
    "by_distance": lambda score, batch, head, query, key: torch.where(query - key < 9, score * 2, score * score * 0.1),
    "steep_at_0": lambda score, *_: torch.sqrt(abs(score)),  # where scores past the end are
}


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("head_dim", "options"), [(64, {"causal": True}), (128, {"window": (70, 10)}), (256, {})])
def test_scores(score, head_dim, options):
    q, k, v, dout = random_inputs(1, 150, 140, 2, 1, head_dim)
    options = {**options, "score": SCORES[score], "scale": 0.2}
    out, lse = forward(q, k, v, **options)
    grads = backward(q, k, v, out, lse, dout, **options)
    assert_gradients(grads, q, k, v, dout, **options)


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(64, 128), (192, 128), (128, 64), (40, 256)])
def test_values_of_another_head_dim(head_dim, head_dim_v):
    q, k, v, dout = random_inputs(1, 130, 150, 2, 1, head_dim, head_dim_v)
    out, lse = forward(q, k, v, True)
    assert_gradients(backward(q, k, v, out, lse, dout, causal=True), q, k, v, dout, causal=True)


@pytest.mark.parametrize("tiles", [1, 2, 6])
@pytest.mark.parametrize("options", [{"causal": True}, {"window": (100, 30)}], ids=str)
def test_rounds_over_heads_and_over_keys(tiles, options, monkeypatch):
    """The memory for dS holds so many key tiles of a head, of which it has three."""
    q, k, v, dout = random_inputs(1, 200, 190, 4, 2, 192)
    monkeypatch.setattr(backward_configs, "DS_BYTES", tiles * 2 * 4 * 64 * 64 * 2)
    out, lse = forward(q, k, v, **options)
    assert_gradients(backward(q, k, v, out, lse, dout, **options), q, k, v, dout, **options)


def test_huge_scores_stay_finite():
    """The rounding of a huge LSE is a factor of all P of a row, which must not overflow."""
    q, k, v, dout = random_inputs(1, 130, 200, 2, 1, 64)
    q, k = q * 3e4, k * 3e4
    out, lse = forward(q, k, v)
    assert all(grad.isfinite().all() for grad in backward(q, k, v, out, lse, dout))


@pytest.mark.parametrize("head_dim", [8, 40, 72, 120, 192])
def test_head_dims_below_the_tiles(head_dim):
    q, k, v, dout = random_inputs(1, 100, 150, 2, 2, head_dim)
    out, lse = forward(q, k, v, True)
    assert_gradients(backward(q, k, v, out, lse, dout, causal=True), q, k, v, dout, causal=True)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_scales(scale):
    q, k, v, dout = random_inputs(1, 70, 140, 1, 1, 64)
    out, lse = forward(q, k, v, True, scale)
    grads = backward(q, k, v, out, lse, dout, causal=True, scale=scale)
    assert_gradients(grads, q, k, v, dout, causal=True, scale=scale)


def test_strided_tensors_and_a_broadcast_dout():
    q, k, v, _ = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in random_inputs(2, 90, 130, 2, 1, 64))
    dout = torch.ones(1, 1, 1, 64, dtype=torch.bfloat16).expand(q.shape)
    out, lse = forward(q, k, v, False)
    assert_gradients(backward(q, k, v, out, lse, dout), q, k, v, dout)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_gradient_of_the_lse(head_dim):
    q, k, v, dout = random_inputs(1, 140, 100, 1, 1, head_dim)
    out, lse = forward(q, k, v, True)
    dlse = torch.randn(lse.shape, generator=torch.Generator().manual_seed(1))
    grads = backward(q, k, v, out, lse, dout, dlse, causal=True)
    inputs = [t.double().requires_grad_() for t in (q, k, v)]
    exact_out, exact_lse = attention_math(*inputs, causal=True, scale=None)
    seen = exact_lse.isfinite()
    exact = torch.autograd.grad(
        (exact_out * dout.double()).sum() + (exact_lse[seen] * dlse[seen].double()).sum(), inputs
    )
    for grad, truth in zip(grads, exact, strict=True):
        assert (grad.double() - truth).abs().max() <= 0.02 * truth.abs().max()


def test_keys_past_the_end_do_not_overflow():
    """Scores far below zero: exp(0 - LSE) of a key that does not exist would be infinite."""
    q, k, v, dout = random_inputs(1, 64, 100, 1, 1, 64)
    k = (q[:, :1].float().abs() * -40).expand(k.shape).bfloat16().contiguous()
    q = q.abs()
    out, lse = forward(q, k, v, False)
    assert lse.max() < -100  # exp2(100 * log2(e)) is infinite in fp32
    assert_gradients(backward(q, k, v, out, lse, dout), q, k, v, dout)


LENGTHS = {
    "several": ((70, 1, 0, 130, 64), (90, 33, 40, 200, 64)),
    "more_queries": ((150, 300), (20, 129)),
    "empty_keys": ((20, 0, 70), (0, 0, 100)),
}


@pytest.mark.parametrize(("head_dim", "causal"), [(64, True), (128, False)])
@pytest.mark.parametrize("name", LENGTHS)
def test_packed(head_dim, name, causal):
    before = 300 if name == "several" else 2  # whole tiles of nobody
    check_packed(PackedCase("", *LENGTHS[name], head_dim=head_dim, causal=causal, before=before, after=3))


@pytest.mark.parametrize(("head_dim", "window"), [(40, (40, 0)), (128, (1, 0)), (64, (100, 30))], ids=str)
def test_packed_windows(window, head_dim):
    check_packed(PackedCase("", (300, 1, 33), (300, 200, 70), window=window, head_dim=head_dim, unused=(3, 0, 130)))


@pytest.mark.parametrize(
    "offsets", [(0, 300, 0, 300), (0, 200, 300, 150, 300), (250, 20, -(2**31), 2**31 - 1)], ids=str
)
def test_offsets_that_fall(offsets):
    """They mean nothing, but nobody waits for ever: the emulation would end the process."""
    q, k, v, dout = (torch.randn(300, 1, 128, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(4))
    rows = Packed(torch.tensor(offsets, dtype=torch.int32), 300)
    backward(q, k, v, q, torch.zeros(1, 300), dout, causal=True, places={"queries": rows, "keys": rows})


def check_packed(case: PackedCase) -> None:
    q, k, v = case.inputs()
    out, lse = case.math(q, k, v, dtype=torch.float32)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    options = {"causal": case.causal, "scale": case.scale, "window": case.window}
    grads = backward(q, k, v, out.bfloat16(), lse, dout, **options, places=case.packed())
    assert_packed_gradients(case, grads, q, k, v, dout)


def test_the_table_covers_both_tiles():
    assert {row.tile_m for row in BACKWARD_TABLE} == {64, 128}
