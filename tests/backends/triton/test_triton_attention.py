"""Forward, backward, splits and grouped heads of the Triton kernels against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import flashcore
from flashcore import backends, plan
from flashcore import gradients as gradients_of
from flashcore.backends import reference
from flashcore.backends import triton as backend
from flashcore.backends.triton import backward as triton_backward
from flashcore.backends.triton.configs import Tile, TritonConfig
from flashcore.score import bias, bind, softcap
from tests.cases import BY_NAME, CASES, Case
from tests.poison import poisoned_outputs
from tests.tolerance import assert_as_good_as, assert_forward, assert_gradients, attention_math

INTERPRET = not torch.cuda.is_available()
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # NumPy's, of log(0) and of hidden infinities

# Tiles of unequal sides, so that rows and keys cannot be mixed up, both ways through the loops.
PLAIN = TritonConfig(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2))
AHEAD = TritonConfig(
    *(replace(tile, lookahead=True, tma=True) for tile in (PLAIN.forward, PLAIN.dq, PLAIN.dkdv))
)
# dK and dV in passes of their own.
APART = replace(PLAIN, dkdv=Tile(32, 64, 4, 2), dv=Tile(64, 32, 4, 2))
APART_AHEAD = replace(
    AHEAD, dkdv=replace(APART.dkdv, lookahead=True), dv=replace(APART.dv, lookahead=True, tma=True)
)
# Small ones, so that short problems have many tiles.
SMALL = TritonConfig(Tile(32, 16, 4, 2), Tile(32, 16, 4, 2), Tile(16, 32, 4, 2))
SMALL_AHEAD = TritonConfig(
    *(replace(tile, lookahead=True, tma=True) for tile in (SMALL.forward, SMALL.dq, SMALL.dkdv))
)

LONG = {
    "full_long", "causal_long", "causal_many_more_keys", "many_small_tiles", "rising_scores_causal", "window_long",
    "window_many_small_tiles",
}  # fmt: skip
UNSUPPORTED = {"d320", "float64_causal_empty_rows"}
EMPTY = {"no_keys", "no_keys_causal", "no_queries", "no_batch"}
LEFT_OUT = UNSUPPORTED | EMPTY | (LONG if INTERPRET else set())


def shorten(case: Case) -> Case:
    """The interpreter is slow: one batch is enough where batches are not what the case is about."""
    return replace(case, batch=1) if INTERPRET and case.layout == "bshd" and case.heads_q == 4 else case


RUNNABLE = [shorten(case) for case in CASES if case.name not in LEFT_OUT]
# Each query has one key or none, or one that has all the weight.
ONE_KEY = {case.name for case in RUNNABLE if case.seqlen_k == 1 or case.window == (0, 0)} | {"huge_scores_one_query"}
alternating = pytest.mark.parametrize(
    ("case", "config"),
    [
        pytest.param(
            case,
            (PLAIN, AHEAD)[i % 2],
            id=f"{case}-{('plain', 'ahead')[i % 2]}",
        )
        for i, case in enumerate(RUNNABLE)
    ],
)


def backward(problem, config, q, k, v, out, lse, dout, dlse=None, *extras):
    run = triton_backward.prepare(problem, config)
    return run(q, k, v, out, lse, dout, dlse, problem.scale, *extras)


def gradients(case: Case, config: TritonConfig, device: str):
    """q, k, v, dout, and the gradients that the kernels compute from the output of the reference tests' forward."""
    q, k, v = case.inputs(device)
    options = case.options(device)
    _, extras = bind(options["score"], options["sink"])
    problem = case.problem(device, needs_grad=True)
    out, lse = backend.forward(problem, config, q, k, v, *extras)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    with poisoned_outputs():
        grads = backward(problem, config, q, k, v, out, lse, dout, None, *extras)
    return q, k, v, dout, grads


