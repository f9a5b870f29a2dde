"""The calls inside torch.compile and torch.export: one graph, any length, the results of an eager call."""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import flashcore
from flashcore import Packed, Paged, ops
from flashcore.backends import recompute, reference
from flashcore.compat.flash_attn import flash_attn_func, flash_attn_qkvpacked_func
from flashcore.errors import UnsupportedError
from flashcore.integrations import sdpa
from flashcore.mask import CAUSAL, FULL, Mask
from flashcore.plan import override
from flashcore.score import PLAIN, bind, chained
from tests.cases import BY_NAME
from tests.tolerance import assert_forward, assert_gradients

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(seqlen_q=5, seqlen_k=7, requires_grad=False, dtype=torch.float32, device="cpu"):
    shapes = (2, seqlen_q, 4, 16), (2, seqlen_k, 2, 16), (2, seqlen_k, 2, 16)
    return [torch.randn(shape, dtype=dtype, device=device).requires_grad_(requires_grad) for shape in shapes]


def compiled(function, backend="aot_eager", **options):
    """`function` compiled into one graph, and the counter of its graphs. aot_eager does all but generate code."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, fullgraph=True, **options), counter


def layer(q, k, v, **options):
    return flashcore.attention(q * 2, k, v, causal=True, **options) + 1


def exact_backward(problem, config, q, k, v, out, lse, dout, dlse, *extras):
    """A backward of a backend's own; it fails if it is not fed with the forward's output and LSE."""
    expected = reference.forward(problem, None, q, k, v, *extras)
    torch.testing.assert_close((out, lse), expected)
    return recompute.reference.backward(problem, None, q, k, v, out, lse, dout, dlse, *extras)


@pytest.fixture(params=["recomputed", "own_backward", "sdpa", "reference"])
def backend(request, add_backend):
    """One backend of each kind: autograd sees through the last two; only the second has a backward of its own."""
    if request.param == "own_backward":
        add_backend(request.param, backward=exact_backward)
    elif request.param == "recomputed":
        add_backend(request.param)
    return request.param


@pytest.mark.parametrize("requires_grad", [False, True])
def test_one_graph_with_the_results_of_an_eager_call(backend, requires_grad):
    function, counter = compiled(layer)
    tensors = inputs(requires_grad=requires_grad)
    out, expected = function(*tensors, backend=backend), layer(*tensors, backend=backend)
    torch.testing.assert_close(out, expected)
    assert out.requires_grad == requires_grad
    if requires_grad:
        dout = torch.randn_like(out)
        grads = torch.autograd.grad(out, tensors, dout)
        torch.testing.assert_close(grads, torch.autograd.grad(expected, tensors, dout))
    assert counter.frame_count == 1


def test_by_inductor():
    function, counter = compiled(layer, "inductor")
    for seqlen in (6, 9, 12):
        tensors = inputs(seqlen, seqlen, requires_grad=True)
        out, expected = function(*tensors), layer(*tensors)
        torch.testing.assert_close(out, expected)
        dout = torch.randn_like(out)
        torch.testing.assert_close(
            torch.autograd.grad(out, tensors, dout), torch.autograd.grad(expected, tensors, dout)
        )
    assert counter.frame_count == 2, "the second length makes the graph dynamic, the third changes nothing"


@pytest.mark.parametrize("requires_grad", [False, True])
def test_one_graph_for_all_lengths(add_backend, requires_grad):
    seen = []

    def forward(problem, config, q, k, v):
        seen.append((problem.seqlen_q, problem.seqlen_k))
        return reference.forward(problem, config, q, k, v)

    add_backend("fake", forward=forward)
    function, counter = compiled(layer)
    lengths = [(5, 7), (8, 8), (64, 200), (300, 9)]
    for seqlen_q, seqlen_k in lengths:
        tensors = inputs(seqlen_q, seqlen_k, requires_grad)
        for tensor in tensors:
            torch._dynamo.mark_dynamic(tensor, 1)
        out = function(*tensors)
        if requires_grad:
            out.sum().backward()
    assert counter.frame_count == 1
    assert seen == lengths


def test_lse(backend):
    def both(q, k, v):
        return flashcore.attention(q, k, v, return_lse=True, backend=backend)

    q, k, v = inputs(17, 23, requires_grad=True)
    out, lse = compiled(both)[0](q, k, v)
    assert_forward(out.detach(), lse.detach(), q, k, v)
    losses = out.sum() + lse.square().sum(), lse.square().sum(), out.sum()
    expected = both(q, k, v)
    wanted = expected[0].sum() + expected[1].square().sum(), expected[1].square().sum(), expected[0].sum()
    for pair in zip(losses, wanted, strict=True):
        torch.testing.assert_close(*(torch.autograd.grad(loss, (q, k), retain_graph=True) for loss in pair))
    with torch.no_grad():
        assert_forward(*compiled(both)[0](q, k, v), q, k, v)


@pytest.mark.parametrize(
    "name", ["no_keys", "no_queries", "causal_empty_rows", "packed_causal", "expanded_causal"]
)
def test_cases(name):
    case = BY_NAME[name]
    q, k, v = (t.requires_grad_() for t in case.inputs())
    out = compiled(lambda q, k, v: flashcore.attention(q, k, v, causal=case.causal))[0](q, k, v)
    assert_forward(out.detach(), None, q, k, v, causal=case.causal)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    if case.problem().is_empty:
        assert not any(grad.any() for grad in grads)
    else:
        assert_gradients(grads, q, k, v, dout, causal=case.causal)


def _slopes_of_heads(score, batch, head, query, key):
    return torch.where(key <= query + 3, torch.tanh(score) * SLOPES[head], -torch.inf)


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
FEATURES = {
    "window": lambda: {"window": (3, 1)},
    "causal_window": lambda: {"window": (2, 0), "causal": True},
    "softcap": lambda: {"score": flashcore.softcap(2.0)},
    "alibi": lambda: {"score": flashcore.alibi(SLOPES), "causal": True},
    "bias": lambda: {"score": flashcore.bias(BIAS * 2)},
    "function": lambda: {"score": _slopes_of_heads},
    "lookup": lambda: {"score": lambda score, *at: score * flashcore.lookup(BIAS, *at)},
    "sink": lambda: {"sink": SINK * 2, "window": (4, 0)},
    "all": lambda: {"score": chained(flashcore.softcap(2.0), flashcore.bias(BIAS)), "sink": SINK, "window": (3, 0)},
}
BIAS, SINK = torch.randn(1, 4, 5, 7), torch.randn(4, requires_grad=True)


@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("name", FEATURES)
def test_features_in_one_graph(name, made_inside):
    """Score functions, too, are traced: what they look up is an input of the graph."""
    made = FEATURES[name]()
    wide = torch.randn(2, 7, 2, 24, requires_grad=True)

    def program(q, k, v):
        options = FEATURES[name]() if made_inside else made
        return flashcore.attention(q * 2, k, v, **options) + 1

    function, counter = compiled(program)
    q, k, _ = inputs(requires_grad=True)
    leaves = [q, k, wide, *([SINK] if "sink" in made else [])]
    out, expected = function(q, k, wide), program(q, k, wide)
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves, dout, retain_graph=True))
    assert all(grad.any() for grad in grads)
    assert counter.frame_count == 1


def test_features_of_any_lengths_in_one_graph(add_backend):
    seen = []

    def forward(problem, config, *tensors):
        seen.append((problem.seqlen_q, problem.seqlen_k, problem.mask, problem.score.captured[1][1]))
        return reference.forward(problem, config, *tensors)

    add_backend("fake", forward=forward)

    def program(q, k, v, table, window):
        score = chained(flashcore.alibi(SLOPES), flashcore.bias(table))
        return flashcore.attention(q, k, v, score=score, sink=SINK, window=window)

    function, counter = compiled(program, dynamic=True)
    lengths = [(5, 7), (64, 200), (300, 9)]
    for seqlen_q, seqlen_k in lengths:
        table, window = torch.randn(1, 4, seqlen_q, seqlen_k), (seqlen_q, 2)
        arguments = *inputs(seqlen_q, seqlen_k, requires_grad=True), table, window
        found, expected = function(*arguments), program(*arguments)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(out.sum(), (arguments[1], SINK)) for out in (found, expected)))
    assert counter.frame_count == 1
    assert seen[::2] == seen[1::2] == [(q, k, Mask(q, 2), (1, 4, q, k)) for q, k in lengths]


def packed_inputs(total_q=10, total_k=14):
    shapes = (total_q, 4, 16), (total_k, 2, 16), (total_k, 2, 16)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def lengths(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


PACKED = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (3, 1)},
    "softcap": {"score": flashcore.softcap(2.0)},
    "alibi": {"score": flashcore.alibi(torch.rand(2, 4)), "causal": True},
    "sink": {"sink": torch.randn(4, requires_grad=True), "window": (4, 0)},
}
ALL = Packed(lengths(0, 4, 9), 5), Packed(lengths(0, 6, 13), 8)
USED = Packed(lengths(1, 4, 9), 5, lengths(3, 2)), Packed(lengths(0, 6, 13), 8, lengths(5, 7))


@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("places", [ALL, USED, (ALL[0], USED[1])], ids=["all", "used", "used_keys"])
@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences_in_one_graph(name, places, made_inside):
    options = PACKED[name]

    def program(q, k, v, queries, keys):
        if made_inside:
            queries, keys = (Packed(rows.offsets, rows.longest, rows.used) for rows in (queries, keys))
        out, lse = flashcore.attention(q * 2, k, v, queries=queries, keys=keys, return_lse=True, **options)
        return out + 1, lse

    function, counter = compiled(program)
    tensors = packed_inputs()
    leaves = [*tensors, *([options["sink"]] if "sink" in options else [])]
    (out, lse), expected = function(*tensors, *places), program(*tensors, *places)
    torch.testing.assert_close((out, lse), expected)
    douts = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), leaves, douts)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves, douts))
    assert all(grad.any() for grad in grads)
    assert counter.frame_count == 1


def test_packed_sequences_of_any_lengths_in_one_graph(add_backend):
    seen = []

    def forward(problem, config, *tensors):
        seen.append((problem.batch, problem.queries.total, problem.keys.total, problem.seqlen_q, problem.seqlen_k))
        return reference.forward(problem, config, *tensors)

    add_backend("fake", forward=forward)

    def program(q, k, v, queries, keys):
        return flashcore.attention(q, k, v, causal=True, score=flashcore.softcap(2.0), queries=queries, keys=keys)

    function, counter = compiled(program, dynamic=True)
    cases = [
        ((0, 4, 10), (0, 5, 14), 7, 9), ((0, 3, 30, 40), (0, 20, 60, 90), 27, 50),
        ((0, 5, 5, 6, 9), (0, 2, 3, 7, 8), 6, 4),
    ]  # fmt: skip
    for offsets_q, offsets_k, longest_q, longest_k in cases:
        tensors = packed_inputs(offsets_q[-1], offsets_k[-1])
        places = Packed(lengths(*offsets_q), longest_q), Packed(lengths(*offsets_k), longest_k)
        found, expected = function(*tensors, *places), program(*tensors, *places)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(out.sum(), tensors) for out in (found, expected)))
    assert counter.frame_count == 1
    bounds = [(len(q) - 1, q[-1], k[-1], longest_q, longest_k) for q, k, longest_q, longest_k in cases]
    assert seen[::2] == seen[1::2] == bounds


def test_packed_sequences_by_inductor():
    def program(q, k, v, offsets, longest):
        rows = Packed(offsets, longest)
        return flashcore.attention(q * 2, k, v, causal=True, queries=rows, keys=rows) + 1

    function, counter = compiled(program, "inductor", dynamic=True)
    for offsets, longest in (((0, 4, 10), 6), ((0, 13, 14, 40), 30)):
        arguments = *packed_inputs(offsets[-1], offsets[-1]), lengths(*offsets), longest
        found, expected = function(*arguments), program(*arguments)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(out.sum(), arguments[:3]) for out in (found, expected)))
    assert counter.frame_count == 1


def pages_of(*shape):
    """k and v: keys in pages of 16 rows."""
    return [torch.randn(*shape, 2, 16) for _ in range(2)]


PAGES = Paged(torch.tensor([[3, 0, 2], [1, 4, -1]], dtype=torch.int32), lengths(40, 17), 45)


@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("queries", [ALL[0], USED[0]], ids=["all", "used"])
@pytest.mark.parametrize("name", PACKED)
def test_pages_in_one_graph(name, queries, made_inside):
    options = {key: t.detach() if isinstance(t, torch.Tensor) else t for key, t in PACKED[name].items()}

    def program(q, k, v, queries, keys):
        if made_inside:
            keys = Paged(keys.table, keys.lengths, keys.longest)
        out, lse = flashcore.attention(q * 2, k, v, queries=queries, keys=keys, return_lse=True, **options)
        return out + 1, lse

    function, counter = compiled(program)
    arguments = torch.randn(10, 4, 16), *pages_of(5, 16), queries, PAGES
    for _ in range(2):
        torch.testing.assert_close(function(*arguments), program(*arguments))
        PAGES.lengths.copy_(lengths(25, 30))  # read when the graph runs
    PAGES.lengths.copy_(lengths(40, 17))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_pages_of_any_number_in_one_graph(backend):
    def program(q, k, v, offsets, table, used, longest):
        queries, keys = Packed(offsets, q.shape[0]), Paged(table, used, longest)
        return flashcore.attention(q * 2, k, v, causal=True, queries=queries, keys=keys) + 1

    function, counter = compiled(program, backend, dynamic=True)
    cases = [  # sizes that are the same in the first one are the same symbol
        ((0, 4, 9, 10, 10, 15, 20), (11, 48), 3, (140, 17, 49, 1, 0, 96), 145),
        ((0, 3, 30, 41), (9, 32), 2, (63, 64, 7), 63),
    ]
    for offsets, pages, width, used, longest in cases:
        numbers = torch.randint(pages[0], (len(used), width), dtype=torch.int32)
        arguments = torch.randn(offsets[-1], 4, 16), *pages_of(*pages), lengths(*offsets), numbers, lengths(*used)
        torch.testing.assert_close(function(*arguments, longest), program(*arguments, longest))
    assert counter.frame_count == 1


def test_pages_have_no_gradients_in_a_graph():
    q = torch.randn(10, 4, 16, requires_grad=True)
    function, _ = compiled(lambda q, k, v: flashcore.attention(q, k, v, queries=ALL[0], keys=PAGES))
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="paged keys have no backward pass"):
        function(q, *pages_of(5, 16))
    with torch.no_grad():
        assert not function(q, *pages_of(5, 16)).requires_grad


@pytest.mark.parametrize("strict", [True, False])
def test_export_of_pages(strict):
    class Layer(torch.nn.Module):
        def forward(self, q, k, v, offsets, table, used):
            queries, keys = Packed(offsets, q.shape[0]), Paged(table, used, table.shape[1] * k.shape[1])
            return flashcore.attention(q, k, v, causal=True, queries=queries, keys=keys)

    total, batch, count, width = (torch.export.Dim(name, min=2) for name in ("total", "batch", "count", "width"))
    dynamic = {0: total}, {0: count}, {0: count}, {0: batch + 1}, {0: batch, 1: width}, {0: batch}
    example = torch.randn(10, 4, 16), *pages_of(5, 16), lengths(0, 4, 10), PAGES.table, PAGES.lengths
    program = torch.export.export(Layer(), example, dynamic_shapes=dynamic, strict=strict)
    table = torch.tensor([[6, 5], [2, 1], [0, 3]], dtype=torch.int32)
    others = torch.randn(33, 4, 16), *pages_of(7, 16), lengths(0, 5, 10, 33), table, lengths(10, 1, 30)
    torch.testing.assert_close(program.module()(*others), Layer()(*others))


def test_numbers_of_a_score_are_constants_of_a_graph():
    def program(q, k, v, cap, shift):
        return flashcore.attention(q, k, v, score=lambda s, *at: flashcore.softcap(cap)(s, *at) + at[3] * shift)

    function, _ = compiled(program)
    tensors = inputs()
    for cap, shift in ((2.0, 1), (3.0, 2), (4.0, 3)):
        torch.testing.assert_close(function(*tensors, cap, shift), program(*tensors, cap, shift))


def test_features_by_inductor():
    def program(q, k, v):
        return flashcore.attention(q * 2, k, v, score=flashcore.alibi(SLOPES * 2), sink=SINK, window=(3, 0)) + 1

    tensors = inputs(requires_grad=True)
    out, expected = compiled(program, "inductor")[0](*tensors), program(*tensors)
    torch.testing.assert_close(out, expected)
    leaves = [*tensors, SINK]
    torch.testing.assert_close(torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(expected.sum(), leaves))


def test_a_score_function_that_dynamo_cannot_trace_breaks_the_graph():
    """Dynamo does not dispatch on several indices. A program that need not be one graph runs all the same."""

    def program(q, k, v):
        return flashcore.attention(q, k, v, score=lambda score, *at: score + BIAS[at])

    tensors = inputs()
    torch.testing.assert_close(torch.compile(program, backend="aot_eager")(*tensors), program(*tensors))


def test_learned_look_ups_are_refused_while_tracing():
    learned = SLOPES.clone().requires_grad_()
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="requires a gradient"):
        compiled(lambda q, k, v: flashcore.attention(q, k, v, score=flashcore.alibi(learned)))[0](*inputs())


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside):
    """In the graph or around it: as the same program does it without a compiler."""

    def program(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            return flashcore.attention(q, k, v), F.scaled_dot_product_attention(q, q, q)

    q, k, v = inputs(requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
        out, by_torch = compiled(program)[0](q, k, v)
        expected, _ = program(q, k, v)
    assert out.dtype == by_torch.dtype == expected.dtype == (torch.bfloat16 if inside else torch.float32)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert q.grad.dtype == torch.float32


def test_override_decides_when_the_graph_runs(add_backend):
    add_backend("fake", forward=None)
    function, counter = compiled(layer)
    tensors = inputs()
    for backend in ("sdpa", "reference"):
        with override(backend=backend):
            torch.testing.assert_close(function(*tensors), layer(*tensors))
    assert counter.frame_count == 1


def test_invalid_arguments_are_named_while_tracing():
    q, k, v = inputs()
    with pytest.raises(RuntimeError, match="k and v must have one seqlen"):
        compiled(flashcore.attention)[0](q, k, v[:, 1:])
    with pytest.raises(RuntimeError, match=r"sink must be \(4,\)"):
        compiled(flashcore.attention)[0](q, k, v, sink=torch.zeros(3))
    with pytest.raises(RuntimeError, match="looks up head in a dimension of size"):
        compiled(lambda q, k, v: flashcore.attention(q, k, v, score=flashcore.alibi(SLOPES[1:])))[0](q, k, v)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"queries": ALL[0]}, "keys are dense and the others packed"),
        ({"queries": ALL[0], "keys": [0, 6, 13]}, r"keys must be flashcore.Packed, .* or None \(given \[0, 6, 13\]\)"),
        ({"queries": ALL[0], "keys": Packed(lengths(0, 13), 13)}, r"one number of sequences \(given 2 and 1\)"),
        ({"queries": ALL[0], "keys": ALL[1], "sink": torch.zeros(3)}, r"sink must be \(4,\)"),
        ({"queries": ALL[0], "keys": ALL[1], "score": flashcore.alibi(torch.ones(3, 4))}, "batch in a dimension of"),
    ],
    ids=["one_side", "list", "batch", "sink", "slopes"],
)
def test_invalid_packed_sequences_are_named_while_tracing(places, message):
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match=message):
        compiled(lambda q, k, v: flashcore.attention(q, k, v, **places))[0](*packed_inputs())


def test_dense_tensors_are_no_packed_ones_while_tracing():
    tensors = [t[None] for t in packed_inputs()]
    with pytest.raises(RuntimeError, match="q of packed sequences must have 3 dimensions"):
        compiled(lambda q, k, v: flashcore.attention(q, k, v, queries=ALL[0], keys=ALL[1]))[0](*tensors)


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return layer(q, k, v)

    seqlen_q, seqlen_k = torch.export.Dim("seqlen_q"), torch.export.Dim("seqlen_k")
    dynamic = ({1: seqlen_q}, {1: seqlen_k}, {1: seqlen_k})
    program = torch.export.export(Layer(), tuple(inputs()), dynamic_shapes=dynamic)
    tensors = inputs(33, 21)
    torch.testing.assert_close(program.module()(*tensors), layer(*tensors))


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_features(recwarn, strict):
    class Layer(torch.nn.Module):
        def forward(self, q, k, v, table, sink):
            score = chained(flashcore.softcap(2.0), flashcore.bias(table))
            return flashcore.attention(q, k, v, score=score, sink=sink, window=(3, 0))

    seqlen_q, seqlen_k = torch.export.Dim("seqlen_q", min=2), torch.export.Dim("seqlen_k", min=2)
    dynamic = ({1: seqlen_q}, {1: seqlen_k}, {1: seqlen_k}, {2: seqlen_q, 3: seqlen_k}, None)
    example = *inputs(), BIAS, SINK.detach()
    program = torch.export.export(Layer(), example, dynamic_shapes=dynamic, strict=strict)
    assert not recwarn, "such as of side effects, which traces of score functions do not have"
    others = *inputs(33, 21), torch.randn(1, 4, 33, 21), torch.randn(4)
    torch.testing.assert_close(program.module()(*others), Layer()(*others))


@pytest.mark.parametrize("strict", [True, False])
def test_export_of_packed_sequences(strict):
    """Also where the number of all rows, which is a symbol, is the bound of one sequence's."""

    class Layer(torch.nn.Module):
        def forward(self, q, k, v, offsets_q, offsets_k, used):
            queries, keys = Packed(offsets_q, q.shape[0]), Packed(offsets_k, k.shape[0], used)
            return flashcore.attention(q, k, v, causal=True, queries=queries, keys=keys)

    total_q, total_k, batch = (torch.export.Dim(name, min=2) for name in ("total_q", "total_k", "batch"))
    dynamic = {0: total_q}, {0: total_k}, {0: total_k}, {0: batch + 1}, {0: batch + 1}, {0: batch}
    example = *(t.detach() for t in packed_inputs()), lengths(0, 4, 10), lengths(0, 6, 14), lengths(5, 8)
    program = torch.export.export(Layer(), example, dynamic_shapes=dynamic, strict=strict)
    others = [t.detach() for t in packed_inputs(33, 44)]
    others += [lengths(0, 5, 10, 33), lengths(0, 10, 12, 44), lengths(10, 1, 30)]
    torch.testing.assert_close(program.module()(*others), Layer()(*others))


