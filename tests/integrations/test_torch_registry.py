"""PyTorch's registry of flash attention implementations with FlashCore in it.

Without a GPU FlashCore takes the place of stand-ins for PyTorch's operators, registered for CPU tensors.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.attention
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashcore
from flashcore import plan as planning
from flashcore.backends import reference, reference_backward
from flashcore.backends.recompute import reference as recomputed
from flashcore.errors import EnvironmentProblem
from flashcore.integrations import torch_registry
from tests.packed import BY_NAME, PackedCase, assert_packed_forward, assert_packed_gradients
from tests.paged import BY_NAME as PAGED_BY_NAME
from tests.paged import PagedCase
from tests.tolerance import assert_forward, assert_gradients

varlen = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no registry")
AuxRequest, varlen_attn = varlen.AuxRequest, varlen.varlen_attn

VARLEN = inspect.signature(varlen_attn).parameters
CAUSAL = {"window_size": (-1, 0)} if "window_size" in VARLEN else {"is_causal": True}
GROUPED = {"enable_gqa": True} if "enable_gqa" in VARLEN else {}
aten = torch.ops.aten
KNOWN = {argument.name for argument in aten._flash_attention_forward.default._schema.arguments}
has_windows = pytest.mark.skipif("window_size" not in VARLEN, reason="this torch has no windows of packed sequences")
has_used = pytest.mark.skipif("seqused_k" not in VARLEN, reason="this torch has no lengths beside offsets")
has_pages = pytest.mark.skipif("block_table" not in VARLEN, reason="this torch has no pages")
has_out = pytest.mark.skipif(not hasattr(varlen, "varlen_attn_out"), reason="this torch has no outputs to write to")
activate = partial(torch.nn.attention.activate_flash_attention_impl, "flashcore")


def restore() -> None:
    torch.nn.attention._registry.restore_flash_attention_impl(_raise_warn=False)


@pytest.fixture(autouse=True)
def _restored():
    yield
    restore()


# ---- on a CPU -------------------------------------------------------------------------------------------------------


@pytest.fixture
def theirs(monkeypatch):
    """Stand-ins for PyTorch's operators on a CPU: (operator, positional, keyword arguments) of their calls."""
    seen = []
    library = torch.library.Library("aten", "IMPL")

    def stand_in(name, *args, **kwargs):
        seen.append((name, args, kwargs))
        if name.endswith("backward"):
            return tuple(torch.full_like(t, 7.0) for t in args[1:4])
        query = args[1] if name.endswith("inplace") else args[0]
        lse = torch.zeros(query.shape[:-1])
        if name.endswith("inplace"):
            args[0].fill_(7.0)
            return lse
        places = (None, None, query.shape[2], args[1].shape[2]) if name.startswith("_scaled") else ()
        return torch.full_like(query, 7.0), lse, *places, *torch_registry._of_dropout(query)

    for name in torch_registry._OPERATORS:
        library.impl(name, partial(stand_in, name), "CPU")
    monkeypatch.setattr(torch_registry, "_KEY", "CPU")
    torch_registry.register()
    yield seen
    restore()
    library._destroy()


@pytest.fixture
def ours(add_backend):
    """(pass, problem) of the calls that reach FlashCore's kernels: a backend that can do everything."""
    seen = []

    def forward(problem, config, *tensors):
        seen.append(("forward", problem))
        return reference.forward(problem, config, *tensors)

    def backward(problem, config, q, k, v, out, lse, dout, dlse, *extras):
        seen.append(("backward", problem))
        assert dlse is None
        assert out.is_contiguous()
        assert lse.is_contiguous()
        if not problem.packed:  # by the output and the LSE
            return reference_backward.backward(problem, config, q, k, v, out, lse, dout, None)
        with torch.enable_grad():
            return recomputed.backward(problem, config, q, k, v, out, lse, dout, None, *extras)

    add_backend("fake", forward=forward, backward=backward)
    return seen