def check_forward(case: Case, config: TritonConfig, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = case.inputs(device)
    options = case.options(device)
    _, extras = bind(options["score"], options["sink"])
    with poisoned_outputs():
        out, lse = backend.forward(case.problem(device), config, q, k, v, *extras)
    assert_forward(out, lse, q, k, v, **options)
    return out, lse


def check_backward(case: Case, config: TritonConfig, device: str) -> None:
    q, k, v, dout, grads = gradients(case, config, device)
    assert_gradients(grads, q, k, v, dout, **case.options(device))


def check_backward_of_one_key(case: Case, config: TritonConfig, device: str) -> None:
    """P = 1 whatever the scores: dq and dk are 0, up to the rounding of dP - delta."""
    q, k, v, dout, (dq, dk, dv) = gradients(case, config, device)
    assert dq.abs().max() < 3e-6 * k.abs().max()
    assert dk.abs().max() < 3e-6 * q.abs().max()
    assert_gradients((torch.zeros_like(q), torch.zeros_like(k), dv), q, k, v, dout, **case.options(device))


def test_what_is_left_out_is_rejected(device):
    for name in UNSUPPORTED:
        assert backends.ATTENTION.refusal("triton", BY_NAME[name].problem(device))
    for case in RUNNABLE:
        assert backends.ATTENTION.refusal("triton", case.problem(device)) is None, case


@alternating
def test_forward(case, config, device):
    check_forward(case, fitting(config, case), device)


@alternating
def test_backward(case, config, device):
    check = check_backward_of_one_key if case.name in ONE_KEY else check_backward
    check(case, fitting(config, case), device)


def fitting(config: TritonConfig, case: Case) -> TritonConfig:
    """The config, or on a GPU, for tiles that do not fit there, the backend's own."""
    if INTERPRET or (max(case.head_dim, case.head_dim_v or 0) <= 128 and case.dtype != "float32"):
        return config
    return backend.configure(case.problem("cuda"))


MANY_TILES = ["causal_more_keys", "causal_empty_rows", "gqa_3_to_1_more_keys", "full_65x193"]


@pytest.mark.parametrize("config", [SMALL, SMALL_AHEAD], ids=["plain", "ahead"])
@pytest.mark.parametrize("name", MANY_TILES)
def test_many_tiles(name, config, device):
    case = replace(BY_NAME[name], batch=1, head_dim=16)
    check_forward(case, config, device)
    check_backward(case, config, device)


# Sides of SMALL's tiles, one less and one more, nothing and more than there is; other lengths than these.
WINDOWS = [
    (0, 1), (1, 0), (0, None), (None, 0), (15, 0), (16, 0), (17, 31), (31, None), (32, 33), (None, 15), (None, 16),
    (5, 200), (200, 5), (200, 200),
]  # fmt: skip


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(70, 70), (33, 90), (90, 33)])
def test_windows(window, seqlen_q, seqlen_k, device):
    case = Case("", 1, seqlen_q, seqlen_k, heads_q=2, heads_k=1, head_dim=16, window=window)
    for config in (SMALL_AHEAD, replace(SMALL, splits=3), replace(SMALL, pack_gqa=True)):
        check_forward(case, config, device)
    check_backward(case, SMALL if seqlen_q % 2 else SMALL_AHEAD, device)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("window", [(60, 0), (3, 40)], ids=str)
def test_keys_that_no_query_of_a_group_sees(window, head_dim, device):
    """Nothing is on its way when their programs end: it would arrive in the shared memory of those that follow."""
    seqlen_k = 300 if INTERPRET else 4096
    case = Case("", 4, 128, seqlen_k, heads_q=6, heads_k=2, head_dim=head_dim, window=window)
    check_backward(case, SMALL_AHEAD if INTERPRET else backend.configure(case.problem("cuda", needs_grad=True)), device)


@pytest.mark.parametrize("values", ["k", "v"])
@pytest.mark.parametrize("config", [SMALL, SMALL_AHEAD, replace(SMALL, splits=3)], ids=["plain", "ahead", "splits"])
def test_nothing_outside_a_window_is_read(config, values, device):
    """The tile of queries 32 to 63 sees the keys 16 to 63: NaN in all others shows neither in its rows, nor in dq."""
    case = Case("", 1, 96, 96, heads_q=2, heads_k=1, head_dim=16, window=(16, 0))
    q, k, v = case.inputs(device)
    problem = case.problem(device, needs_grad=True)
    out, lse = backend.forward(problem, config, q, k, v)
    dout = torch.randn_like(out)
    dq, _, _ = backward(problem, SMALL, q, k, v, out, lse, dout)

    poisoned = {"k": k.clone(), "v": v.clone()}
    poisoned[values][:, :16], poisoned[values][:, 64:] = torch.nan, torch.nan
    k, v = poisoned.values()
    rows = slice(32, 64)
    again, lse_again = backend.forward(problem, config, q, k, v)
    assert torch.equal(again[:, rows], out[:, rows])
    assert torch.equal(lse_again[..., rows], lse[..., rows])
    dq_again, _, _ = backward(problem, SMALL, q, k, v, out, lse, dout)
    assert torch.equal(dq_again[:, rows], dq[:, rows])


