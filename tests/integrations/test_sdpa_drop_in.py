"""The stand-in for PyTorch's scaled_dot_product_attention: its meaning, who computes what, and who gets to see it."""

import inspect
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import flashcore
from flashcore.backends.sdpa import scaled_dot_product_attention as torch_sdpa
from flashcore.integrations import sdpa
from tests.tolerance import assert_forward, assert_gradients


def inputs(seqlen_q=5, seqlen_k=5, heads_q=4, heads_k=4, head_dim_v=16, **options):
    """(batch, heads, seqlen, head_dim) tensors."""
    shapes = (heads_q, seqlen_q, 16), (heads_k, seqlen_k, 16), (heads_k, seqlen_k, head_dim_v)
    return [torch.randn(2, *shape, **options) for shape in shapes]


TAKEN = {
    "full": ({}, {}),
    "other_lengths": ({"seqlen_k": 9}, {}),
    "causal": ({}, {"is_causal": True}),
    "causal_more_keys_is_aligned_to_the_top_left": ({"seqlen_k": 9}, {"is_causal": True}),
    "causal_two_queries": ({"seqlen_q": 2, "seqlen_k": 9}, {"is_causal": True}),
    "scale": ({}, {"scale": 0.3}),
    "grouped": ({"heads_k": 2}, {"enable_gqa": True}),
    "grouped_causal_more_keys": ({"heads_k": 1, "seqlen_k": 7}, {"enable_gqa": True, "is_causal": True}),
    "wide_values": ({"head_dim_v": 24}, {}),
    "bfloat16": ({"dtype": torch.bfloat16}, {"is_causal": True}),
    "no_keys": ({"seqlen_k": 0}, {}),
}
DECLINED = {
    "boolean_mask": ({}, {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()}, "attn_mask"),
    "bias": ({}, {"attn_mask": torch.randn(2, 1, 5, 5)}, "attn_mask"),
    "dropout": ({}, {"dropout_p": 0.5}, "dropout_p=0.5"),
    "causal_more_queries": ({"seqlen_q": 9}, {"is_causal": True}, "more queries than keys"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_flashcore_computes(kernel, name):
    shape, options = TAKEN[name]
    query, key, value = (t.requires_grad_() for t in inputs(**shape))
    choice = sdpa.explain(query, key, value, **options)
    assert choice.declined is None
    assert choice.plan.backend == ("empty" if name == "no_keys" else "fake")
    assert kernel == []
    out = flashcore.scaled_dot_product_attention(query, key, value, **options)
    expected = torch_sdpa(query, key, value, **options)
    assert kernel == ([] if name == "no_keys" else [choice.plan.problem])
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)

    seen = (
        query.shape[2] if options.get("is_causal") else key.shape[2]
    )  # all others lie behind the top-left diagonal
    q, k, v = (t.detach().transpose(1, 2) for t in (query, key[:, :, :seen], value[:, :, :seen]))
    rule = {"causal": options.get("is_causal", False), "scale": options.get("scale")}
    assert_forward(out.detach().transpose(1, 2), None, q, k, v, **rule)
    assert_forward(expected.detach().transpose(1, 2).contiguous(), None, q, k, v, **rule)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (query, key, value), dout)
    assert not any(grad[:, :, seen:].any() for grad in grads[1:])
    grads = [grad[:, :, : t.shape[1]].transpose(1, 2) for grad, t in zip(grads, (q, k, v), strict=True)]
    assert_gradients(grads, q, k, v, dout.transpose(1, 2), **rule)


def test_one_causal_query_sees_the_first_key_only(kernel):
    query, key, value = inputs(seqlen_q=1, seqlen_k=9)
    out = flashcore.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(out, value[:, :, :1])
    assert len(kernel) == 1


@pytest.mark.parametrize("name", DECLINED)
def test_what_pytorch_computes(kernel, name):
    shape, options, reason = DECLINED[name]
    tensors = inputs(**shape)
    choice = sdpa.explain(*tensors, **options)
    assert choice.plan is None
    assert reason in choice.declined
    assert str(choice).startswith("PyTorch: ")
    results = []
    for function in (flashcore.scaled_dot_product_attention, torch_sdpa):
        torch.manual_seed(0)
        results.append(function(*tensors, **options))
    assert torch.equal(*results)
    assert kernel == []


OTHER_INPUTS = {
    "three_dimensions": ([torch.randn(4, 5, 16)] * 3, "3 dimensions"),
    "five_dimensions": ([torch.randn(1, 2, 4, 5, 16)] * 3, "5 dimensions"),
    "broadcast_batch": ([torch.randn(2, 4, 5, 16), *[torch.randn(1, 4, 5, 16)] * 2], "one batch size"),
    "subclass": ([torch.randn(1, 4, 5, 16).as_subclass(type("Mine", (torch.Tensor,), {}))] * 3, "Mine"),
    "nested": (
        [torch.nested.nested_tensor([torch.randn(4, 5, 16)], layout=torch.jagged)] * 3,
        "NestedTensor",
    ),
}


