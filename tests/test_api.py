"""The public call: what it returns, remembers and leaves alone. Its numbers are the business of tests/backends."""

import inspect
import re
import threading
import timeit
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import flashcore
from flashcore import api, backends, calls
from flashcore.backends import recompute, reference
from flashcore.compat import flash_attn
from flashcore.errors import FlashCoreWarning, InvalidInputError, UnsupportedError
from flashcore.plan import override
from flashcore.problem import _warn_of_the_layout
from tests.cases import BY_NAME
from tests.tolerance import assert_forward, assert_gradients, attention_math


def inputs(seqlen_q=5, seqlen_k=7, requires_grad=False, dtype=torch.float32):
    shapes = (2, seqlen_q, 4, 16), (2, seqlen_k, 2, 16), (2, seqlen_k, 2, 16)
    return [torch.randn(shape, dtype=dtype).requires_grad_(requires_grad) for shape in shapes]


def test_returns_out_or_out_and_lse():
    q, k, v = inputs()
    out = flashcore.attention(q, k, v, causal=True)
    assert_forward(out, None, q, k, v, causal=True)
    out, lse = flashcore.attention(q, k, v, causal=True, return_lse=True)
    assert_forward(out, lse, q, k, v, causal=True)


def test_scale():
    q, k, v = inputs()
    for scale in (None, 1, 0.3, -0.3, 0.0):
        assert_forward(flashcore.attention(q, k, v, scale=scale), None, q, k, v, scale=scale)


def test_inputs_are_left_alone():
    q, k, v = BY_NAME["packed_causal"].inputs()
    before = [t.clone() for t in (q, k, v)]
    for backend in ("sdpa", "reference"):
        flashcore.attention(q, k, v, backend=backend)
    assert all(torch.equal(now, then) for now, then in zip((q, k, v), before, strict=True))


def test_explain_launches_nothing(add_backend):
    def forward(*_):
        raise AssertionError("launched")

    add_backend("fake", forward=forward)
    plan = flashcore.explain(*inputs(), causal=True)
    assert plan.backend == "fake"
    with pytest.raises(AssertionError, match="launched"):
        flashcore.attention(*inputs(), causal=True)


def test_explain_says_what_attention_does(add_backend):
    used = []

    def forward(problem, config, q, k, v):
        used.append(problem)
        return reference.forward(problem, config, q, k, v)

    add_backend("fake", forward=forward, rejects=lambda problem: None if problem.causal else "causal=False")
    for causal in (True, False):
        used.clear()
        flashcore.attention(*inputs(), causal=causal)
        plan = flashcore.explain(*inputs(), causal=causal)
        assert used == ([plan.problem] if plan.backend == "fake" else [])
        assert bool(used) == causal


# ---- what is remembered ------------------------------------------------------------------------------------------


def test_validates_and_plans_once_per_kind_of_call(monkeypatch):
    flashcore.attention(*inputs())

    def validate(*_, **__):
        raise AssertionError("validated again")

    monkeypatch.setattr(api, "_problem", validate)
    flashcore.attention(*inputs())
    q, k, v = inputs()
    flashcore.attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v)  # other strides: the same plan
    flashcore.attention(q, k, v, scale=1.0)  # nor does a plan depend on the size of the scale
    for changed in ({"causal": True}, {"scale": -1.0}, {"return_lse": True}, {"backend": "reference"}):
        with pytest.raises(AssertionError, match="validated again"):
            flashcore.attention(q, k, v, **changed)
    with pytest.raises(AssertionError, match="validated again"):
        flashcore.attention(q.requires_grad_(), k, v)


def test_backend_with_prepare_is_prepared_once(add_backend):
    prepared = []

    def prepare(problem, config):
        prepared.append(problem)
        return lambda q, k, v, scale: reference.forward(problem.scaled(scale), config, q, k, v)

    add_backend("fake", prepare=prepare, forward=None)
    for _ in range(3):
        q, k, v = inputs()
        assert_forward(flashcore.attention(q, k, v), None, q, k, v)
    assert len(prepared) == 1


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(calls, "MAX_RUNS", 4)
    for seqlen in range(1, 12):
        flashcore.attention(*inputs(seqlen_k=seqlen))
        assert len(api.runs) <= 4


