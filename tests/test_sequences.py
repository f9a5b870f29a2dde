"""Packed and paged sequences: what is refused, what a plan depends on, and that lengths stay on the device."""

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import flashcore
from flashcore import Packed, Paged, api
from flashcore.backends import recompute, reference
from flashcore.errors import InvalidInputError, UnsupportedError
from flashcore.plan import override
from flashcore.problem import AttentionProblem
from flashcore.sequences import PackedSpec, PagedSpec
from tests.packed import BY_NAME, PACKED_CASES, PackedCase, assert_packed_forward
from tests.paged import BY_NAME as PAGED_BY_NAME
from tests.paged import PAGED_CASES, PagedCase


def lengths(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype)


def inputs(total_q=10, total_k=12, **options):
    return [torch.randn(n, heads, 16, **options) for n, heads in ((total_q, 4), (total_k, 2), (total_k, 2))]


NO_PACKED = {
    "offsets: list": ({"offsets": [0, 4]}, r"offsets must be a torch.Tensor \(given list\)"),
    "offsets: int64": ({"offsets": lengths(0, 4, dtype=torch.int64)}, r"offsets must be int32 .*\(given int64 \(2,\)"),
    "offsets: 2-D": ({"offsets": lengths(0, 4)[None]}, r"offsets must be int32 \(batch \+ 1,\), .*\(1, 2\)"),
    "offsets: strided": ({"offsets": lengths(0, 1, 4)[::2]}, r"contiguous \(given int32 \(2,\), strides \(2,\)\)"),
    "offsets: empty": ({"offsets": lengths()}, r"at least one number, 0"),
    "longest: negative": ({"longest": -1}, r"longest must be an int from 0 on, known to the host \(given -1\)"),
    "longest: bool": ({"longest": True}, r"longest must be an int .*\(given True\)"),
    "longest: float": ({"longest": 4.0}, r"longest must be an int .*\(given 4.0\)"),
    "longest: tensor": ({"longest": torch.tensor(4)}, r"longest must be an int .*\(given Tensor\)"),
    "used: batch": ({"used": lengths(1, 2)}, r"used must be \(1,\), as offsets have 1 sequences"),
    "used: int64": ({"used": lengths(1, dtype=torch.int64)}, r"used must be int32 \(batch,\).*int64"),
    "used: device": ({"used": torch.empty(1, dtype=torch.int32, device="meta")}, r"beside them on cpu .*on meta"),
}


@pytest.mark.parametrize("name", NO_PACKED)
def test_what_is_no_packed(name):
    change, message = NO_PACKED[name]
    with pytest.raises(InvalidInputError, match=message) as caught:
        Packed(**({"offsets": lengths(0, 4), "longest": 4} | change))
    assert str(caught.value).startswith("Packed: ")


ONE = Packed(lengths(0, 10), 10)
TWO = Packed(lengths(0, 4, 12), 8)
TWO_OF_QUERIES = lengths(0, 4, 10)
INVALID = {
    "batch": (inputs(), {"queries": ONE, "keys": TWO}, r"of one number of sequences \(given 1 and 2\)"),
    "4-D": ([t[None] for t in inputs()], {"queries": ONE, "keys": ONE}, r"q of packed sequences must have 3 dimen"),
    "3-D": (inputs(), {}, r"q must have 4 dimensions"),
    "kv": ((*inputs()[:2], inputs(total_k=11)[2]), {"queries": ONE, "keys": ONE}, r"k and v must have one seqlen"),
    "heads": ((inputs()[0][:, 1:], *inputs()[1:]), {"queries": ONE, "keys": ONE}, r"heads_q=3 is not a multiple"),
    "a list": (inputs(), {"queries": [0, 4], "keys": ONE}, r"queries must be flashcore.Packed or None \(given \[0"),
    "a tensor": (inputs(), {"queries": ONE, "keys": ONE.offsets}, r"keys must be flashcore.Packed, flashcore.Paged or"),
    "device": (
        inputs(),
        {"queries": Packed(torch.empty(2, dtype=torch.int32, device="meta"), 4), "keys": ONE},
        r"offsets of the queries are on meta, q on cpu\. Move them there",
    ),
    "slopes": (
        inputs(),
        {"queries": TWO, "keys": TWO, "score": flashcore.alibi(torch.ones(3, 4))},
        r"looks up batch in a dimension of size 3, but there are 2",
    ),
    "sink": (inputs(), {"queries": TWO, "keys": TWO, "sink": torch.ones(3)}, r"sink must be \(4,\)"),
}  # fmt: skip