@pytest.mark.parametrize("name", OTHER_INPUTS)
def test_inputs_that_only_pytorch_knows(kernel, name):
    tensors, reason = OTHER_INPUTS[name]
    assert reason in sdpa.explain(*tensors).declined
    out, expected = flashcore.scaled_dot_product_attention(*tensors), torch_sdpa(*tensors)
    assert type(out) is type(expected)
    if out.is_nested:
        out, expected = out.unbind()[0], expected.unbind()[0]
    assert torch.equal(out, expected)
    assert kernel == []


def test_strided_nested_tensors(kernel):
    """Of another length each: PyTorch computes them one by one."""
    tensors = [torch.nested.nested_tensor([torch.randn(4, s, 16) for s in (5, 7)]) for _ in range(3)]
    assert sdpa.explain(*tensors).declined == "query is a nested tensor"
    plain = torch.randn(2, 4, 5, 16)
    assert sdpa.explain(plain, *tensors[1:]).declined == "key is a nested tensor"
    for function in (sdpa.scaled_dot_product_attention, F.scaled_dot_product_attention):
        with sdpa.replace_torch():
            out = function(*tensors)
        for one, *parts in zip(out.unbind(), *(t.unbind() for t in tensors), strict=True):
            torch.testing.assert_close(one, torch_sdpa(*(part[None] for part in parts))[0])
    assert kernel == []


INVALID = {
    "mask_shape": (inputs(), {"attn_mask": torch.zeros(3, 3)}),
    "dtypes": ([inputs()[0].half(), *inputs()[1:]], {}),
    "heads": (inputs(heads_k=2), {}),
    "no_tensor": ([None, *inputs()[1:]], {}),
    "dropout": (inputs(), {"dropout_p": -1.0}),
}


@pytest.mark.parametrize("name", INVALID)
def test_errors_are_pytorchs(kernel, name):
    tensors, options = INVALID[name]
    with pytest.raises((RuntimeError, TypeError)) as theirs:
        torch_sdpa(*tensors, **options)
    with pytest.raises(theirs.type) as ours:
        flashcore.scaled_dot_product_attention(*tensors, **options)
    assert str(ours.value) == str(theirs.value)
    assert sdpa.explain(*tensors, **options).declined


def test_signature_is_pytorchs():
    """PyTorch's is a built-in; its schema has the names, their order, their defaults and which are keywords only."""
    schema = torch.ops.aten.scaled_dot_product_attention.default._schema
    theirs = [(a.name, a.default_value, a.kwarg_only) for a in schema.arguments]
    for function in (flashcore.scaled_dot_product_attention, sdpa.explain):
        parameters = inspect.signature(function).parameters.values()
        ours = [
            (p.name, p.default if p.default is not p.empty else None, p.kind is p.KEYWORD_ONLY)
            for p in parameters
        ]
        assert ours == theirs


def test_without_a_kernel_the_call_is_pytorchs():
    """On this CPU the plan ends at PyTorch's own attention: the same bits."""
    tensors = inputs(seqlen_q=20, seqlen_k=23, heads_k=2)
    options = {"is_causal": True, "enable_gqa": True}
    assert torch.equal(
        flashcore.scaled_dot_product_attention(*tensors, **options), torch_sdpa(*tensors, **options)
    )
    assert "sdpa" in str(sdpa.explain(*tensors, **options))


@pytest.mark.parametrize("options", [{}, {"attn_mask": torch.zeros(5, 5)}])
def test_autocast(kernel, options):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flashcore.scaled_dot_product_attention(*inputs(), **options).dtype == torch.bfloat16
    assert len(kernel) == (not options)


# ---- unmodified programs -----------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """Somebody else's."""

    def __init__(self):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        heads = x.unflatten(2, (4, 8)).transpose(1, 2)
        return x + F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(
            1, 2
        ).flatten(2)


def test_unmodified_model(kernel):
    model, x = Model(), torch.randn(2, 7, 32)
    expected = model(x)
    with sdpa.replace_torch():
        out = model(x)
    assert [problem.causal for problem in kernel] == [False, True]
    torch.testing.assert_close(out, expected)
    model(x)
    assert len(kernel) == 2


def test_restores_what_was_there():
    ours = flashcore.scaled_dot_product_attention
    with sdpa.replace_torch():
        assert F.scaled_dot_product_attention is ours
        with sdpa.replace_torch():
            assert F.scaled_dot_product_attention is ours
        assert F.scaled_dot_product_attention is ours
    assert F.scaled_dot_product_attention is torch_sdpa
    with pytest.raises(KeyError), sdpa.replace_torch():
        raise KeyError
    assert F.scaled_dot_product_attention is torch_sdpa


def test_restores_somebody_elses(monkeypatch):
    def other(*_):
        pass

    monkeypatch.setattr(F, "scaled_dot_product_attention", other)
    with sdpa.replace_torch():
        pass
    assert F.scaled_dot_product_attention is other


def test_left_in_any_order():
    """As threads leave their blocks."""
    ours = flashcore.scaled_dot_product_attention
    one, two, three = (sdpa.replace_torch() for _ in range(3))
    for replaced in (one, three, two):
        assert F.scaled_dot_product_attention is ours
        replaced.restore()
    assert F.scaled_dot_product_attention is torch_sdpa