def test_many_new_kinds_do_not_push_out_one_in_use(monkeypatch, add_backend):
    monkeypatch.setattr(calls, "MAX_RUNS", 8)
    prepared = []

    def prepare(problem, config):
        prepared.append(problem.seqlen_k)
        return lambda q, k, v, scale: reference.forward(problem.scaled(scale), config, q, k, v)

    add_backend("fake", prepare=prepare, forward=None)
    for seqlen in range(1, 40):
        flashcore.attention(*inputs(seqlen_k=100))
        flashcore.attention(*inputs(seqlen_k=seqlen))
    assert prepared == [100, *range(1, 40)]


def test_a_learned_scale_is_planned_and_prepared_once(add_backend):
    prepared, asked = [], []

    def prepare(problem, config):
        prepared.append(problem)
        return lambda q, k, v, scale: reference.forward(problem.scaled(scale), config, q, k, v)

    add_backend("fake", prepare=prepare, forward=None, rejects=asked.append)
    q, k, v = inputs(requires_grad=True)
    for scale in (0.3, 0.5, None, 2.0, 0.3):
        out = flashcore.attention(q, k, v, scale=scale)
        assert_forward(out.detach(), None, q, k, v, scale=scale)
        dout = torch.randn_like(out)
        assert_gradients(torch.autograd.grad(out, (q, k, v), dout), q, k, v, dout, scale=scale)
    assert len(prepared) == len(asked) == 1
    for scale in (-0.5, -2.0, 0.0, 1e-30, 7):  # other kinds
        assert_forward(flashcore.attention(q, k, v, scale=scale).detach(), None, q, k, v, scale=scale)
    assert len(asked) == 5, "of those that are not positive, and so small that kernels may not have them"


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ({"causal": 1}, {"causal": True}),
        ({"causal": 0}, {"causal": False}),
        ({"return_lse": 0}, {"return_lse": False}),
        ({"return_lse": 1.0}, {"return_lse": True}),
        ({"scale": True}, {"scale": 1}),
        ({"scale": True}, {"scale": 1.0}),
        ({"scale": float("inf")}, {"scale": 1.0}),
        ({"scale": torch.tensor(1.0)}, {"scale": 1.0}),
    ],
)
def test_validation_does_not_depend_on_what_was_called_before(bad, good):
    flashcore.attention(*inputs(), **good)
    with pytest.raises(InvalidInputError, match=next(iter(bad))):
        flashcore.attention(*inputs(), **bad)


def test_the_cpu_needs_no_gpu(monkeypatch):
    """A worker process that was forked after its parent used a GPU cannot touch CUDA."""

    def forked(*_, **__):
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    for name in ("is_available", "device_count", "get_device_capability", "get_device_properties", "_lazy_init",
                 "current_device", "is_current_stream_capturing"):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, forked)
    for backend in ("hopper", "triton"):
        for function in vars(backends.ATTENTION.load(backend)).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()
    q, k, v = inputs(requires_grad=True)
    for causal in (False, True):
        for return_lse in (False, True):
            flashcore.explain(q, k, v, causal=causal, return_lse=return_lse)
            out = flashcore.attention(q, k, v, causal=causal, return_lse=return_lse)
            (out[0] if return_lse else out).sum().backward()
    flashcore.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True)
    flash_attn.flash_attn_func(q, k, v, causal=True)
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    flashcore.linear(x, weight).sum().backward()
    flashcore.explain_matmul(x, weight.t())
    with FlopCounterMode(display=False):  # by the operators
        flashcore.attention(q, k, v).sum().backward()
        flashcore.linear(x, weight).sum().backward()


@pytest.mark.parametrize("function", [flashcore.attention, flashcore.explain])
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"softmax_scale": 0.5}, "'softmax_scale': here it is scale="),
        ({"is_causal": True}, "'is_causal': here it is causal="),
        ({"causal": True, "window_size": (5, 0)}, "'window_size': here it is window=, with None for -1"),
        ({"dropout": 0.1}, "'dropout': here it is one of q, k, v, causal, .*backend(, out)?$"),
    ],
)
def test_names_that_others_use_are_hinted_at(function, given, says):
    with pytest.raises(TypeError, match=rf"^{function.__name__}\(\) got an unexpected keyword argument {says}"):
        function(*inputs(), **given)