def test_nan_in_keys_that_a_window_hides(device):
    """In tiles that are read for other rows, on both sides."""
    case = Case("", 1, 65, 65, heads_q=1, heads_k=1, head_dim=16, window=(3, 4))
    q, k, v = case.inputs(device)
    clean, _ = backend.forward(case.problem(device), SMALL, q, k, v)
    k[:, 40] = torch.nan
    for config in (SMALL, SMALL_AHEAD):
        out, _ = backend.forward(case.problem(device), config, q, k, v)
        assert torch.equal(out[:, :36], clean[:, :36])
        assert torch.equal(out[:, 44:], clean[:, 44:])
        assert out[:, 36:44].isnan().all()


@pytest.mark.parametrize("config", [APART, APART_AHEAD], ids=["plain", "ahead"])
@pytest.mark.parametrize("name", MANY_TILES)
def test_dk_and_dv_apart(name, config, device):
    check_backward(replace(BY_NAME[name], batch=1, head_dim=16), config, device)


# Groups of 4, 3 and 7 query heads: with 3 or 7, tiles of packed rows end inside a group.
GROUPED = [
    Case("full", batch=2, seqlen_q=19, seqlen_k=90, heads_q=4, heads_k=1, head_dim=40),
    Case("more_keys", batch=1, seqlen_q=19, seqlen_k=90, heads_q=6, heads_k=2, head_dim=16, causal=True),
    Case("empty_rows", batch=1, seqlen_q=40, seqlen_k=20, heads_q=7, heads_k=1, head_dim=16, causal=True),
    Case("one_query", seqlen_q=1, seqlen_k=90, heads_k=2, head_dim=64, causal=True, dtype="float16"),
    Case("views", batch=1, seqlen_q=33, seqlen_k=33, heads_q=8, heads_k=2, head_dim=16, causal=True, layout="packed"),
    Case("window", batch=1, seqlen_q=19, seqlen_k=90, heads_q=6, heads_k=2, head_dim=16, window=(20, 3), head_dim_v=40),
    Case("sink", batch=2, seqlen_q=19, seqlen_k=10, heads_q=6, heads_k=2, head_dim=16, causal=True, sink=True),
    Case("alibi", batch=2, seqlen_q=19, seqlen_k=70, heads_q=6, heads_k=2, head_dim=16, score="alibi"),
    Case("bias", batch=1, seqlen_q=5, seqlen_k=70, heads_q=6, heads_k=2, head_dim=16, score="bias", window=(30, 5)),
]  # fmt: skip


@pytest.mark.parametrize("case", GROUPED, ids=str)
@pytest.mark.parametrize("splits", [2, 17])
def test_splits(case, splits, device):
    """More splits than tiles included: the surplus sees no key and weighs nothing."""
    check_forward(case, replace(SMALL, splits=splits), device)


@pytest.mark.parametrize("case", GROUPED, ids=str)
@pytest.mark.parametrize("splits", [1, 3])
def test_packed_groups(case, splits, device):
    """All query heads of a key head in one program."""
    check_forward(case, replace(SMALL_AHEAD, pack_gqa=True, splits=splits), device)


HUGE = {
    "negative_scale": Case("", 1, 70, 70, heads_q=4, heads_k=2, head_dim=64, values="huge", scale=-0.1),
    "window": Case("", 1, 70, 70, heads_q=4, heads_k=2, head_dim=64, values="huge", window=(20, 5)),
    "alibi": Case("", 1, 70, 70, heads_q=4, heads_k=2, head_dim=64, values="huge", score="alibi", causal=True),
    "sink": Case("", 1, 70, 40, heads_q=4, heads_k=2, head_dim=64, values="huge", sink=True, causal=True),
    "float32": Case("", 1, 70, 70, heads_q=4, heads_k=2, head_dim=64, values="huge", dtype="float32"),
}