@pytest.mark.parametrize("call", [flashcore.attention, flashcore.explain])
@pytest.mark.parametrize("name", INVALID)
def test_invalid(call, name):
    tensors, options, message = INVALID[name]
    with pytest.raises(InvalidInputError, match=message) as caught:
        call(*tensors, **options)
    assert str(caught.value).startswith("attention: ")


@pytest.mark.parametrize(("given", "dense"), [("queries", "keys"), ("keys", "queries")])
def test_one_side_alone_is_refused_by_name(given, dense):
    with pytest.raises(UnsupportedError, match=f"{dense} are dense and the others packed.* Pass {dense}=Packed"):
        flashcore.attention(*inputs(), **{given: ONE})


def test_invalid_stays_invalid_after_a_valid_call_of_that_shape():
    tensors = inputs()
    flashcore.attention(*tensors, queries=ONE, keys=ONE)
    with pytest.raises(InvalidInputError, match="one number of sequences"):
        flashcore.attention(*tensors, queries=ONE, keys=TWO)
    with pytest.raises(InvalidInputError, match="4 dimensions"):
        flashcore.attention(*tensors)


def test_dimensions_are_named():
    q, k, v = inputs()
    problem = AttentionProblem.from_tensors(q, k, v, causal=True, queries=Packed(lengths(0, 4, 10), 7), keys=TWO)
    assert (problem.batch, problem.seqlen_q, problem.seqlen_k) == (2, 7, 8)
    assert (problem.queries, problem.keys) == (PackedSpec(10), PackedSpec(12))
    assert (problem.q_shape, problem.k_shape, problem.v_shape) == (q.shape, k.shape, v.shape)
    assert (problem.out_shape, problem.lse_shape) == ((10, 4, 16), (4, 10))
    assert problem.features == {"packed"}
    assert str(problem) == (
        "float32 on cpu, q (10, 4, 16), k (12, 2, 16), v (12, 2, 16), 2 sequences of up to 7 queries and 8 keys, "
        "scale 0.25, causal"
    )


def test_tensors_come_in_the_order_of_their_names():
    used = Packed(lengths(0, 4, 10), 7, lengths(4, 5))
    score, sink = flashcore.alibi(torch.ones(4)), torch.zeros(4)
    spec, extras, packed = api._specs(score, sink, used, TWO)
    problem = api._problem(*inputs(), extras, True, None, None, spec, packed, False)
    assert problem.tensors == ("offsets_q", "used_q", "offsets_k", "captured0", "sink")
    assert extras[0] is used.offsets
    assert extras[1] is used.used
    assert extras[2] is TWO.offsets
    assert extras[4] is sink
    queries, keys, of_score = problem.split(extras)
    assert (queries.kind, keys.kind) == (used.kind, TWO.kind)
    assert len(of_score) == 2


@pytest.mark.parametrize("case", PACKED_CASES, ids=str)
def test_length_and_at(case):
    for name, numbers in (("queries", case.lengths_q), ("keys", case.keys)):
        packed = case.packed()[name]
        for b, rows in enumerate(case.places(numbers)):
            n = int(packed.length(b))
            assert packed.at(b, torch.arange(n)).tolist() == list(range(rows.start, rows.stop))


def test_a_length_is_never_beyond_its_bounds():
    packed = Packed(lengths(0, 4, 10, 7), 5, lengths(-3, 100, 2))
    assert [int(packed.length(b)) for b in range(3)] == [0, 5, 0]


def test_it_prints_a_plan():
    case = BY_NAME["edges_causal"]
    printed = str(flashcore.explain(*case.inputs(), causal=True, **case.packed()))
    assert "8 sequences of up to 129 queries and 129 keys" in printed
    assert "rejected  hopper: device cpu" in printed  # which has them
    assert "rejected  sdpa: packed sequences" in printed