def test_hints_name_parameters_and_functions_that_exist():
    for name, hint in calls._ELSEWHERE.items():
        parameter, _, rest = hint.partition("=")
        parameters = inspect.signature(flashcore.attention).parameters
        assert name not in parameters
        assert parameter in parameters or hint.startswith("nothing")
        assert all(hasattr(flashcore, function) for function in re.findall(r"flashcore\.(\w+)", rest))


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "warns"),
    [
        ((1, 8, 512, 4), (1, 8, 512, 4), True),
        ((2, 16, 258, 4), (2, 4, 129, 4), True),
        ((1, 8, 128, 4), (1, 8, 128, 4), False),
        ((1, 5, 128, 4), (1, 5, 128, 4), False),
        ((1, 129, 129, 4), (1, 129, 129, 4), False),
        ((1, 1, 256, 4), (1, 512, 256, 4), False),
    ],
)
def test_a_call_that_looks_like_heads_before_positions_warns_once(q_shape, k_shape, warns):
    _warn_of_the_layout.cache_clear()
    q, k = torch.zeros(q_shape), torch.zeros(k_shape)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for causal in (False, True):
            flashcore.attention(q, k, k, causal=causal)
    assert [one.category for one in caught] == [FlashCoreWarning] * warns


def test_override_is_seen_by_the_next_call(add_backend):
    used = []

    def forward(problem, config, q, k, v):
        used.append(config)
        return reference.forward(problem, config, q, k, v)

    add_backend("fake", forward=forward, configure=lambda problem: "small")
    flashcore.attention(*inputs())
    with override(config="large"):
        flashcore.attention(*inputs())
    flashcore.attention(*inputs())
    assert used == ["small", "large", "small"]


def test_override_is_not_seen_by_other_threads(add_backend):
    add_backend("fake", configure=lambda problem: "small")
    seen = []
    with override(config="large"):
        thread = threading.Thread(target=lambda: seen.append(flashcore.explain(*inputs()).config))
        thread.start()
        thread.join()
    assert seen == ["small"]


def test_host_time_per_call(add_backend):
    """Ours is about 1.5 us around the backend; the bound only catches a slow path taken by mistake."""
    result = torch.empty(0), None
    add_backend("fake", forward=lambda problem, config, q, k, v: result)
    q, k, v = inputs()
    seconds = (
        min(timeit.repeat(lambda: flashcore.attention(q, k, v, causal=True), number=1000, repeat=5)) / 1000
    )
    assert seconds < 10e-6


# ---- nothing to multiply -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no_keys", "no_keys_causal", "no_queries", "no_batch"])
def test_empty(name):
    case = BY_NAME[name]
    q, k, v = (t.requires_grad_() for t in case.inputs())
    out, lse = flashcore.attention(q, k, v, causal=case.causal, return_lse=True)
    assert_forward(out.detach(), lse, q, k, v, causal=case.causal)
    assert out.requires_grad
    (out.sum() + lse.sum()).backward()
    for tensor in (q, k, v):
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()


# ---- gradients ---------------------------------------------------------------------------------------------------

GRADIENT_CASES = (
    "causal_65", "causal_more_keys", "causal_empty_rows", "gqa_4_to_1", "gqa_3_to_1_more_keys", "packed_causal",
    "last_strided_causal", "expanded_causal", "scale_negative", "float32", "float64_causal_empty_rows",
    "wide_values",
)  # fmt: skip


@pytest.mark.parametrize("backend", ["fake", "sdpa", "reference"])
@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradients(add_backend, backend, name):
    """Through sdpa and reference by autograd, through the fake one, a kernel to autograd, by recomputation."""
    add_backend("fake")
    case = BY_NAME[name]
    q, k, v = (t.detach().requires_grad_() for t in case.inputs())
    out = flashcore.attention(q, k, v, causal=case.causal, scale=case.scale, backend=backend)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    assert_gradients(grads, q, k, v, dout, causal=case.causal, scale=case.scale)


@pytest.mark.parametrize("backend", ["fake", "sdpa", "reference"])
def test_output_gradient_with_stride_zero(add_backend, backend):
    """What ``out.sum().backward()`` feeds: one element, expanded."""
    add_backend("fake")
    q, k, v = inputs(requires_grad=True)
    out = flashcore.attention(q, k, v, causal=True, backend=backend)
    out.sum().backward()
    assert_gradients((q.grad, k.grad, v.grad), q, k, v, torch.ones_like(out), causal=True)