def test_around_somebody_elses():
    def other(*_):
        pass

    with sdpa.replace_torch():
        F.scaled_dot_product_attention = other
        with sdpa.replace_torch():
            assert F.scaled_dot_product_attention is flashcore.scaled_dot_product_attention
        assert F.scaled_dot_product_attention is other
    assert F.scaled_dot_product_attention is torch_sdpa


def test_left_in_any_order_around_somebody_elses():
    def other(*_):
        pass

    one = sdpa.replace_torch()
    F.scaled_dot_product_attention = other
    two = sdpa.replace_torch()
    one.restore()
    assert F.scaled_dot_product_attention is flashcore.scaled_dot_product_attention
    two.restore()
    assert F.scaled_dot_product_attention is other
    F.scaled_dot_product_attention = torch_sdpa


def test_entered_again():
    ours, replaced = flashcore.scaled_dot_product_attention, sdpa.replace_torch()
    for _ in range(2):
        with replaced:
            assert F.scaled_dot_product_attention is ours
            with replaced:
                assert F.scaled_dot_product_attention is ours
            assert F.scaled_dot_product_attention is ours
        assert F.scaled_dot_product_attention is torch_sdpa
    with replaced, replaced:
        replaced.restore()
        assert F.scaled_dot_product_attention is torch_sdpa
    fresh = sdpa.replace_torch()
    fresh.restore()
    with fresh:
        assert F.scaled_dot_product_attention is ours
    assert F.scaled_dot_product_attention is torch_sdpa


def test_for_the_rest_of_the_program():
    replaced = sdpa.replace_torch()
    try:
        seen = []
        thread = threading.Thread(target=lambda: seen.append(F.scaled_dot_product_attention))
        thread.start()
        thread.join()
        assert seen == [flashcore.scaled_dot_product_attention]
    finally:
        replaced.restore()
    assert F.scaled_dot_product_attention is torch_sdpa
    with sdpa.replace_torch():
        replaced.restore()
        assert F.scaled_dot_product_attention is flashcore.scaled_dot_product_attention


def test_fallbacks_do_not_come_back_here():
    """FlashCore's own use of PyTorch's function, and what it declines, must not meet the replacement."""
    tensors = inputs(seqlen_k=7)
    with sdpa.replace_torch():
        F.scaled_dot_product_attention(*tensors)
        F.scaled_dot_product_attention(*tensors, attn_mask=torch.zeros(5, 7))
        q, k, v = (t.requires_grad_() for t in tensors)
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    assert q.grad is not None


# ---- who looks at calls of PyTorch's functions -------------------------------------------------------------------


class Recorder(TorchFunctionMode):
    """Sees functions called, and takes the place of PyTorch's attention if told to."""

    def __init__(self, instead=None):
        super().__init__()
        self.instead, self.seen = instead, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        if function is torch_sdpa and self.instead is not None:
            return self.instead
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "scale": 0.3}])
def test_a_function_mode_sees_the_call(kernel, options):
    tensors, instead = inputs(), torch.zeros(1)
    with sdpa.replace_torch():
        with Recorder() as recorder:
            out = F.scaled_dot_product_attention(*tensors, **options)
            assert "TorchFunctionMode" in sdpa.explain(*tensors, **options).declined
        with Recorder(instead):
            assert F.scaled_dot_product_attention(*tensors, **options) is instead
        with torch.device("cpu"), Recorder(instead), torch.device("cpu"):
            assert F.scaled_dot_product_attention(*tensors, **options) is instead
    assert torch_sdpa in recorder.seen
    torch.testing.assert_close(out, torch_sdpa(*tensors, **options))
    assert kernel == []


def test_a_function_mode_sees_the_call_when_compiled(kernel):
    tensors = inputs()
    torch._dynamo.reset()
    with sdpa.replace_torch(), Recorder(torch.zeros(1)):
        out = torch.compile(lambda *args: F.scaled_dot_product_attention(*args), backend="eager")(*tensors)
    assert out.shape == (1,)


def test_a_default_device_is_no_reason(kernel):
    """It is a function mode too, which programs leave on."""
    with sdpa.replace_torch(), torch.device("cpu"):
        F.scaled_dot_product_attention(*inputs())
    assert len(kernel) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_gets_pytorchs():
    def program(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)

    def ours(q, k, v):
        return flashcore.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)

    attention, x = torch.nn.MultiheadAttention(32, 4, batch_first=True).eval(), torch.randn(2, 5, 32)
    expected = attention(x, x, x, need_weights=False)[0]
    with sdpa.replace_torch():
        scripted = torch.jit.script(attention)
        scripted_program = torch.jit.script(program)
    torch.testing.assert_close(scripted(x, x, x, need_weights=False)[0], expected)
    q, k, v = inputs()
    for function in (scripted_program, torch.jit.script(ours)):
        assert torch.equal(function(q, k, v), torch_sdpa(q, k, v, is_causal=True, scale=0.3))
    assert "aten::scaled_dot_product_attention" in str(scripted_program.graph)