def test_offsets_that_change_in_place_need_no_new_plan(monkeypatch):
    """As a captured graph replays a launch: the same call, other lengths."""
    before = PackedCase("", (30, 0, 50, 1), (20, 40, 33, 3), causal=True, more=30)
    after = PackedCase("", (1, 60, 17, 3), (70, 1, 0, 25), causal=True)
    packed = before.packed()
    q, k, v = before.inputs()
    assert_packed_forward(before, flashcore.attention(q, k, v, causal=True, **packed), None, q, k, v)
    monkeypatch.setattr(api, "_problem", None)  # nobody describes the call again
    for name, rows in after.packed().items():
        packed[name].offsets.copy_(rows.offsets)
    q, k, v = after.inputs()
    assert_packed_forward(after, flashcore.attention(q, k, v, causal=True, **packed), None, q, k, v)


def test_calls_that_differ_in_what_packed_says_are_not_mixed_up():
    q, k, v = inputs()
    whole = flashcore.attention(q, k, v, queries=ONE, keys=ONE)
    cut = flashcore.attention(q, k, v, queries=Packed(ONE.offsets, 4), keys=Packed(ONE.offsets, 4))
    used = flashcore.attention(q, k, v, queries=ONE, keys=Packed(ONE.offsets, 10, lengths(4)))
    assert not cut[4:].any()
    assert whole.isfinite().all()
    assert torch.equal(cut[:4], used[:4])
    assert not torch.equal(cut[:4], whole[:4])


@pytest.mark.parametrize("case", [case for case in PACKED_CASES if case.lengths_q], ids=str)
def test_the_reference_does_not_need_exact_lengths(monkeypatch, case):
    """As on a GPU, which it does not wait for: bounds of the lengths give the same."""
    q, k, v = (t.detach().requires_grad_() for t in case.inputs())
    call = {**case.options(), **case.packed(), "backend": "reference", "return_lse": True}
    results = []
    for most in (reference._most, lambda packed, b: packed.longest):
        monkeypatch.setattr(reference, "_most", most)
        out, lse = flashcore.attention(q, k, v, **call)
        results.append((out, lse, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))))
    for exact, bounded in zip(*results, strict=True):
        torch.testing.assert_close(bounded, exact)


def test_autocast():
    tensors = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = flashcore.attention(*tensors, queries=ONE, keys=ONE)
    assert out.dtype == torch.bfloat16


def test_recompute_gives_the_gradients_of_who_has_none(add_backend):
    """And offsets among the extras get none."""
    add_backend("fake")
    case = BY_NAME["sink"]
    q, k, v = (t.detach().requires_grad_() for t in case.inputs())
    options = case.options()
    sink = options["sink"].requires_grad_()
    with override(backward="reference-recompute"):
        mine = flashcore.attention(q, k, v, **options, **case.packed())
    theirs = flashcore.attention(q, k, v, **options, **case.packed(), backend="reference")
    dout = torch.randn_like(mine)
    grads, expected = (torch.autograd.grad(out, (q, k, v, sink), dout) for out in (mine, theirs))
    for grad, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, right, rtol=2e-2, atol=2e-2)


def _call(q, k, v, offsets_q, offsets_k):
    queries, keys = Packed(offsets_q, 10, lengths(4, 3)), Packed(offsets_k, 8)
    return flashcore.attention(q, k, v, causal=True, queries=queries, keys=keys)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("record", ["jit", "make_fx", "symbolic"])
def test_a_recording_reads_the_lengths_when_it_runs(add_backend, record):
    add_backend("fake")
    example = *inputs(), lengths(0, 4, 10), lengths(0, 5, 12)
    if record == "jit":
        recorded = torch.jit.trace(_call, example)
    else:
        recorded = make_fx(_call, tracing_mode="real" if record == "make_fx" else "symbolic")(*example)
    others = *inputs(), lengths(0, 7, 10), lengths(0, 2, 9)
    torch.testing.assert_close(recorded(*others), _call(*others))


def test_fake_tensors(add_backend):
    """In their mode, and outside of it."""
    add_backend("fake")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t) for t in inputs()]
        inside = _call(*fakes, TWO_OF_QUERIES, TWO.offsets)
    outside = _call(*fakes, *(mode.from_tensor(t) for t in (TWO_OF_QUERIES, TWO.offsets)))
    for out in (inside, outside):
        assert isinstance(out, FakeTensor)
        assert out.shape == (10, 4, 16)