@pytest.mark.parametrize("needing", [0, 1, 2])
def test_gradient_of_one_input(add_backend, needing):
    add_backend("fake")
    tensors = inputs()
    tensors[needing].requires_grad_()
    flashcore.attention(*tensors).sum().backward()
    assert [t.grad is not None for t in tensors] == [i == needing for i in range(3)]


def test_own_backward_gets_its_arguments(add_backend):
    got = {}

    def backward(problem, config, q, k, v, out, lse, dout, dlse):
        got.update(problem=problem, config=config, q=q, out=out, lse=lse, dout=dout)
        return torch.full_like(q, 1), torch.full_like(k, 2), torch.full_like(v, 3)

    add_backend("fake", backward=backward, configure=lambda problem: "config")
    q, k, v = inputs(requires_grad=True)
    out, lse = flashcore.attention(q, k, v, return_lse=True)
    dout = torch.randn_like(out)
    out.backward(dout)
    assert got["problem"] == flashcore.explain(q, k, v, return_lse=True).problem
    assert got["config"] == "config"
    for name, expected in {"q": q, "out": out, "lse": lse, "dout": dout}.items():
        assert torch.equal(got[name], expected), name
    assert [t.grad.unique().tolist() for t in (q, k, v)] == [[1], [2], [3]]


# ---- gradients of the LSE ----------------------------------------------------------------------------------------

LSE_CASES = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (3, 1)},
    "causal_window": {"causal": True, "window": (2, 0)},
    "softcap": {"score": lambda score, *_: 2.0 * torch.tanh(score / 2.0)},
    "sink": {"sink": torch.randn(4, dtype=torch.float64)},
    "window_and_sink": {"window": (2, 0), "sink": torch.randn(4, dtype=torch.float64)},
}
NOT_OF_SDPA = ("softcap", "sink", "window_and_sink")


def exact_backward(problem, config, *tensors):
    """Refuses what kernels would multiply with probabilities of 0."""
    assert not any(t.isnan().any() for t in tensors if t is not None)
    return recompute.reference.backward(problem, None, *tensors)


@pytest.fixture(params=["recomputed", "own_backward", "backward_without_dlse", "reference", "sdpa"])
def of_lse(request, add_backend):
    """A backend of each kind, by how the LSE's gradient is computed."""
    if request.param == "own_backward":
        add_backend(request.param, backward=exact_backward)
    elif request.param == "backward_without_dlse":
        add_backend(request.param, backward=exact_backward, FEATURES=frozenset(backends.FEATURES) - {"dlse"})
    elif request.param == "recomputed":
        add_backend(request.param)
    return request.param


def check_gradients_with_the_lse(backend, of_out, seqlen_k=23, **options):
    """Against autograd over operations in float64: a loss that is linear in the output, and not in the LSE."""
    leaves = [t.requires_grad_() for t in inputs(17, seqlen_k, dtype=torch.float64)]  # grouped heads
    if "sink" in options:
        leaves.append(options["sink"].clone().requires_grad_())

    def gradients(function):
        sink = {"sink": leaves[3]} if "sink" in options else {}
        out, lse = function(*leaves[:3], **{**options, **sink})
        loss = lse.double().square().sum() + (out * weights).sum() * of_out
        return torch.autograd.grad(loss, leaves, allow_unused=not of_out)

    weights = torch.randn(2, 17, 4, 16, dtype=torch.float64)
    exact = gradients(partial(attention_math, **{"causal": False, "scale": None, **options}))
    found = gradients(partial(flashcore.attention, return_lse=True, backend=backend))
    for by_us, truth in zip(found, exact, strict=True):
        truth = torch.zeros_like(by_us) if truth is None else truth  # of v, where the loss depends on the LSE alone
        torch.testing.assert_close(by_us, truth, rtol=1e-5, atol=1e-5)  # the LSE is float32
    assert found[0].abs().max() > 0.1