def test_eager_calls_do_not_use_operators():
    code = """
import sys, torch, flashcore
q = torch.randn(1, 4, 2, 8, requires_grad=True)
flashcore.attention(q, q, q).sum().backward()
flashcore.linear(q, q[0, 0]).sum().backward()
print([name for name in ("flashcore.ops", "torch._dynamo") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_flops_are_counted():
    """As many as PyTorch counts for the products that its own operations are made of."""
    q, k, v = inputs(9, 9)
    with FlopCounterMode(display=False) as theirs, sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), enable_gqa=True)
    with FlopCounterMode(display=False) as ours:
        flashcore.attention(q, k, v)
    assert ours.get_total_flops() == theirs.get_total_flops() > 0
    with FlopCounterMode(display=False) as ours:
        flashcore.attention(q.requires_grad_(), k, v).sum().backward()
    assert ours.get_total_flops() == 3.5 * theirs.get_total_flops()
    wide = torch.randn(2, 9, 2, 24)  # values: of the five products of the backward pass, they take part in two
    with FlopCounterMode(display=False) as ours:
        out = flashcore.attention(q, k, wide)
    forward = ours.get_total_flops()
    with FlopCounterMode(display=False) as ours:
        out.sum().backward()
    assert ours.get_total_flops() / forward == (3 * 16 + 2 * 24) / (16 + 24)


@pytest.mark.parametrize(
    ("longest_q", "longest_k", "scores"), [(5, 7, 70), (10, 3, 30), (2, 14, 28), (10, 14, 140), (99, 99, 140)]
)
def test_flops_of_packed_sequences_are_bounded(longest_q, longest_k, scores):
    """By what each row, and all of them together, may have to do with."""
    places = {"queries": Packed(lengths(0, 4, 10), longest_q), "keys": Packed(lengths(0, 6, 14), longest_k)}
    q, k, _ = packed_inputs()
    v = torch.randn(14, 2, 24)
    with FlopCounterMode(display=False) as forward:
        out = flashcore.attention(q, k, v, **places)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == 2 * 4 * scores * (16 + 24)
    assert backward.get_total_flops() == 2 * 4 * scores * (3 * 16 + 2 * 24)


@pytest.mark.parametrize("shapes", [((5, 7), (7, 6)), ((3, 5, 7), (7, 6)), ((5, 7), (3, 7, 6)), ((3, 5, 7), (3, 7, 6))])
def test_flops_of_products_are_counted(shapes):
    a, b = (torch.randn(shape) for shape in shapes)
    with FlopCounterMode(display=False) as theirs:
        torch.matmul(a, b)
    with FlopCounterMode(display=False) as ours:
        flashcore.matmul(a, b)
    assert ours.get_total_flops() == theirs.get_total_flops() > 0


# ---- the operators -----------------------------------------------------------------------------------------------

OPCHECK = {
    "full": ({}, {}),
    "grad": ({"requires_grad": True}, {}),
    "causal_grad": ({"requires_grad": True}, {"causal": True, "scale": 0.3}),
    "lse": ({}, {"return_lse": True}),
    "lse_grad": ({"requires_grad": True}, {"return_lse": True, "causal": True}),
    "half": ({"dtype": torch.bfloat16, "requires_grad": True}, {}),
    "empty": ({"seqlen_k": 0, "requires_grad": True}, {}),
    "window": ({"requires_grad": True}, {"window": (3, 1)}),
    "softcap": ({"requires_grad": True}, {"score": flashcore.softcap(2.0), "causal": True}),
    "alibi": ({"requires_grad": True}, {"score": flashcore.alibi(torch.rand(4))}),
    "bias": ({"requires_grad": True}, {"score": flashcore.bias(torch.randn(1, 4, 5, 7)), "window": (4, 0)}),
    "sink": ({"requires_grad": True}, {"sink": torch.randn(4, requires_grad=True), "return_lse": True}),
    "head_dim_v": ({"requires_grad": True}, {"head_dim_v": 24}),
    "packed": ({}, {"packed": ALL}),
    "packed_grad": ({"requires_grad": True}, {"packed": ALL, "causal": True, "return_lse": True}),
    "packed_used": ({"requires_grad": True}, {"packed": USED, "window": (3, 1)}),
    "packed_used_keys": ({"requires_grad": True}, {"packed": (ALL[0], USED[1]), "score": flashcore.softcap(2.0)}),
    "packed_sink": (
        {"requires_grad": True},
        {"packed": ALL, "sink": torch.randn(4, requires_grad=True), "score": flashcore.alibi(torch.rand(2, 4))},
    ),
    "paged": ({"seqlen_k": 16}, {"packed": (ALL[0], PAGES), "return_lse": True, "score": flashcore.softcap(2.0)}),
    "packed_empty": ({"seqlen_k": 0, "requires_grad": True}, {"packed": (ALL[0], Packed(lengths(0, 0, 0), 0))}),
}


def arguments(shape: dict, options: dict, backend: str) -> tuple:
    """Of the forward operator, in its schema's order."""
    left, right = options.get("window", (None, None))
    spec, captured = bind(options.get("score"), None)
    head_dim_v = options.get("head_dim_v", 16)
    q, k, v = inputs(**shape)
    v = torch.randn(*v.shape[:3], head_dim_v, dtype=v.dtype).requires_grad_(v.requires_grad)
    packed = options.get("packed", ())
    paged = packed and isinstance(packed[1], Paged)  # two pages: what the table names beyond is zeros
    if packed:
        seen = [t if paged and t is not q else t.flatten(0, 1) for t in (q, k, v)]
        q, k, v = (t.detach().requires_grad_(q.requires_grad) for t in seen)
    places = [None] * 6
    if packed:
        queries, keys = packed
        of_keys = [None, None, keys.table, keys.lengths] if paged else [keys.offsets, keys.used, None, None]
        places = [queries.offsets, queries.used, *of_keys]
    longest = [rows.longest for rows in packed] or [None] * 2
    return (
        q, k, v, *places, list(captured) or None, options.get("sink"), *longest,
        left, 0 if options.get("causal") else right, options.get("scale"),
        None if spec.change is None else spec.change.text, shape.get("requires_grad", False),
        options.get("return_lse", False), backend,
    )  # fmt: skip