def test_a_recorded_call_is_checked():
    with FlopCounterMode(display=False):
        with pytest.raises(InvalidInputError, match="one number of sequences"):
            flashcore.attention(*inputs(), queries=ONE, keys=TWO)
        with pytest.raises(InvalidInputError, match="q of packed sequences must have 3 dimensions"):
            flashcore.attention(*(t[None] for t in inputs()), queries=ONE, keys=ONE)


def test_a_recorded_backward_pass(add_backend):
    """Of an eager call: it is the operator, which counts."""
    add_backend("fake", backward=recompute.reference.backward)
    leaves = [t.requires_grad_() for t in inputs()]
    out = _call(*leaves, TWO_OF_QUERIES, TWO.offsets)
    dout = torch.randn_like(out)
    with FlopCounterMode(display=False) as counter:
        grads = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    assert torch.ops.flashcore.attention_backward in counter.get_flop_counts()["Global"]
    torch.testing.assert_close(grads, torch.autograd.grad(out, leaves, dout))


def test_transforms():
    q, k, v = inputs()
    loss = lambda q: _call(q, k, v, TWO_OF_QUERIES, TWO.offsets).square().sum()  # noqa: E731
    leaf = q.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(q), torch.autograd.grad(loss(leaf), leaf)[0])
    batch = torch.randn(3, *q.shape)
    torch.testing.assert_close(torch.func.vmap(loss)(batch), torch.stack([loss(one) for one in batch]))


def test_who_cannot_be_transformed_names_one_that_can(add_backend):
    add_backend("fake")
    q, k, v = inputs()
    with pytest.raises(UnsupportedError, match='Pass backend="reference"'):
        torch.func.grad(lambda q: _call(q, k, v, TWO_OF_QUERIES, TWO.offsets).sum())(q)


def test_the_lse_is_differentiable():
    case = BY_NAME["sink"]
    q, k, v = (t.detach().float().requires_grad_() for t in case.inputs())
    options = case.options()
    leaves = [q, k, v, options["sink"].requires_grad_()]
    out, lse = flashcore.attention(q, k, v, **options, **case.packed(), return_lse=True)
    exact, exact_lse = case.math(*leaves)
    of_out, of_lse = torch.randn_like(out), torch.randn_like(lse).masked_fill(lse.isneginf(), 0.0)
    expected = torch.autograd.grad((exact, exact_lse), leaves, (of_out.double(), of_lse.double()))
    for grad, right in zip(torch.autograd.grad((out, lse), leaves, (of_out, of_lse)), expected, strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-4, atol=1e-5)


def table(*rows, dtype=torch.int32):
    return torch.tensor(rows, dtype=dtype)


NO_PAGED = {
    "table: list": ({"table": [[0, 1]]}, r"table must be a torch.Tensor \(given list\)"),
    "table: int64": ({"table": table([0, 1], dtype=torch.int64)}, r"table must be int32 .*\(given int64 \(1, 2\)"),
    "table: 1-D": ({"table": lengths(0, 1)}, r"table must be int32 \(batch, max_pages\), .*\(given int32 \(2,\)"),
    "table: strided": ({"table": table([0, 1, 2, 3])[:, ::2]}, r"its rows contiguous \(given int32 .*strides \(4, 2\)"),
    "table: empty": ({"table": table([0])[:, :0]}, r"one page or more"),
    "lengths: list": ({"lengths": [3]}, r"lengths must be a torch.Tensor \(given list\)"),
    "lengths: int64": ({"lengths": lengths(3, dtype=torch.int64)}, r"lengths must be int32 \(batch,\).*int64"),
    "lengths: 2-D": ({"lengths": table([3])}, r"lengths must be int32 \(batch,\), contiguous .*\(1, 1\)"),
    "lengths: batch": ({"lengths": lengths(1, 2)}, r"lengths must be \(1,\), as the table has 1 sequences"),
    "lengths: device": ({"lengths": torch.empty(1, dtype=torch.int32, device="meta")}, r"beside it on cpu .*on meta"),
    "longest: negative": ({"longest": -1}, r"longest must be an int from 0 on, known to the host \(given -1\)"),
    "longest: tensor": ({"longest": torch.tensor(4)}, r"longest must be an int .*\(given Tensor\)"),
}