@pytest.mark.parametrize("of_out", [True, False])
@pytest.mark.parametrize("name", [name for name in LSE_CASES if name not in NOT_OF_SDPA])
def test_gradients_with_the_lse(of_lse, name, of_out):
    check_gradients_with_the_lse(of_lse, of_out, **LSE_CASES[name])


@pytest.mark.parametrize("of_lse", ["recomputed", "own_backward", "backward_without_dlse", "reference"], indirect=True)
@pytest.mark.parametrize("name", NOT_OF_SDPA)
def test_gradients_with_the_lse_of_scores_and_sinks(of_lse, name):
    check_gradients_with_the_lse(of_lse, True, **LSE_CASES[name])


def test_gradients_with_the_lse_of_few_keys():
    check_gradients_with_the_lse("auto", True, seqlen_k=17, causal=True)
    check_gradients_with_the_lse("auto", True, seqlen_k=18, window=(1, 0))


@pytest.mark.parametrize("needing", [0, 1, 2])
def test_gradient_of_the_lse_of_one_input(of_lse, needing):
    tensors = inputs(17, 23)
    tensors[needing].requires_grad_()
    out, lse = flashcore.attention(*tensors, return_lse=True, backend=of_lse)
    (out.sum() + lse.sum()).backward()
    assert [t.grad is not None for t in tensors] == [i == needing for i in range(3)]


def test_a_loss_without_the_lse_pays_nothing_for_it(add_backend, monkeypatch):
    got = []

    def backward(problem, config, q, k, v, out, lse, dout, dlse):
        got.append(dlse)
        return exact_backward(problem, config, q, k, v, out, lse, dout, dlse)

    add_backend("fake", backward=backward)
    q, k, v = inputs(17, 23, requires_grad=True)
    out, lse = flashcore.attention(q, k, v, return_lse=True)
    torch.autograd.grad(out.sum(), q)
    assert got == [None]
    out, lse = flashcore.attention(q, k, v, return_lse=True)
    torch.autograd.grad(lse.sum(), q)
    assert (got[1] == 1).all()
    monkeypatch.setattr(recompute.Recompute, "backward", None)
    out, lse = flashcore.attention(q, k, v, return_lse=True, backend="sdpa")
    torch.autograd.grad(out.sum(), q)
    with pytest.raises(TypeError):
        torch.autograd.grad(lse.sum(), q)


def test_queries_without_keys_have_no_gradient_of_the_lse(of_lse):
    """Whatever comes of their LSE: two of -inf are merged to NaN."""
    q, k, v = inputs(33, 20, requires_grad=True)
    out, lse = flashcore.attention(q, k, v, causal=True, return_lse=True, backend=of_lse)
    dlse = torch.randn_like(lse)
    assert lse[..., :13].isneginf().all()
    wanted = torch.autograd.grad((out, lse), (q, k, v), (out, dlse), retain_graph=True)
    dlse[..., :13] = torch.nan
    found = torch.autograd.grad((out, lse), (q, k, v), (out, dlse))
    torch.testing.assert_close(found, wanted)
    assert not found[0][:, :13].any()
    assert found[0][:, 13:].any()


def merged(parts):
    """Attention over all keys of attention over parts of them, as ring attention makes it."""
    outs, lses = zip(*parts, strict=True)
    lse = torch.stack(lses).logsumexp(dim=0)
    weights = ((one - lse).exp().transpose(1, 2)[..., None] for one in lses)
    return sum(out * weight for out, weight in zip(outs, weights, strict=True)), lse


@pytest.mark.parametrize("causal", [False, True])
def test_merged_parts_have_the_gradients_of_the_whole(of_lse, causal):
    q, k, v = (t.requires_grad_() for t in inputs(20, 40, dtype=torch.float64))
    attend = partial(flashcore.attention, backend=of_lse, return_lse=True)
    first, second = ((k[:, keys], v[:, keys]) for keys in (slice(0, 20), slice(20, 40)))
    out, lse = merged([attend(q, *first), attend(q, *second, causal=causal)])
    exact_out, exact_lse = attention_math(q, k, v, causal=causal, scale=None)
    torch.testing.assert_close((out, lse.double()), (exact_out, exact_lse), rtol=1e-6, atol=1e-6)
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum() + lse.sum(), (q, k, v))
    exact = torch.autograd.grad((exact_out * weights).sum() + exact_lse.sum(), (q, k, v))
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("of_lse", ["recomputed", "own_backward", "sdpa"], indirect=True)
def test_second_derivative_of_the_lse_is_refused(of_lse):
    q, k, v = inputs(17, 23, requires_grad=True)
    _, lse = flashcore.attention(q, k, v, return_lse=True, backend=of_lse)
    with pytest.raises(UnsupportedError, match="second derivatives"):
        torch.autograd.grad(lse.square().sum(), q, create_graph=True)