@pytest.mark.parametrize("name", OPCHECK)
def test_forward_operator(add_backend, name):
    add_backend("fake")
    shape, options = OPCHECK[name]
    torch.library.opcheck(torch.ops.flashcore.attention_forward, arguments(shape, options, "auto"))


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_forward_operator_of_differentiable_backends(backend):
    shape, options = OPCHECK["causal_grad"]
    torch.library.opcheck(torch.ops.flashcore.attention_forward, arguments(shape, options, backend))


@pytest.mark.parametrize("name", ["grad", "causal_grad", "half", "empty", "window", "head_dim_v"])
def test_backward_operator(backend, name):
    check_backward_operator(backend, name)


@pytest.mark.parametrize("backend", ["recomputed", "own_backward", "reference"], indirect=True)
@pytest.mark.parametrize("name", ["softcap", "alibi", "bias", "sink", "packed_grad", "packed_used", "packed_sink"])
def test_backward_operator_with_more_tensors(backend, name):
    check_backward_operator(backend, name)


def check_backward_operator(backend, name):
    shape, options = OPCHECK[name]
    q, k, v, *rest = arguments(shape, options, backend)
    q, k, v = (t.detach() for t in (q, k, v))
    rest = [t.detach() if isinstance(t, torch.Tensor) else t for t in rest]
    out, lse = torch.ops.flashcore.attention_forward(q, k, v, *rest)
    expanded = out.new_ones(()).expand_as(out)
    for dout in (torch.randn_like(out), expanded):
        for dlse in (None, torch.randn_like(lse)):
            torch.library.opcheck(torch.ops.flashcore.attention_backward, (dout, dlse, q, k, v, out, lse, *rest))