def dense(layout="bshd", seqlen_q=33, seqlen_k=33, heads_k=2, dtype=torch.bfloat16):
    """(batch, heads, seqlen, head_dim) leaves, as they lie in memory."""
    torch.manual_seed(0)
    shapes = (2, seqlen_q, 4, 16), (2, seqlen_k, heads_k, 16), (2, seqlen_k, heads_k, 16)
    tensors = (torch.randn(shape, dtype=dtype).transpose(1, 2) for shape in shapes)
    if layout == "bhsd":
        tensors = (t.contiguous() for t in tensors)
    return tuple(t.requires_grad_() for t in tensors)


def swapped(*tensors):
    """(batch, seqlen, heads, head_dim), contiguous and without a past."""
    return tuple(t.detach().transpose(1, 2).contiguous() for t in tensors)


def packed_arguments(case: PackedCase, device="cpu") -> tuple:
    """cu_seq_q, cu_seq_k, max_q and max_k."""
    places = case.packed(device)
    queries, keys = places["queries"], places["keys"]
    return queries.offsets, keys.offsets, queries.longest, keys.longest


def window_of(case: PackedCase) -> dict:
    if case.window is None:
        return CAUSAL if case.causal else {}
    left, right = (-1 if side is None else side for side in case.window)
    return {"window_size": (left, 0 if case.causal else right)}


def with_its_heads(case: PackedCase) -> PackedCase:
    """With as many key heads as query heads, where this torch has no other packed sequences."""
    return case if GROUPED else replace(case, heads_k=case.heads_q)


def assert_their_lse(case: PackedCase, out, lse, q, k, v) -> None:
    """What is right of FlashCore, but that a query without a key has an LSE of +inf."""
    assert not lse.isneginf().any()
    assert_packed_forward(case, out, torch.where(lse.isposinf(), -torch.inf, lse), q, k, v)


def test_to_register_changes_nothing(theirs, ours):
    assert "flashcore" in torch.nn.attention.list_flash_attention_impls()
    assert torch.nn.attention.current_flash_attention_impl() is None
    aten._scaled_dot_product_flash_attention(*dense())
    assert len(theirs) == 1
    assert ours == []


@pytest.mark.parametrize(
    ("module", "missing"), [(torch.nn.attention, "activate_flash_attention_impl"), (torch.library, "get_kernel")]
)
def test_an_older_torch(monkeypatch, module, missing):
    monkeypatch.delattr(module, missing)
    with pytest.raises(EnvironmentProblem, match=r"has no registry.* \(2\.10 has\).*replace_torch"):
        torch_registry.register()


@pytest.mark.skipif(torch.cuda.is_available(), reason="it has CUDA")
def test_active_without_cuda():
    torch_registry.register()
    activate()
    assert torch.nn.attention.current_flash_attention_impl() == "flashcore"
    query, key, value = dense(heads_k=4)
    out = F.scaled_dot_product_attention(query, key, value)
    assert_forward(*swapped(out), None, *swapped(query, key, value))


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}])
def test_sdpa(theirs, ours, layout, options):
    activate()
    query, key, value = dense(layout)
    out, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value, **options)
    dout = torch.randn(out.shape[:-1]).to(out)[..., None].expand_as(out)
    grads = torch.autograd.grad(out, (query, key, value), dout)
    assert [name for name, _ in ours] == ["forward", "backward"]
    assert theirs == []
    named = {"causal": options.get("is_causal", False), "scale": options.get("scale")}
    assert_forward(*swapped(out), lse, *swapped(query, key, value), **named)
    assert_gradients(swapped(*grads), *swapped(query, key, value), dout.transpose(1, 2), **named)