@pytest.mark.parametrize("name", HUGE)
def test_scores_beyond_2_to_the_31(name, device):
    for config in (SMALL_AHEAD, replace(SMALL, splits=3), replace(SMALL, pack_gqa=True)):
        check_forward(HUGE[name], config, device)
    check = check_backward_of_one_key if name == "float32" else check_backward
    check(HUGE[name], SMALL, device)
    check(HUGE[name], APART_AHEAD, device)


@pytest.mark.parametrize("magnitude", [3e3, 3e4, 1e6, 1e8])
@pytest.mark.parametrize("sink", [False, True])
def test_gradients_of_large_scores(magnitude, sink, device):
    """Whose rounding the LSE does not bear: three keys of each query have weights that are known."""
    case = Case("", 1, 40, 40, heads_q=2, heads_k=1, head_dim=64, scale=1.0, sink=sink)
    q, k, v = case.inputs(device)
    q[:], k[:] = 0, 0
    q[..., 0], q[..., 1] = magnitude, 1
    k[:, :, :, 0] = torch.tensor([0.5, 1.0, 1.0, 1.0] * 10, device=device)[:, None]
    k[:, :, :, 1] = torch.tensor([0.0, 0.0, 1.0, 2.0] * 10, device=device)[:, None] * (magnitude < 1e4)
    options = case.options(device)
    _, extras = bind(None, options["sink"])
    problem = case.problem(device, needs_grad=True)
    out, lse = backend.forward(problem, SMALL, q, k, v, *extras)
    assert_forward(out, lse, q, k, v, **options)
    dout = torch.randn_like(out)
    grads = backward(problem, SMALL, q, k, v, out, lse, dout, None, *extras)
    assert_gradients(grads, q, k, v, dout, **options)