@pytest.mark.parametrize("loss", [torch.sum, lambda out: out.square().sum()])
def test_second_derivative_is_refused(loss):
    tensors = inputs(requires_grad=True)
    options = (), FULL, None, PLAIN, (), False, "auto"
    out, lse = ops.attention(*tensors, *options)
    with pytest.raises(UnsupportedError, match="second derivatives are not there"):
        torch.autograd.grad(loss(out), tensors[0], create_graph=True)
    (dq, _, _) = ops.attention_backward(torch.ones_like(out), None, *tensors, out, lse, *options)
    with pytest.raises(UnsupportedError, match="second derivatives are not there"):
        dq.sum().backward()


@pytest.mark.parametrize("packed", [(), USED], ids=["dense", "packed"])
def test_batched_output_gradients(packed):
    q, k, v = packed_inputs() if packed else inputs(requires_grad=True)
    out, _ = ops.attention(q, k, v, (), CAUSAL, None, PLAIN, packed, False, "auto")
    douts = torch.randn(3, *out.shape)
    batched = torch.autograd.grad(out, (q, k, v), douts, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(out, (q, k, v), dout, retain_graph=True) for dout in douts]
    torch.testing.assert_close(batched, tuple(map(torch.stack, zip(*one_by_one, strict=True))))