@pytest.mark.parametrize("name", NO_PAGED)
def test_what_is_no_paged(name):
    change, message = NO_PAGED[name]
    with pytest.raises(InvalidInputError, match=message) as caught:
        Paged(**({"table": table([0, 1]), "lengths": lengths(20), "longest": 20} | change))
    assert str(caught.value).startswith("Paged: ")


def caches(pages=5, page_size=16, heads=2, head_dim=16, **options):
    return [torch.randn(pages, page_size, heads, head_dim, **options) for _ in range(2)]


PAGES = Paged(table([4, 0], [2, 9]), lengths(20, 8), 20)
Q = inputs(12)[0]
INVALID_PAGES = {
    "page size": ((Q, *caches(page_size=24)), {}, r"1 row or a multiple of 16 \(given 24: k \(5, 24, 2, 16\)\)"),
    "page size 0": ((Q, *caches(page_size=0)), {}, r"1 row or a multiple of 16 \(given 0"),
    "page size 2": ((Q, *caches(page_size=2)), {}, r"1 row or a multiple of 16 \(given 2"),
    "page sizes": ((Q, caches()[0], caches(page_size=32)[1]), {}, r"k and v must have as many pages, of one size"),
    "pages": ((Q, caches()[0], caches(6)[1]), {}, r"k and v must have as many pages, of one size"),
    "3-D": (inputs(12), {}, r"k of paged sequences must have 4 dimensions, \(pages, page_size, heads, head_dim\)"),
    "4-D q": ((Q[None], *caches()), {}, r"q of packed sequences must have 3 dimensions"),
    "heads": ((Q, *caches(heads=3)), {}, r"heads_q=4 is not a multiple of heads_k=3"),
    "heads of v": ((Q, caches()[0], caches(heads=1)[1]), {}, r"same number of heads"),
    "head_dim": ((Q, *caches(head_dim=8)), {}, r"q and k must have one head_dim"),
    "dtype": ((Q, *caches(dtype=torch.float64)), {}, r"one dtype"),
    "device": ((Q, *caches(device="meta")), {}, r"k is on meta"),
    "batch": ((Q, *caches()), {"queries": ONE}, r"of one number of sequences \(given 1 and 2\)"),
    "queries": ((Q, *caches()), {"queries": PAGES}, r"queries must be flashcore.Packed or None"),
    "table's device": (
        (Q, *caches()),
        {"keys": Paged(*(torch.empty(2, 1, dtype=torch.int32, device="meta")[:, i] for i in (slice(None), 0)), 4)},
        r"table and lengths of the keys are on meta, q on cpu\. Move them there",
    ),
    "sink": ((Q, *caches()), {"sink": torch.ones(3)}, r"sink must be \(4,\)"),
}  # fmt: skip


@pytest.mark.parametrize("call", [flashcore.attention, flashcore.explain])
@pytest.mark.parametrize("name", INVALID_PAGES)
def test_invalid_pages(call, name):
    tensors, options, message = INVALID_PAGES[name]
    with pytest.raises(InvalidInputError, match=message) as caught:
        call(*tensors, **{"queries": TWO, "keys": PAGES} | options)
    assert str(caught.value).startswith("attention: ")


def test_paged_keys_want_packed_queries():
    with pytest.raises(UnsupportedError, match=r"queries are dense .* Pass queries=Packed"):
        flashcore.attention(Q, *caches(), keys=PAGES)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_pages_have_no_gradients(backend):
    tensors = Q.clone().requires_grad_(), *caches()
    with pytest.raises(UnsupportedError, match=r"paged keys have no backward pass.*torch.no_grad"):
        flashcore.attention(*tensors, queries=TWO, keys=PAGES, backend=backend)
    with torch.no_grad():
        out = flashcore.attention(*tensors, queries=TWO, keys=PAGES, backend=backend)
    assert not out.requires_grad