def test_second_derivative_of_the_reference_s_lse():
    tensors = [t.double().requires_grad_() for t in inputs(2, 3)]

    def attend(*tensors):
        return [t.double() for t in flashcore.attention(*tensors, causal=True, return_lse=True, backend="reference")]

    assert torch.autograd.gradgradcheck(attend, tensors, fast_mode=True, eps=1e-3, atol=1e-3)


def test_batched_gradients_of_the_lse(of_lse):
    q, k, v = inputs(17, 23, requires_grad=True)
    out, lse = flashcore.attention(q, k, v, return_lse=True, backend=of_lse)
    douts, dlses = torch.randn(3, *out.shape), torch.randn(3, *lse.shape)
    for results, given in (((out, lse), (douts, dlses)), ((lse,), (dlses,))):
        batched = torch.autograd.grad(results, (q, k), given, is_grads_batched=True, retain_graph=True)
        pairs = zip(*given, strict=True)
        one_by_one = [torch.autograd.grad(results, (q, k), one, retain_graph=True) for one in pairs]
        torch.testing.assert_close(batched, tuple(map(torch.stack, zip(*one_by_one, strict=True))))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_autograd_where_none_is_wanted(add_backend, mode):
    add_backend("fake")
    tensors = inputs(requires_grad=True)
    with mode():
        out = flashcore.attention(*tensors)
    assert not out.requires_grad
    assert flashcore.attention(*tensors).requires_grad, (
        "the call without gradients must not stand in for this one"
    )


@pytest.mark.parametrize("loss", [torch.sum, lambda out: out.square().sum()])
def test_second_derivative_is_refused(add_backend, loss):
    """Also where the output's gradient is a constant: a penalty on the gradient must not vanish without a word."""
    add_backend("fake")
    q, k, v = inputs(requires_grad=True)
    with pytest.raises(UnsupportedError, match=r'derivatives are not there\. An eager .* backend="reference"'):
        torch.autograd.grad(loss(flashcore.attention(q, k, v)), q, create_graph=True)


def test_second_derivative_of_the_reference():
    q, k, v = (t.double().detach().requires_grad_() for t in inputs(2, 3))
    assert torch.autograd.gradgradcheck(
        lambda *tensors: flashcore.attention(*tensors, causal=True, backend="reference"), (q, k, v), fast_mode=True
    )


@pytest.fixture
def opaque(add_backend):
    """A backend that reads memory, as kernels do: what has none shows."""

    def forward(problem, config, *tensors):
        assert all(t.data_ptr() for t in tensors)
        return reference.forward(problem, config, *tensors)

    def backward(problem, config, *tensors):
        assert all(t.data_ptr() for t in tensors if t is not None)
        return tuple(grad.clone() for grad in recompute.reference.backward(problem, None, *tensors))

    add_backend("opaque", forward=forward, backward=backward)


def featured(q, k, v, sink):
    score = flashcore.alibi(torch.linspace(0.1, 0.4, q.shape[2]))
    return flashcore.attention(q, k, v, window=(3, 0), score=score, sink=sink)


def plain(q, k, v, sink):
    return flashcore.attention(q, k, v * sink[0], causal=True)


@pytest.mark.parametrize("function", [plain, featured])
def test_batched_output_gradients(opaque, function):
    leaves = [*inputs(requires_grad=True), torch.randn(4, requires_grad=True)]
    out = function(*leaves)
    douts = torch.randn(3, *out.shape)
    batched = torch.autograd.grad(out, leaves, douts, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(out, leaves, dout, retain_graph=True) for dout in douts]
    torch.testing.assert_close(batched, tuple(map(torch.stack, zip(*one_by_one, strict=True))))