@pytest.mark.parametrize("features", ["", "window and score", "packed"])
def test_compiled_autograd_over_an_eager_forward(add_backend, features):
    """The backward pass is an operator in its graph: a compiler that traced into a launch would find no code in it."""
    ran = []

    def backward(problem, config, *tensors):
        assert not torch.compiler.is_compiling()
        ran.append(all(t.data_ptr() for t in tensors if t is not None))
        return tuple(grad.clone() for grad in recompute.reference.backward(problem, None, *tensors))

    add_backend("fake", backward=backward)
    weight = torch.randn(6, 16, requires_grad=True)

    options = {"window": (3, 0), "score": flashcore.alibi(SLOPES)} if features else {"causal": True}
    if features == "packed":
        options |= dict(zip(("queries", "keys"), USED, strict=True))

    def run():
        tensors = [t.detach().requires_grad_() for t in plain]
        sink = SINK.detach().requires_grad_()
        out = flashcore.attention(*tensors, scale=0.3, sink=sink if features else None, **options)
        return [*tensors, weight, *([sink] if features else [])], flashcore.linear(out, weight)

    plain = packed_inputs() if features == "packed" else inputs()
    dout = torch.randn(*plain[0].shape[:-1], 6)
    leaves, out = run()
    expected = torch.autograd.grad(out, leaves, dout)
    leaves, out = run()
    weight.grad = None
    compile = partial(torch.compile, backend="aot_eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compile):
        out.backward(dout)
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(expected))
    assert ran == [True, True]