def test_causal_is_aligned_to_the_bottom_right(theirs, ours):
    """As in flash-attn; SDPA calls it with as many queries as keys. A query without a key has an LSE of +inf."""
    activate()
    query, key, value = dense(seqlen_q=20, seqlen_k=9)
    out, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value, is_causal=True)
    assert lse[..., :11].isposinf().all()
    lse = torch.where(lse.isposinf(), -torch.inf, lse)
    assert_forward(*swapped(out), lse, *swapped(query, key, value), causal=True)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (query, key, value), dout)
    assert_gradients(swapped(*grads), *swapped(query, key, value), dout.transpose(1, 2), causal=True)
    assert theirs == []


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_results_are_what_pytorch_promises(theirs, ours, layout):
    """Shapes, dtypes and strides are those by which programs are compiled."""
    activate()
    tensors = [t.detach() for t in dense(layout)]
    rows = [t.transpose(1, 2) for t in tensors]
    calls = {
        aten._scaled_dot_product_flash_attention: (*tensors,),
        aten._flash_attention_forward: (*rows, None, None, 33, 33, 0.0, True, False),
    }
    made = {}
    for operator, arguments in calls.items():
        made[operator] = operator(*arguments)
        check_like_fakes(operator, arguments, made[operator], FakeTensorMode())
    out, lse, *_ = made[aten._scaled_dot_product_flash_attention]
    arguments = (out, *tensors, out, lse, *[torch.empty(0)] * 2, 33, 33, 0.0, False, *[torch.empty(0)] * 2)
    operator = aten._scaled_dot_product_flash_attention_backward
    check_like_fakes(operator, arguments, operator(*arguments), FakeTensorMode())
    assert theirs == []


def check_like_fakes(operator, arguments, results, mode) -> None:
    with mode:
        fakes = operator(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
    assert len(fakes) == len(results)
    for fake, result in zip(fakes, results, strict=True):
        if isinstance(fake, torch.Tensor):
            assert (result.shape, result.dtype, result.stride()) == (fake.shape, fake.dtype, fake.stride())
        else:
            assert result == fake


VARLEN_CASES = [
    "edges", "edges_other_keys_causal", "one_query_each", "float16", "layout_packed", "rows_around",
    *(pytest.param(name, marks=has_windows) for name in ("window", "window_both")),
]  # fmt: skip


@pytest.mark.parametrize("name", VARLEN_CASES)
def test_varlen(theirs, ours, name):
    activate()
    case = with_its_heads(BY_NAME[name])
    q, k, v = (t.detach().requires_grad_() for t in case.inputs())
    options = {**window_of(case), **GROUPED}
    out, lse = varlen_attn(q, k, v, *packed_arguments(case), **options, return_aux=AuxRequest(lse=True))
    assert_their_lse(case, out.detach(), lse, q.detach(), k.detach(), v.detach())
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    assert_packed_gradients(case, grads, q.detach(), k.detach(), v.detach(), dout)
    assert [name for name, _ in ours] == ["forward", "backward"]
    assert theirs == []


@has_windows
@pytest.mark.parametrize(
    ("window", "mask"),
    [
        ((-1, -1), (None, None)),
        ((-1, 0), (None, 0)),
        ((10, 0), (10, 0)),
        ((4, 3), (4, 3)),
        ((-1, 3), (None, 3)),
        ((69, 0), (None, 0)),  # the longest sequence has 70 keys: the first is seen by all
        ((68, 39), (68, None)),  # and 40 queries
        ((0, 0), (0, 0)),
    ],
)
def test_windows(theirs, ours, window, mask):
    activate()
    case = PackedCase("window", (40, 3), (70, 3), heads_q=2, window=tuple(None if n < 0 else n for n in window))
    q, k, v = case.inputs()
    out, lse = varlen_attn(q, k, v, *packed_arguments(case), window_size=window, return_aux=AuxRequest(True), **GROUPED)
    assert_their_lse(case, out, lse, q, k, v)
    ((_, problem),) = ours
    assert (problem.mask.left, problem.mask.right) == mask


@has_used
def test_used_keys(theirs, ours):
    activate()
    case = PackedCase("used", (9, 4), (30, 20), causal=True)
    q, k, v = case.inputs()
    used = torch.tensor([17, 6], dtype=torch.int32)
    out = varlen_attn(q, k, v, *packed_arguments(case), **CAUSAL, **GROUPED, seqused_k=used)
    fewer = replace(case, lengths_k=(17, 6))
    kept = torch.cat([torch.arange(17), 30 + torch.arange(6)])
    assert_packed_forward(fewer, out, None, q, k[kept], v[kept])
    assert theirs == []


@has_pages
@pytest.mark.parametrize("name", ["mixed_pages_of_16", "mixed_pages_of_64"])
def test_pages(theirs, ours, name):
    activate()
    case = PAGED_BY_NAME[name]
    out, lse = call_with_pages(case, "cpu")
    given = case.inputs()
    assert_their_lse(case.packed, out, lse, given.q, given.k, given.v)
    assert ours[0][1].paged
    assert theirs == []


def call_with_pages(case: PagedCase, device: str):
    given = case.inputs(device)
    queries, keys = given.places["queries"], given.places["keys"]
    return varlen_attn(
        given.q, given.k_cache, given.v_cache, queries.offsets, None, queries.longest, keys.longest, **CAUSAL,
        **GROUPED, seqused_k=keys.lengths, block_table=keys.table, return_aux=AuxRequest(lse=True),
    )  # fmt: skip


@has_out
def test_into_an_output(theirs, ours):
    activate()
    case = BY_NAME["edges_other_keys_causal"]
    q, k, v = case.inputs()
    out = torch.full((*q.shape[:2], 2 * q.shape[2]), torch.nan, dtype=q.dtype)[..., ::2]
    arguments = (q, k, v, *packed_arguments(case))
    same, lse = varlen.varlen_attn_out(out, *arguments, **CAUSAL, **GROUPED, return_aux=AuxRequest(lse=True))
    assert same is out
    assert_their_lse(case, out.contiguous(), lse, q, k, v)
    assert theirs == []


def test_dense_rows(theirs, ours):
    """(batch, seqlen, heads, head_dim) tensors without offsets."""
    activate()
    query, key, value = swapped(*dense())
    leaves = [t.requires_grad_() for t in (query, key, value)]
    out, lse, *_ = aten._flash_attention_forward(*leaves, None, None, 33, 33, 0.0, True, False)
    assert_forward(out.detach(), lse, *(t.detach() for t in leaves), causal=True)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, dout)
    assert_gradients(grads, *(t.detach() for t in leaves), dout, causal=True)
    assert theirs == []