def test_one_split_and_many_agree(device):
    case = replace(BY_NAME["causal_more_keys"], batch=1, heads_q=1, heads_k=1)
    one, many = (check_forward(case, replace(SMALL, splits=splits), device) for splits in (1, 7))
    torch.testing.assert_close(one[1], many[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seqlen_q", [1, 2, 5])
def test_decoding(seqlen_q, device):
    """A few queries against a long cache, as `configure` sets it up for a GPU with many SMs."""
    case = Case("decode", seqlen_q=seqlen_q, seqlen_k=1555, heads_q=8, heads_k=2, head_dim=64, causal=True)
    config = backend.choose(replace(case.problem(device), sm_count=132))
    assert config.pack_gqa
    assert config.splits > 1
    check_forward(case, config, device)


@pytest.mark.parametrize("values", ["k", "v"])
def test_nothing_past_the_end_or_behind_the_mask_is_read(values, device):
    """NaN in keys that no query of the tensor sees; NaN all around the tensors is what `Case.inputs` puts there."""
    case = Case("poison", batch=1, seqlen_q=33, seqlen_k=70, heads_q=2, heads_k=2, head_dim=16)
    q, k, v = case.inputs(device)
    clean = backend.forward(case.problem(device), SMALL, q, k, v)
    longer = replace(case, seqlen_k=90)
    tensors = dict(zip("qkv", longer.inputs(device), strict=True))
    tensors[values][:, 70:] = torch.nan
    views = (q, *(torch.cat([t, tensors[n][:, 70:]], 1)[:, :70] for n, t in (("k", k), ("v", v))))
    for config in (SMALL, SMALL_AHEAD, replace(SMALL, splits=3)):
        out, _ = backend.forward(case.problem(device), config, *views)
        torch.testing.assert_close(out, clean[0], atol=1e-2, rtol=1e-2)


def test_rows_far_apart(device):
    """Offsets inside one tile that 32 bits cannot hold."""
    case = Case("far", batch=1, seqlen_q=40, seqlen_k=40, heads_q=1, heads_k=1, head_dim=16)
    stride = 2**26
    try:  # most of it stays untouched
        storage = torch.empty(39 * stride + 16, dtype=torch.bfloat16, device=device)
    except RuntimeError:
        pytest.skip("needs 5 GB of address space")
    far = storage.as_strided((1, 40, 1, 16), (0, stride, 16, 1))
    q, k, v = case.inputs(device)
    for i in range(3):
        inputs = [q, k, v]
        far.copy_(inputs[i])
        inputs[i] = far
        problem = case.problem(device, needs_grad=True)
        config = TritonConfig(*[Tile(64, 64, 4, 2)] * 3)
        out, lse = backend.forward(problem, config, *inputs)
        assert_forward(out, lse, q, k, v, causal=False)
        dout = torch.randn_like(out)
        grads = backward(problem, config, *inputs, out, lse, dout)
        assert_gradients(grads, q, k, v, dout, causal=False)


def test_nan_in_hidden_keys_stays_hidden(device):
    """Behind the causal diagonal, inside a tile that other rows see."""
    case = replace(BY_NAME["causal_65"], batch=1, heads_q=1, heads_k=1, head_dim=16)
    q, k, v = case.inputs(device)
    clean, _ = backend.forward(case.problem(device), SMALL, q, k, v)
    k[:, 40] = torch.nan
    for config in (SMALL, SMALL_AHEAD):
        out, _ = backend.forward(case.problem(device), config, q, k, v)
        assert torch.equal(out[:, :40], clean[:, :40])
        assert out[:, 40:].isnan().all()


@pytest.mark.parametrize(
    "config", [SMALL, SMALL_AHEAD, replace(SMALL, splits=3)], ids=["plain", "ahead", "splits"]
)
def test_same_bits_every_time(config, device):
    case = GROUPED[1]
    q, k, v = case.inputs(device)
    problem = case.problem(device, needs_grad=True)
    dout = torch.randn(problem.out_shape, device=device).to(q)
    runs = []
    for _ in range(2 if INTERPRET else 20):
        out, lse = backend.forward(problem, config, q, k, v)
        runs.append((out, lse, *backward(problem, config, q, k, v, out, lse, dout)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize(
    "config", [SMALL, SMALL_AHEAD, replace(SMALL_AHEAD, splits=3)], ids=["plain", "ahead", "splits"]
)
def test_later_calls_read_their_own_tensors(config, device):
    """From the second call on a kernel is launched without Triton's launcher: other tensors, strides, alignments."""
    case = replace(BY_NAME["causal_65"], batch=1, heads_q=2, heads_k=1, head_dim=16)
    problem = case.problem(device, needs_grad=True)
    inputs = [case.inputs(device)] * 2
    inputs += [tuple(torch.randn_like(t) for t in case.inputs(device)) for _ in range(2)]
    inputs += [tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs[-1])]
    for offset in (1, 8, 1):  # elements: addresses that are and that are not multiples of 16 bytes
        flat = tuple(torch.randn(t.numel() + offset, device=device).to(t.dtype) for t in inputs[0])
        inputs.append(tuple(f[offset:].view(t.shape) for f, t in zip(flat, inputs[0], strict=True)))
    run = backend.prepare(problem, config)
    for q, k, v in inputs:
        with poisoned_outputs():
            out, lse = run(q, k, v, None)
        assert_forward(out, lse, q, k, v, causal=True)
        dout = torch.randn_like(out)
        grads = backward(problem, config, q, k, v, out, lse, dout)
        assert_gradients(grads, q, k, v, dout, causal=True)


@pytest.mark.parametrize("negated", [False, True])
def test_gradient_of_an_expanded_tensor(device, negated):
    """``out.sum()`` sends back a gradient of stride 0; the imaginary part of a conjugate, one with signs to change."""
    case = replace(BY_NAME["causal_65"], batch=1, heads_q=2, heads_k=1, head_dim=16)
    q, k, v = case.inputs(device)
    problem = case.problem(device, needs_grad=True)
    dout = torch.ones((), dtype=q.dtype, device=device).expand(problem.out_shape)
    dout = torch._neg_view(dout) if negated else dout
    out, lse = backend.forward(problem, AHEAD, q, k, v)
    grads = backward(problem, AHEAD, q, k, v, out, lse, dout)
    assert_gradients(grads, q, k, v, dout, causal=True)


def test_backward_of_another_backends_forward(device):
    case = GROUPED[2]
    q, k, v = case.inputs(device)
    problem = case.problem(device, needs_grad=True)
    with torch.no_grad():
        out, lse = reference.forward(problem, None, q, k, v)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    grads = backward(problem, backend.configure(problem), q, k, v, out, lse, dout)
    assert_gradients(grads, q, k, v, dout, causal=True)


# A score function with all that expressions can say.
def _everything(case: Case, device: str):
    table = torch.rand(case.batch, 1, case.seqlen_q, case.seqlen_k, device=device)
    slopes = torch.tensor([1, 0.5, 0.25, 0.125], device=device, dtype=torch.float16)
    scalar = torch.rand(1, device=device)

    def change(score, batch, head, query, key):
        near = torch.where(key - query <= 3, torch.exp(-abs(score)), torch.sqrt(abs(score) + 1.0))
        far = torch.minimum(slopes[head] * (query - key), score) / (1 + batch + 0.1 * head)
        kept = (query <= key) | (query > 2) & (score < 100)
        return torch.where(kept, near + far * table[batch, 0, query, key] - torch.log(scalar[0 * batch] + 2.0), -1.0)

    return change


SCORES = {
    "everything": _everything,
    "constant": lambda case, device: lambda score, *_: score * 0 + 0.5,
    "of_positions": lambda case, device: lambda score, batch, head, query, key: query * 0.01,
    "of_heads": lambda case, device: lambda score, batch, head, *_: score * (head + 1) * (batch + 1),
    "constants_folded": lambda case, device: lambda score, *_: score + torch.exp(score * 0) + torch.tanh(score * 0 + 2),
    "relu": lambda case, device: lambda score, *_: torch.maximum(score, score * 0.1),
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("scale", [None, -0.3, 0.0])
def test_score_functions(name, scale, device):
    case = Case("", 2, 33, 49, heads_q=4, heads_k=2, head_dim=16, scale=scale, causal=name == "relu")
    q, k, v = case.inputs(device)
    options = {**case.options(device), "score": SCORES[name](case, device)}
    spec, extras = bind(options["score"], None)
    problem = replace(case.problem(device, needs_grad=True), score=spec)
    for config in (SMALL, replace(SMALL_AHEAD, pack_gqa=True, splits=2)):
        with poisoned_outputs():
            out, lse = backend.forward(problem, config, q, k, v, *extras)
        assert_forward(out, lse, q, k, v, **options)
    if "score" not in spec.change.names or scale == 0.0:  # dq and dk are 0
        return
    dout = torch.randn_like(out)
    for config in (SMALL, APART_AHEAD):
        grads = backward(problem, config, q, k, v, out, lse, dout, None, *extras)
        assert_gradients(grads, q, k, v, dout, **options)


def test_indices_are_clamped(device):
    case = Case("", 1, 33, 49, heads_q=2, heads_k=2, head_dim=16)
    q, k, v = case.inputs(device)
    by_distance = torch.rand(2, 7, device=device)
    spec, extras = bind(lambda score, batch, head, query, key: score + by_distance[head, query - key + 3], None)
    out, lse = backend.forward(replace(case.problem(device), score=spec), SMALL, q, k, v, *extras)

    def clamped(score, batch, head, query, key):
        return score + by_distance[head, (query - key + 3).clamp(0, 6)]

    assert_forward(out, lse, q, k, v, score=clamped)


@pytest.mark.parametrize("layout", ["strided", "expanded", "negated"])
def test_what_a_score_looks_up_is_read_where_it_is(layout, device):
    case = Case("", 1, 33, 49, heads_q=2, heads_k=2, head_dim=16)
    q, k, v = case.inputs(device)
    full = torch.randn(1, 2, 49, 33, device=device)
    table = {
        "strided": full.transpose(2, 3),
        "expanded": full[..., :1].transpose(2, 3).expand(1, 2, 33, 49),
        "negated": torch._neg_view(full.transpose(2, 3)),
    }[layout]
    options = {"score": bias(table)}
    spec, extras = bind(options["score"], None)
    problem = replace(case.problem(device), score=spec)
    out, lse = backend.forward(problem, SMALL, q, k, v, *extras)
    assert_forward(out, lse, q, k, v, **options)


def test_kernels_are_shared_by_tensors_of_any_size():
    """And by calls: a function that is made twice would be compiled twice."""
    from flashcore.backends.triton.score import functions

    problems = [
        replace(BY_NAME["full_d64"].problem(), score=bind(bias(torch.rand(1, 4, n, n)), None)[0]) for n in (20, 30)
    ]
    first, second = map(functions, problems)
    assert first.change is second.change
    assert first.slope is None
    other = replace(problems[0], score=bind(softcap(20.0), None)[0])
    assert functions(other).change is not first.change


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("name", ["causal_empty_rows", "gqa_3_to_1_more_keys", "sink_empty_rows"])
def test_gradient_of_the_lse(name, strided, device):
    case = replace(BY_NAME[name], batch=1, head_dim=16)
    q, k, v = case.inputs(device)
    options = case.options(device)
    _, extras = bind(options["score"], options["sink"])
    problem = case.problem(device, needs_grad=True)
    out, lse = backend.forward(problem, SMALL, q, k, v, *extras)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    if strided:
        dlse = torch.randn(lse.shape[::-1], device=device).permute(2, 1, 0)

    def by_torch(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        out, lse = attention_math(*leaves, dtype=dtype, **options)
        return torch.autograd.grad((out, lse), leaves, (dout.to(dtype), dlse.to(dtype)))

    grads = backward(problem, SMALL, q, k, v, out, lse, dout, dlse, *extras)
    for what, grad, exact, rounded in zip("qkv", grads, by_torch(torch.float64), by_torch(q.dtype), strict=True):
        assert_as_good_as(rounded, grad, exact, f"d{what}", factor=3.0)


def test_gradient_of_sinks(device):
    """Through the public call. Rows without keys have all their weight on the sink."""
    case = replace(BY_NAME["sink_empty_rows"], batch=2, head_dim=16)
    q, k, v = case.inputs(device)
    options = case.options(device)
    sink = options.pop("sink").float().requires_grad_()
    with plan.override(config=SMALL):
        out = flashcore.attention(q, k, v, sink=sink, causal=True, backend="triton")
    dout = torch.randn_like(out)
    (dsink,) = torch.autograd.grad(out, sink, dout)
    exact = sink.detach().double().requires_grad_()
    out, _ = attention_math(q, k, v, causal=True, scale=None, sink=exact, dtype=torch.float64)
    (expected,) = torch.autograd.grad(out, exact, dout.double())
    torch.testing.assert_close(dsink.double(), expected, atol=2e-2, rtol=2e-2)


def test_a_sink_of_no_weight(device):
    """exp(-inf) is nothing, in rows without keys too."""
    case = replace(BY_NAME["causal_empty_rows"], batch=1, head_dim=16)
    q, k, v = case.inputs(device)
    sink = torch.full((case.heads_q,), -torch.inf, device=device)
    with_sink = replace(case.problem(device), score=bind(None, sink)[0])
    for config in (SMALL, replace(SMALL, splits=3)):
        out, lse = backend.forward(case.problem(device), config, q, k, v)
        same, same_lse = backend.forward(with_sink, config, q, k, v, sink)
        assert torch.equal(out, same)
        torch.testing.assert_close(lse, same_lse)
    assert gradients_of.of_sinks(sink, out, lse, torch.ones_like(out)).tolist() == [0.0] * case.heads_q


def test_through_the_public_call(device):
    """Autograd reaches the backend's own backward pass."""
    case = replace(BY_NAME["gqa_3_to_1_more_keys"], batch=1, head_dim=16)
    q, k, v = (t.requires_grad_() for t in case.inputs(device))
    explained = flashcore.explain(q, k, v, causal=True, backend="triton")
    assert (explained.backend, explained.backward.backend) == ("triton", "triton")
    with plan.override(config=SMALL):
        out, lse = flashcore.attention(q, k, v, causal=True, return_lse=True, backend="triton")
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    assert_forward(out, lse, q, k, v, causal=True)
    assert_gradients(grads, q, k, v, dout, causal=True)