PACKAGE = """
import sys, torch, flashcore
from torch._inductor import aoti_compile_and_package

class Layer(torch.nn.Module):
    def forward(self, q, k, v):
        return flashcore.attention(q * 2, k, v, causal=True) + 1

device, path = sys.argv[1:]
tensors = tuple(torch.ones(2, 5, 4, 16, device=device, dtype=torch.bfloat16) for _ in range(3))
dynamic = ({1: torch.export.Dim("seqlen")},) * 3
aoti_compile_and_package(torch.export.export(Layer(), tensors, dynamic_shapes=dynamic), package_path=path)
"""

LOAD = """
import sys, torch, flashcore.ops
from torch._inductor import aoti_load_package

device, path = sys.argv[1:]
q, k, v = torch.randn(3, 2, 9, 4, 16, device=device, dtype=torch.bfloat16)
expected = flashcore.attention(q * 2, k, v, causal=True) + 1
torch.testing.assert_close(aoti_load_package(path)(q, k, v), expected)
"""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_aot_inductor_package(tmp_path, device):
    """Made by one program and loaded by another, which imports the operators first."""
    for program in (PACKAGE, LOAD):
        command = [sys.executable, "-W", "ignore", "-c", program, device, str(tmp_path / "layer.pt2")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]


# ---- the same through other names ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"attn_mask": torch.zeros(5, 5)}, {"scale": 0.5}],
    ids=["full", "causal", "mask", "scale"],
)
def test_sdpa(options):
    function, counter = compiled(flashcore.scaled_dot_product_attention)
    tensors = [torch.randn(2, 4, 5, 16, requires_grad=True) for _ in range(3)]
    out, expected = function(*tensors, **options), F.scaled_dot_product_attention(*tensors, **options)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), tensors), torch.autograd.grad(expected.sum(), tensors)
    )
    assert counter.frame_count == 1