def test_a_graph(theirs, ours):
    activate()
    case = with_its_heads(BY_NAME["edges"])
    q, k, v = (t.detach().requires_grad_() for t in case.inputs())
    compiled = torch.compile(varlen_attn, fullgraph=True, backend="aot_eager")
    out = compiled(q, k, v, *packed_arguments(case), **GROUPED)
    assert_packed_forward(case, out.detach(), None, q.detach(), k.detach(), v.detach())
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    assert_packed_gradients(case, grads, q.detach(), k.detach(), v.detach(), dout)
    assert [name for name, _ in ours] == ["forward", "backward"]


def packed_call(**changed):
    """The arguments of _flash_attention_forward for a packed call, but for what is changed: a name or a place."""
    q, k, v = (t.detach() for t in BY_NAME["edges"].inputs())
    arguments = [q, k, v, *packed_arguments(BY_NAME["edges"]), 0.0, False, False]
    keywords = {}
    for name, value in changed.items():
        if name.startswith("at_"):
            arguments[int(name[3:])] = value
        else:
            keywords[name] = value
    return arguments, keywords


@pytest.mark.parametrize(
    "changed",
    [
        {"at_7": 0.1},  # dropout_p
        {"at_9": True},  # return_debug_mask
        {"num_splits": 1},
        {"alibi_slopes": torch.ones(4)},
        {"at_2": torch.zeros(577, 2, 32, dtype=torch.bfloat16)},  # values of another head_dim
        {"at_3": torch.zeros(9, dtype=torch.int64)},  # cum_seq_q
        {"at_3": None},
        {"at_4": None},
        {"seqused_k": torch.zeros(8, dtype=torch.int64)},
        {"block_table": torch.zeros(8, 2, dtype=torch.int32)},  # beside offsets of packed keys
        {"at_4": None, "block_table": torch.zeros(8, 2, dtype=torch.int32)},  # without lengths
    ],
)
def test_what_is_pytorchs(theirs, ours, changed):
    """It gets the call as it came."""
    activate()
    arguments, keywords = packed_call(**changed)
    if not keywords.keys() <= KNOWN:
        pytest.skip("this torch has no such argument")
    out, *_ = aten._flash_attention_forward(*arguments, **keywords)
    assert (out == 7.0).all()
    assert ours == []
    ((name, args, kwargs),) = theirs
    assert name == "_flash_attention_forward"
    for given, got in zip(arguments, args, strict=True):
        assert got is given or torch.equal(got, given) if isinstance(given, torch.Tensor) else got == given
    assert kwargs.keys() == keywords.keys()