def test_dimensions_of_pages_are_named():
    k, v = caches(head_dim=16)
    problem = AttentionProblem.from_tensors(Q, k, v, causal=True, queries=TWO, keys=PAGES)
    assert (problem.batch, problem.seqlen_q, problem.seqlen_k) == (2, 8, 20)
    assert (problem.queries, problem.keys) == (PackedSpec(12), PagedSpec(5, 16))
    assert (problem.q_shape, problem.k_shape, problem.v_shape) == (Q.shape, k.shape, v.shape)
    assert (problem.out_shape, problem.lse_shape) == ((12, 4, 16), (4, 12))
    assert problem.features == {"packed", "paged"}
    assert problem.tensors == ("offsets_q", "table_k", "lengths_k")
    assert str(problem) == (
        "float32 on cpu, q (12, 4, 16), k (5, 16, 2, 16), v (5, 16, 2, 16), 2 sequences of up to 8 queries and 20 keys "
        "in pages, scale 0.25, causal"
    )


def test_no_sequence_is_longer_than_its_row_of_the_table():
    rows = Paged(PAGES.table, lengths(1000, 8), 500)
    assert AttentionProblem.from_tensors(Q, *caches(), queries=TWO, keys=rows).seqlen_k == 32
    shown = Paged(table([4, 0], [2, 3]), lengths(1000, 8), 500)
    whole = Paged(table([4, 0], [2, 3]), lengths(32, 8), 32)
    tensors = Q, *caches()
    for backend in ("auto", "reference"):
        cut, right = (flashcore.attention(*tensors, queries=TWO, keys=k, backend=backend) for k in (shown, whole))
        assert torch.equal(cut, right)
        wider = Paged(table([4, 0, 1], [2, 3, 3]), lengths(40, 8), 500)
        alone = Paged(wider.table, wider.lengths, 40)
        longer, right = (flashcore.attention(*tensors, queries=TWO, keys=k, backend=backend) for k in (wider, alone))
        assert torch.equal(longer, right)
        assert not torch.equal(longer, cut)


def test_without_pages_there_are_no_keys():
    out, lse = flashcore.attention(Q, *caches(pages=0), queries=TWO, keys=PAGES, return_lse=True)
    assert not out.any()
    assert lse.isneginf().all()
    sink = torch.randn(4)
    out, lse = flashcore.attention(Q, *caches(pages=0), queries=TWO, keys=PAGES, return_lse=True, sink=sink)
    assert not out.any()
    torch.testing.assert_close(lse, sink[:, None].expand(4, 12))


def test_a_plan_of_pages_is_printed():
    q, k, v, places, *_ = PAGED_BY_NAME["mixed_pages_of_64"].inputs()
    printed = str(flashcore.explain(q, k, v, causal=True, **places))
    assert "7 sequences of up to 70 queries and 130 keys in pages" in printed
    assert "rejected  hopper: device cpu" in printed  # which reads some
    assert "rejected  sdpa: keys in pages" in printed


BEFORE = PagedCase("", PackedCase("", (30, 0, 50, 1), (20, 40, 70, 3), causal=True, more=30))
AFTER = PagedCase("", PackedCase("", (1, 60, 17, 3), (70, 1, 0, 25), causal=True))


def become(places, others):
    """Write what `others` say into the tensors of `places`: offsets, a table as wide, lengths."""
    places["queries"].offsets.copy_(others["queries"].offsets)
    places["keys"].lengths.copy_(others["keys"].lengths)
    places["keys"].table.copy_(others["keys"].table)


def test_tables_and_lengths_that_change_in_place_need_no_new_plan(monkeypatch):
    """As a captured graph replays a launch: the same call, other lengths, other pages."""
    q, k_cache, v_cache, places, k, v = BEFORE.inputs()
    out = flashcore.attention(q, k_cache, v_cache, causal=True, **places)
    assert_packed_forward(BEFORE.packed, out, None, q, k, v)
    monkeypatch.setattr(api, "_problem", None)  # nobody describes the call again
    q, k_after, v_after, others, k, v = AFTER.inputs()
    become(places, others)
    k_cache[: len(k_after)], v_cache[: len(v_after)] = k_after, v_after
    out = flashcore.attention(q, k_cache, v_cache, causal=True, **places)
    assert_packed_forward(AFTER.packed, out, None, q, k, v)