def test_sdpa_of_any_lengths_stays_flashcores(add_backend):
    """Also where the keys are no divisor, or no multiple, of the queries."""
    used = []

    def forward(problem, config, q, k, v):
        used.append((problem.seqlen_q, problem.seqlen_k))
        return reference.forward(problem, config, q, k, v)

    add_backend("fake", forward=forward)
    function, counter = compiled(flashcore.scaled_dot_product_attention)
    lengths = [*((1, seqlen_k) for seqlen_k in range(9, 20)), (6, 9), (9, 6), (7, 7), (12, 5)]
    for seqlen_q, seqlen_k in lengths:
        query, *keys = torch.randn(2, 4, seqlen_q, 16), *torch.randn(2, 2, 4, seqlen_k, 16)
        torch.testing.assert_close(function(query, *keys), F.scaled_dot_product_attention(query, *keys))
    assert used == lengths
    assert counter.frame_count <= 3


def test_sdpa_with_heads_that_are_no_multiple_raises_pytorchs_error():
    tensors = torch.randn(2, 4, 3, 16), *torch.randn(2, 2, 3, 3, 16)
    with pytest.raises(RuntimeError, match=r"[Nn]umber of heads"):
        flashcore.scaled_dot_product_attention(*tensors, enable_gqa=True)
    with pytest.raises(RuntimeError, match=r"[Nn]umber of heads"):
        compiled(flashcore.scaled_dot_product_attention)[0](*tensors, enable_gqa=True)


def test_sdpa_with_what_only_pytorch_knows():
    function, _ = compiled(flashcore.scaled_dot_product_attention)
    for tensors in ([torch.randn(4, 5, 16)] * 3, [torch.randn(2, 4, 5, 16), *[torch.randn(1, 4, 5, 16)] * 2]):
        torch.testing.assert_close(function(*tensors), F.scaled_dot_product_attention(*tensors))


def test_unmodified_program_that_is_compiled(add_backend):
    """Replacing PyTorch's function is seen by a program that was compiled before, and so is its return."""
    used = []

    def forward(problem, config, q, k, v):
        used.append(problem)
        return reference.forward(problem, config, q, k, v)

    add_backend("fake", forward=forward)

    def program(x):
        return F.scaled_dot_product_attention(x, x, x, is_causal=True) + 1

    function, _ = compiled(program)
    x = torch.randn(2, 4, 5, 16)
    expected = function(x)
    with sdpa.replace_torch():
        torch.testing.assert_close(function(x), expected)
    assert len(used) == 1
    function(x)
    assert len(used) == 1


@pytest.mark.parametrize("requires_grad", [False, True])
def test_deterministic_flash_attn(requires_grad):
    q, k, v = inputs(requires_grad=requires_grad)
    torch.use_deterministic_algorithms(True)
    try:
        function, _ = compiled(lambda q, k, v: flash_attn_func(q, k, v, deterministic=True))
        torch.testing.assert_close(function(q, k, v), flash_attn_func(q, k, v))
    finally:
        torch.use_deterministic_algorithms(False)


def test_flash_attn():
    def program(qkv):
        return flash_attn_qkvpacked_func(qkv, causal=True, return_attn_probs=True)[:2]

    qkv = torch.randn(2, 5, 3, 4, 16)
    out, lse = compiled(program)[0](qkv)
    assert_forward(out, lse, *qkv.unbind(2), causal=True)


# ---- matrix products ----------------------------------------------------------------------------------------------

PRODUCTS = {
    "matrices": ((5, 7), (7, 6)),
    "batch_of_a": ((3, 5, 7), (7, 6)),
    "batch_of_b": ((5, 7), (3, 7, 6)),
    "batches": ((3, 5, 7), (3, 7, 6)),
    "no_terms": ((5, 0), (0, 6)),
    "no_rows": ((0, 7), (7, 6)),
}


def factors(a, b, *, bias=True, requires_grad=True, dtype=torch.float32, device="cpu"):
    shapes = (a, b, b[-1:]) if bias else (a, b)
    made = [torch.randn(shape, dtype=dtype, device=device).requires_grad_(requires_grad) for shape in shapes]
    return made if bias else [*made, None]


def with_gradients(function, tensors):
    """The result, and its gradients for the tensors that require them."""
    out = function(*tensors)
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    torch.manual_seed(0)
    return out, *(torch.autograd.grad(out, leaves, torch.randn_like(out)) if leaves else ())


@pytest.mark.parametrize("activation", [None, "gelu", "silu", "swiglu"])
@pytest.mark.parametrize("shapes", PRODUCTS)
def test_product_in_one_graph(shapes, activation):
    def program(a, b, bias):
        return flashcore.matmul(2 * a, b, bias=bias, activation=activation) + 1

    function, counter = compiled(program)
    tensors = factors(*PRODUCTS[shapes])
    torch.testing.assert_close(with_gradients(function, tensors), with_gradients(program, tensors))
    assert counter.frame_count == 1


def test_product_to_float32():
    def program(a, b, bias):
        return flashcore.matmul(a, b, out_dtype=torch.float32, activation="silu")

    tensors = factors((5, 7), (7, 6), bias=False, dtype=torch.bfloat16)
    found = with_gradients(compiled(program)[0], tensors)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found, with_gradients(program, tensors))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_linear_by_inductor_for_all_lengths(requires_grad):
    def mlp(x, weight, bias):
        return torch.relu(flashcore.linear(x, weight, bias)) * 2

    function, counter = compiled(mlp, "inductor")
    _, weight, bias = factors((1, 6), (8, 6), requires_grad=requires_grad)
    bias = torch.randn(8, requires_grad=requires_grad)
    for tokens in (6, 9, 12, 400):
        x = torch.randn(2, tokens, 6, requires_grad=requires_grad)
        torch._dynamo.mark_dynamic(x, 1)
        torch.testing.assert_close(with_gradients(function, (x, weight, bias)), with_gradients(mlp, (x, weight, bias)))
    assert counter.frame_count == 1