def test_what_another_torch_may_pass():
    arguments, _ = packed_call()
    assert torch_registry._flash_forward(*arguments, page_table=torch.zeros(1)) is None
    q, k, v = dense()
    assert torch_registry._sdpa_forward(q, k, v, q_descale=torch.ones(1)) is None


@pytest.mark.parametrize("operator", ["_scaled_dot_product_flash_attention", "_flash_attention_forward"])
def test_gradients_with_dropout_are_pytorchs(theirs, ours, operator):
    activate()
    query, key, value = dense()
    if operator.startswith("_scaled"):
        out, *_ = aten._scaled_dot_product_flash_attention(query, key, value, 0.5)
    else:
        rows = (t.transpose(1, 2) for t in (query, key, value))
        out, *_ = aten._flash_attention_forward(*rows, None, None, 33, 33, 0.5, False, False)
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    assert all((grad == 7.0).all() for grad in grads)
    assert [name.endswith("backward") for name, *_ in theirs] == [False, True]
    assert ours == []


def test_what_flashcore_gives_pytorch_is_pytorchs_at_once(theirs):
    """On a CPU its plan is PyTorch's SDPA, or the reference: neither is taken, in the backward pass neither."""
    activate()
    query, key, value = dense()
    out, *_ = aten._scaled_dot_product_flash_attention(query, key, value)
    torch.autograd.grad(out.sum(), (query, key, value))
    case = with_its_heads(BY_NAME["edges"])
    q, k, v = (t.detach().requires_grad_() for t in case.inputs())
    varlen_attn(q, k, v, *packed_arguments(case), **GROUPED).sum().backward()
    assert [name for name, *_ in theirs] == [
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward",
        "_flash_attention_forward", "_flash_attention_backward",
    ]  # fmt: skip


@pytest.mark.parametrize("backward", ["torch-flash", "sdpa-recompute", "reference-recompute"])
def test_a_backward_pass_of_pytorchs_is_pytorchs_at_once(theirs, ours, monkeypatch, backward):
    """It would call the operator again."""
    activate()
    query, key, value = dense(heads_k=4)
    chosen = planning.recorded_backward
    monkeypatch.setattr(planning, "recorded_backward", lambda plan: replace(chosen(plan), backend=backward))
    out, *_ = aten._scaled_dot_product_flash_attention(query, key, value)
    torch.autograd.grad(out.sum(), (query, key, value))
    assert [name for name, _ in ours] == ["forward"]
    assert [name for name, *_ in theirs] == ["_scaled_dot_product_flash_attention_backward"]


def test_restored(theirs, ours):
    activate()
    query, key, value = dense()
    out, *_ = aten._scaled_dot_product_flash_attention(query, key, value)
    restore()
    aten._scaled_dot_product_flash_attention(query, key, value)
    torch.autograd.grad(out.sum(), (query, key, value))  # PyTorch's, from our output
    assert len(ours) == 1
    assert len(theirs) == 2
    activate()
    activate()  # the first is taken back before
    aten._scaled_dot_product_flash_attention(query, key, value)
    assert len(ours) == 2
    restore()
    aten._scaled_dot_product_flash_attention(query, key, value)
    assert len(theirs) == 3