def test_vectorized_jacobian(opaque):
    q, k, v = (t[:1, :2, :2, :4] for t in inputs())

    def attend(q, k, v):
        return flashcore.attention(q, k, v, scale=0.3)

    jacobians = [torch.autograd.functional.jacobian(attend, (q, k, v), vectorize=yes) for yes in (False, True)]
    torch.testing.assert_close(*jacobians)
    assert jacobians[0][0].any()


def test_vectorized_jacobian_of_features(opaque):
    tensors = *(t[:1, :2, :2, :4] for t in inputs()), torch.randn(2)
    jacobians = [torch.autograd.functional.jacobian(featured, tensors, vectorize=yes) for yes in (False, True)]
    torch.testing.assert_close(*jacobians)
    assert all(jacobian.any() for jacobian in jacobians[0])


def test_tangents_of_output_gradients_are_refused(opaque):
    q, k, v = inputs(requires_grad=True)
    out = flashcore.attention(q, k, v)
    with forward_ad.dual_level(), pytest.raises(UnsupportedError, match="second derivatives"):
        torch.autograd.grad(out, q, forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out)))


# ---- company -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", ["fake", "sdpa", "reference"])
def test_autocast_casts_what_sdpa_casts(add_backend, backend, dtype):
    add_backend("fake")
    q, k, v = inputs(dtype=dtype, requires_grad=True)
    k, v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        by_torch = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        out = flashcore.attention(q, k, v, backend=backend)
        assert flashcore.explain(q, k, v).problem.dtype == str(out.dtype).removeprefix("torch.")
    assert out.dtype == by_torch.dtype
    cast = [t.to(out.dtype) for t in (q, k, v)]
    assert torch.equal(out, flashcore.attention(*cast, backend=backend))
    out.sum().backward()
    assert q.grad.dtype == dtype


def test_autocast_of_another_device_changes_nothing():
    torch.set_autocast_enabled("cuda", True)
    try:
        assert flashcore.attention(*inputs()).dtype == torch.float32
    finally:
        torch.set_autocast_enabled("cuda", False)


# ---- on a GPU ----------------------------------------------------------------------------------------------------


GPU_GRADIENT_CASES = (
    "causal_129", "full_191x127", "gqa_4_to_1", "gqa_4_to_1_causal", "mqa", "causal_d40", "causal_d256", "float16",
    "packed_causal", "bhsd_causal", "expanded_causal", "last_strided_causal", "negated_causal", "causal_long",
    "causal_more_keys", "causal_empty_rows",
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("case", [BY_NAME[name] for name in GPU_GRADIENT_CASES], ids=str)
@pytest.mark.parametrize("expanded_dout", [False, True])
@pytest.mark.filterwarnings("ignore::flashcore.errors.FlashCoreWarning")
def test_gradients_on_a_gpu(case, expanded_dout):
    """By whichever backward the plan picks: on Hopper PyTorch's flash backward, or recomputation."""
    q, k, v = (t.detach().requires_grad_() for t in case.inputs("cuda"))
    out = flashcore.attention(q, k, v, causal=case.causal, scale=case.scale)
    dout = out.new_ones(()).expand_as(out) if expanded_dout else torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    assert_gradients(grads, q, k, v, dout, causal=case.causal, scale=case.scale)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (40, 0)}], ids=str)
@pytest.mark.parametrize("backward", [None, "torch-flash"])
@pytest.mark.filterwarnings("ignore::flashcore.errors.FlashCoreWarning")
def test_merged_parts_on_a_gpu(options, backward):
    """Also where the backward pass without the LSE is one that cannot have it."""
    q, k, v = (torch.randn(2, n, 4, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for n in (256, 512, 512))
    with override(backward=backward if not options.get("window") else None):
        attend = partial(flashcore.attention, return_lse=True)
        parts = [attend(q, k[:, :256], v[:, :256]), attend(q, k[:, 256:], v[:, 256:], **options)]
        out, _ = merged(parts)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
    math = partial(attention_math, causal=False, scale=None)
    halves = [math(leaves[0], *(t[:, :256] for t in leaves[1:])),
              math(leaves[0], *(t[:, 256:] for t in leaves[1:]), **options)]  # fmt: skip
    exact = torch.autograd.grad(merged(halves)[0], leaves, dout.double())
    for grad, truth in zip(grads, exact, strict=True):
        assert (grad - truth).norm() < 1e-2 * truth.norm()