def test_only_the_needed_gradients_in_a_graph(monkeypatch):
    a, b = torch.randn(3, 4), torch.randn(4, 5, requires_grad=True)
    out = compiled(flashcore.matmul)[0](a, b)
    calls = []
    multiply = flashcore.ops.gemm._matmul
    monkeypatch.setattr(flashcore.ops.gemm, "_matmul", lambda *args: calls.append(args) or multiply(*args))
    out.sum().backward()
    assert len(calls) == 1
    assert torch.allclose(b.grad, a.t() @ torch.ones(3, 5))


def test_invalid_products_are_named_while_tracing():
    with pytest.raises(RuntimeError, match="a has 6 columns, but b has 4 rows"):
        compiled(flashcore.matmul)[0](torch.ones(4, 6), torch.ones(4, 6))


def test_export_of_a_product():
    class Layer(torch.nn.Module):
        def forward(self, x, weight):
            return flashcore.linear(x, weight)

    dynamic = ({0: torch.export.Dim("tokens")}, None)
    program = torch.export.export(Layer(), (torch.randn(5, 4), torch.randn(6, 4)), dynamic_shapes=dynamic)
    x, weight = torch.randn(33, 4), torch.randn(6, 4)
    torch.testing.assert_close(program.module()(x, weight), x @ weight.t())


PRODUCT_OPCHECK = {
    "plain": ({"bias": False, "requires_grad": False}, (None, None)),
    "grad": ({}, (None, None)),
    "gelu": ({}, (None, "gelu")),
    "swiglu": ({}, (None, "swiglu")),
    "float32": ({"dtype": torch.bfloat16, "bias": False}, (torch.float32, "silu")),
}


@pytest.mark.parametrize("shapes", ["matrices", "batch_of_a", "batch_of_b", "batches"])
@pytest.mark.parametrize("name", PRODUCT_OPCHECK)
def test_product_operator(name, shapes):
    made, options = PRODUCT_OPCHECK[name]
    torch.library.opcheck(torch.ops.flashcore.matmul, (*factors(*PRODUCTS[shapes], **made), *options))


# ---- on a GPU ----------------------------------------------------------------------------------------------------

GPU_CASES = ("causal_129", "full_191x127", "gqa_4_to_1_causal", "causal_d40", "packed_causal", "bhsd_causal")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::flashcore.errors.FlashCoreWarning")
@pytest.mark.parametrize("name", GPU_CASES)
def test_compiled_on_a_gpu(name):
    case = BY_NAME[name]
    q, k, v = (t.requires_grad_() for t in case.inputs("cuda"))
    function, counter = compiled(lambda q, k, v: flashcore.attention(q, k, v, causal=case.causal), "inductor")
    out = function(q, k, v)
    assert_forward(out.detach(), None, q, k, v, causal=case.causal)
    dout = torch.randn_like(out)
    assert_gradients(torch.autograd.grad(out, (q, k, v), dout), q, k, v, dout, causal=case.causal)
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::flashcore.errors.FlashCoreWarning")
@pytest.mark.parametrize("requires_grad", [False, True])
def test_operators_on_a_gpu(requires_grad):
    tensors = inputs(dtype=torch.bfloat16, device="cuda", requires_grad=requires_grad)
    options = (*[None] * 8, None, None, None, 0, None, None, requires_grad, False, "auto")
    torch.library.opcheck(torch.ops.flashcore.attention_forward, (*tensors, *options))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::flashcore.errors.FlashCoreWarning")
def test_compiled_into_cuda_graphs():
    """mode="reduce-overhead" captures the launches; replays must read the inputs of their own call."""
    function = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    case = replace(BY_NAME["causal_129"], layout="bshd")
    for seed in range(4):
        q, k, v = case.inputs("cuda", seed)
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(function(q, k, v), layer(q, k, v))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::flashcore.errors.FlashCoreWarning")
def test_autocast_on_a_gpu():
    q, k, v = (t.float() for t in BY_NAME["causal_129"].inputs("cuda"))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = flashcore.attention(q, k, v, causal=True)
    assert_forward(out, None, *(t.bfloat16() for t in (q, k, v)), causal=True)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", [None, "swiglu"])
def test_products_on_a_gpu(activation):
    """Inductor's graph, its gradients and the operator, with the Hopper kernel where there is one."""

    def program(a, b, bias):
        return flashcore.matmul(a, b, bias=bias, activation=activation)

    tensors = factors((333, 256), (256, 512), dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        tensors[1] /= 16  # sums near 1
    function, counter = compiled(program, "inductor")
    pairs = zip(with_gradients(function, tensors), with_gradients(program, tensors), strict=True)
    for by_inductor, eager in pairs:
        # Inductor rounds elsewhere, and products of rounded factors differ by more than an ulp in single elements.
        assert (by_inductor.float() - eager.float()).norm() <= 1e-2 * eager.float().norm()
    assert counter.frame_count == 1
    torch.library.opcheck(torch.ops.flashcore.matmul, (*tensors, None, None))


@pytest.mark.gpu
def test_products_in_cuda_graphs():
    """Replays read the operands of their own call; split products bring their own workspace."""
    weight = torch.randn(4096, 1024, dtype=torch.bfloat16, device="cuda")
    function = torch.compile(lambda x: flashcore.linear(x, weight), mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        x = torch.randn(16, 1024, dtype=torch.bfloat16, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(function(x), flashcore.linear(x, weight))