def test_another_implementation_takes_over(theirs, ours):
    class Handle:
        def remove(self):
            pass

    torch.nn.attention.register_flash_attention_impl("nobody", register_fn=Handle)
    activate()
    torch.nn.attention.activate_flash_attention_impl("nobody")
    aten._scaled_dot_product_flash_attention(*dense())
    assert torch.nn.attention.current_flash_attention_impl() == "nobody"
    assert ours == []


def test_a_kind_of_call_is_planned_once(theirs, ours, monkeypatch):
    activate()
    planned = []
    chosen = torch_registry._new_choice
    monkeypatch.setattr(torch_registry, "_new_choice", lambda *args: planned.append(args) or chosen(*args))
    query, key, value = dense()
    for scale in (None, 0.5, 0.7):
        aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
        aten._scaled_dot_product_flash_attention(query, key, value[..., :8], scale=scale)  # PyTorch's
    assert len(planned) == 2
    aten._scaled_dot_product_flash_attention(query, key, value, is_causal=True)
    aten._scaled_dot_product_flash_attention(query, key, value, scale=-1.0)
    assert len(planned) == 4


# ---- on a GPU -------------------------------------------------------------------------------------------------------

@pytest.fixture
def taken(monkeypatch):
    """Active; whether FlashCore takes the calls that come, one after the other: (is a backward pass, is taken)."""
    seen = []
    choose = torch_registry._choose

    def noted(backward, *args):
        choice = choose(backward, *args)
        seen.append((backward, choice is not None))
        return choice

    monkeypatch.setattr(torch_registry, "_choose", noted)
    torch_registry.register()
    activate()
    return seen


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::flashcore.errors.FlashCoreWarning")
class TestOnAGpu:
    """On a Hopper GPU, where FlashCore has kernels of its own for all of these."""

    def inputs(self, layout, seqlen_q, seqlen_k, heads_k=8):
        shapes = (2, seqlen_q, 8, 64), (2, seqlen_k, heads_k, 64), (2, seqlen_k, heads_k, 64)
        tensors = [torch.randn(s, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for s in shapes]
        return [(t.contiguous() if layout == "bhsd" else t).requires_grad_() for t in tensors]

    @pytest.mark.parametrize("layout", ["bshd", "bhsd"])
    @pytest.mark.parametrize(
        ("shape", "options"),
        [
            ((513, 513), {}),
            ((513, 513), {"is_causal": True}),
            ((513, 513, 2), {"is_causal": True, "enable_gqa": True}),
            ((130, 300), {"scale": 0.2}),
            ((1, 700), {}),
        ],
    )
    def test_sdpa(self, taken, shape, options, layout):
        query, key, value = self.inputs(layout, *shape)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(query, key, value, **options)
        dout = torch.randn_like(out)
        grads = torch.autograd.grad(out, (query, key, value), dout)
        assert taken[0] == (False, True)
        assert taken[1:] == [(True, taken[1][1])]
        assert taken[1][1] or shape[0] == 1
        assert out.stride() == torch.empty_like(query).stride()
        named = {"causal": options.get("is_causal", False), "scale": options.get("scale")}
        assert_forward(*swapped(out), None, *swapped(query, key, value), **named)
        assert_gradients(swapped(*grads), *swapped(query, key, value), *swapped(dout), **named)

    def test_dropout_is_pytorchs(self, taken):
        query, key, value = self.inputs("bshd", 256, 256)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            torch.manual_seed(0)
            out = F.scaled_dot_product_attention(query, key, value, dropout_p=0.3)
            restore()
            torch.manual_seed(0)
            again = F.scaled_dot_product_attention(query, key, value, dropout_p=0.3)
        assert torch.equal(out, again)
        assert taken == []

    @pytest.mark.parametrize("first", ["flashcore", "pytorch"])
    def test_either_takes_the_others_output(self, taken, first):
        query, key, value = self.inputs("bshd", 300, 300)
        if first == "pytorch":
            restore()
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        restore()
        if first == "pytorch":
            activate()
        dout = torch.randn_like(out)
        grads = torch.autograd.grad(out, (query, key, value), dout)
        assert taken == [(first == "pytorch", True)]
        assert_gradients(swapped(*grads), *swapped(query, key, value), *swapped(dout), causal=True)

    def test_restored(self, taken):
        query, key, value = self.inputs("bshd", 300, 300)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            F.scaled_dot_product_attention(query, key, value)
            restore()
            out = F.scaled_dot_product_attention(query, key, value)
        assert taken == [(False, True)]
        assert_forward(*swapped(out), None, *swapped(query, key, value))

    @pytest.mark.parametrize(
        "name",
        [
            "edges", "edges_other_keys_causal", "d128", "d256", "layout_packed",
            pytest.param("window", marks=has_windows),
        ],
    )  # fmt: skip
    def test_varlen(self, taken, name):
        case = with_its_heads(BY_NAME[name])
        q, k, v = (t.detach().requires_grad_() for t in case.inputs("cuda"))
        options = {**window_of(case), **GROUPED}
        out, lse = varlen_attn(q, k, v, *packed_arguments(case, "cuda"), **options, return_aux=AuxRequest(lse=True))
        dout = torch.randn_like(out)
        grads = torch.autograd.grad(out, (q, k, v), dout)
        assert taken == [(False, True), (True, True)]
        assert_their_lse(case, out.detach(), lse, q.detach(), k.detach(), v.detach())
        assert_packed_gradients(case, grads, q.detach(), k.detach(), v.detach(), dout)

    @has_pages
    @pytest.mark.parametrize("name", ["mixed_pages_of_1", "mixed_pages_of_16", "mixed_pages_of_256"])
    def test_pages(self, taken, name):
        case = PAGED_BY_NAME[name]
        out, lse = call_with_pages(case, "cuda")
        given = case.inputs("cuda")
        assert taken == [(False, True)]
        assert_their_lse(case.packed, out, lse, given.q, given.k, given.v)

    def test_a_compiled_program(self, taken):
        def attend(query, key, value):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True) * 2

        query, key, value = self.inputs("bhsd", 256, 256)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = torch.compile(attend, fullgraph=True)(query, key, value)
            dout = torch.randn_like(out)
            grads = torch.autograd.grad(out, (query, key, value), dout)
        assert taken == [(False, True), (True, True)]
        assert_gradients(swapped(*grads), *swapped(query, key, value), *swapped(2 * dout), causal=True)

    def test_a_captured_graph(self, taken):
        query, key, value = (t.detach() for t in self.inputs("bshd", 256, 256))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            F.scaled_dot_product_attention(query, key, value)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = F.scaled_dot_product_attention(query, key, value)
        query.normal_()
        graph.replay()
        assert taken == [(False, True)] * 2
        assert_forward(*swapped(out), None, *swapped(query, key, value))

    def test_flashcores_own_use_of_pytorch_ends(self, taken):
        """Its backend "sdpa" calls the operators that are replaced."""
        query, key, value = self.inputs("bshd", 256, 256)
        q, k, v = (t.detach().transpose(1, 2).requires_grad_() for t in (query, key, value))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = flashcore.attention(q, k, v, backend="sdpa")
            dout = torch.randn_like(out)
            grads = torch.autograd.grad(out, (q, k, v), dout)
            with planning.override(backend="sdpa"):
                by_pytorch = F.scaled_dot_product_attention(query, key, value)
        assert_forward(out.detach(), None, q.detach(), k.detach(), v.detach())
        assert_gradients(grads, q.detach(), k.detach(), v.detach(), dout)
        assert_forward(*swapped(by_pytorch), None, q.detach(), k.detach(), v.detach())
        assert taken[:2] == [(False, True), (True, True)]
        assert set(taken[2:]) == {(False, False)}  # the operator, and that beneath PyTorch's own