@pytest.mark.parametrize("case", [case for case in PAGED_CASES if case.packed.lengths_q], ids=str)
def test_the_reference_does_not_need_exact_lengths_of_pages(monkeypatch, case):
    """Nor does it follow what a table says beyond them."""
    q, k, v, places, *_ = case.inputs()
    call = {**case.packed.options(), **places, "backend": "reference", "return_lse": True}
    exact = flashcore.attention(q, k, v, **call)
    monkeypatch.setattr(reference, "_most", lambda places, b: places.longest)
    for bounded, right in zip(flashcore.attention(q, k, v, **call), exact, strict=True):
        torch.testing.assert_close(bounded, right)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_what_is_no_page_is_zeros(backend):
    """Not read from elsewhere, nor an error of PyTorch's that would end a program on a GPU."""
    k, v = caches()
    q, rows = Q[:1], Packed(lengths(0, 1), 1)
    for number in (-1, len(k), 2**31 - 1, -(2**31)):
        pages = table([4, number], [0, 0])[:1]
        out = flashcore.attention(q, k, v, queries=rows, keys=Paged(pages, lengths(20), 20), backend=backend)
        own = torch.cat((k[4], torch.zeros_like(k[4, :4]))), torch.cat((v[4], torch.zeros_like(v[4, :4])))
        torch.testing.assert_close(out, flashcore.attention(q[None], *(t[None] for t in own))[0])


def test_transforms_of_pages():
    k, v = caches()
    call = {"queries": TWO, "keys": PAGES, "causal": True}
    queries = torch.randn(3, *Q.shape)
    mapped = torch.func.vmap(lambda q: flashcore.attention(q, k, v, backend="reference", **call))(queries)
    torch.testing.assert_close(mapped, torch.stack([flashcore.attention(q, k, v, **call) for q in queries]))
    with pytest.raises(UnsupportedError, match="paged keys have no backward pass"):
        torch.func.grad(lambda q: flashcore.attention(q, k, v, backend="reference", **call).sum())(Q)


def test_flops_of_pages_are_counted_by_their_bound():
    importlib.import_module("flashcore.ops")  # a counter knows the formulas that there are when it is made
    k, v = caches()
    with FlopCounterMode(display=False) as counter:
        flashcore.attention(Q, k, v, queries=TWO, keys=PAGES)
    assert counter.get_total_flops() == 2 * 4 * 12 * PAGES.longest * (Q.shape[-1] + v.shape[-1])
    with FlopCounterMode(display=False) as counter:
        flashcore.attention(Q, k, v, queries=TWO, keys=Paged(PAGES.table, PAGES.lengths, 1000))
    assert counter.get_total_flops() == 2 * 4 * 12 * 32 * (Q.shape[-1] + v.shape[-1])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_nothing_waits_for_the_gpu(backend):
    case = BY_NAME["sink"]
    q, k, v = (t.detach().requires_grad_() for t in case.inputs("cuda"))
    call = {**case.options("cuda"), **case.packed("cuda"), "backend": backend}
    torch.autograd.grad(flashcore.attention(q, k, v, **call).sum(), (q, k, v))  # kernels are compiled
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(flashcore.attention(q, k, v, **call).sum(), (q, k, v))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_captured_graph_reads_the_lengths_when_it_replays():
    before = PackedCase("", (30, 0, 50, 1), (20, 40, 33, 3), causal=True, more=30)
    after = PackedCase("", (1, 60, 17, 3), (70, 1, 0, 25), causal=True)
    packed, (q, k, v) = before.packed("cuda"), before.inputs("cuda")
    flashcore.attention(q, k, v, causal=True, **packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flashcore.attention(q, k, v, causal=True, return_lse=True, **packed)
    for case in (before, after):
        for name, rows in case.packed("cuda").items():
            packed[name].offsets.copy_(rows.offsets)
        for mine, theirs in zip((q, k, v), case.inputs("cuda"), strict=True):
            mine.copy_(theirs)
        graph.replay()
        assert_packed_forward(case, out, lse, q, k, v)


@pytest.mark.gpu
def test_a_captured_graph_reads_tables_when_it_replays():
    q, k_cache, v_cache, places, *_ = BEFORE.inputs("cuda")
    call = {"causal": True, "return_lse": True, **places}
    flashcore.attention(q, k_cache, v_cache, **call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flashcore.attention(q, k_cache, v_cache, **call)
    for case in (BEFORE, AFTER):
        now, k_now, v_now, others, k, v = case.inputs("cuda")
        become(places, others)
        q.copy_(now)
        k_cache[: len(k_now)], v_cache[: len(v_now)] = k_now, v_now
        graph.replay()
        assert_packed_forward(case.packed, out, lse, now, k, v)
