"""``torch.ops.flashcore``: the calls as operators that torch.compile and torch.export can carry in a graph.

:func:`flashcore.attention` and :func:`flashcore.matmul` use them while somebody records operators or answers them
(``flashcore/watching.py``), and only then: an eager call through them would take longer on the host. The plan decides
which backend runs when the graph runs, so lengths may be symbols before. A program that loads an exported graph imports
this module first.

``attention_forward`` returns ``(out, lse)``, contiguous; the LSE is empty where nobody asked for it. Its mask says how
many keys to the left and right of its own a query sees, None for all; what becomes of a score is an expression's text.
``attention_backward`` returns ``(dq, dk, dv)``, contiguous, by the plan's backward pass; where that is autograd
(PyTorch's own attention and the reference), it computes the forward again. The gradient of sinks is made of PyTorch's
operations.

``matmul`` returns what ``flashcore.matmul`` does. Its gradients are made of itself and of PyTorch's operations, which
the compiler can fuse.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import torch
from torch.utils.flop_counter import register_flop_formula

from flashcore import api, calls, gemm, gradients
from flashcore import plan as planning
from flashcore.gemm_problem import check_arguments
from flashcore.plan import Plan
from flashcore.problem import LEAST_SCALE, AttentionProblem, check_tensors
from flashcore.score import check as check_score
from flashcore.score import describe, parse

_runs = calls.Runs()

_FORWARD = "flashcore::attention_forward"
_BACKWARD = "flashcore::attention_backward"
# What the score looks up, in the order of its slots, or None, and the sinks. Not a list that is always there: PyTorch
# takes no batch of output gradients apart for an operator with one, and AOTInductor's packages fail with an empty one.
_EXTRAS = "Tensor[]? captured, Tensor? sink"
# The mask, what becomes of a scaled score as an expression's text, and how to plan.
_OPTIONS = "SymInt? left, SymInt? right, float? scale, str? score, bool needs_grad, bool return_lse, str backend"

# Backends read any strides, but not all equally fast: the compiler keeps those that an eager call would see.
_TAGS = torch.Tag.needs_fixed_stride_order

torch.library.define(
    _FORWARD, f"(Tensor q, Tensor k, Tensor v, {_EXTRAS}, {_OPTIONS}) -> (Tensor, Tensor)", tags=_TAGS
)
torch.library.define(
    _BACKWARD,
    f"(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_EXTRAS}, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def attention(q, k, v, extras, mask, scale, spec, return_lse, backend) -> tuple[torch.Tensor, torch.Tensor]:
    """``flashcore.attention`` by operators."""
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, *extras))
    arguments = _arguments(extras, mask, scale, spec, needs_grad, return_lse, backend)
    return torch.ops.flashcore.attention_forward(q, k, v, *arguments)


def attention_backward(
    dout, dlse, q, k, v, out, lse, extras, mask, scale, spec, return_lse, backend
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) by the operator."""
    arguments = _arguments(extras, mask, scale, spec, True, return_lse, backend)
    return torch.ops.flashcore.attention_backward(dout, dlse, q, k, v, out, lse, *arguments)


def _arguments(extras, mask, scale, spec, needs_grad, return_lse, backend) -> tuple:
    """What comes after the tensors that every call has, in the schemas' order."""
    captured, sink = (extras, None) if spec.sink is None else (extras[:-1], extras[-1])
    text = None if spec.change is None else spec.change.text
    return list(captured) or None, sink, mask.left, mask.right, scale, text, needs_grad, return_lse, backend


@torch.library.impl(_FORWARD, "default")
def _forward(q, k, v, captured, sink, left, right, scale, score, needs_grad, return_lse, backend):
    plan, extras = _plan(q, k, v, captured, sink, left, right, scale, score, needs_grad, return_lse, backend)
    out, lse = calls.on_its_device(q, plan.run)(q, k, v, scale, *extras)
    if not plan.problem.needs_lse:
        lse = q.new_empty(0, dtype=torch.float32)
    elif lse is None:  # nobody reads it: autograd differentiates this backend without
        lse = q.new_zeros(plan.problem.lse_shape, dtype=torch.float32)
    return out, lse


@torch.library.register_fake(_FORWARD)
def _(q, k, v, captured, sink, left, right, scale, score, needs_grad, return_lse, backend):
    check_tensors(q, k, v)
    check_score(*_described(score, captured, sink), q, k.shape[1])
    batch, seqlen_q, heads_q, _ = q.shape
    lse_shape = (batch, heads_q, seqlen_q) if needs_grad or return_lse else (0,)
    return q.new_empty(batch, seqlen_q, heads_q, v.shape[3]), q.new_empty(lse_shape, dtype=torch.float32)


@torch.library.impl(_BACKWARD, "default")
def _backward(
    dout, dlse, q, k, v, out, lse, captured, sink, left, right, scale, score, needs_grad, return_lse, backend
):
    plan, extras = _plan(q, k, v, captured, sink, left, right, scale, score, needs_grad, return_lse, backend)
    backward = planning.recorded_backward(plan) if dlse is None else plan.backward_with_dlse
    grads = calls.on_its_device(q, backward.run)(q, k, v, out, lse, dout, dlse, scale, *extras)
    return tuple(grad.contiguous() for grad in grads)


@torch.library.register_fake(_BACKWARD)
def _(dout, dlse, q, k, v, *_):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, captured, sink, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, sink, *captured or ())
    ctx.set_materialize_grads(False)  # whether the loss depends on the LSE makes a difference


def _differentiate(ctx, dout, dlse):
    if torch.is_grad_enabled():
        api.refuse_second_derivative()
    q, k, v, out, lse, sink, *captured = ctx.saved_tensors
    left, right, scale, score, needs_grad, return_lse, backend = ctx.options
    arguments = captured or None, sink, left, right, scale, score, True, return_lse, backend
    if not needs_grad:  # it was recorded where nobody needed a gradient, nor the LSE
        out, lse = torch.ops.flashcore.attention_forward(q, k, v, *arguments)
    dout, dlse = gradients.of_results(out, lse, dout, dlse)
    dq, dk, dv = torch.ops.flashcore.attention_backward(dout, dlse, q, k, v, out, lse, *arguments)
    dsink = gradients.of_sinks(sink, out, lse, dout, dlse) if ctx.needs_input_grad[4] else None
    return dq, dk, dv, [None] * len(captured) or None, dsink, *(None for _ in ctx.options)


@register_flop_formula(torch.ops.flashcore.attention_forward)
def _count_forward(q, k, v, *_, out_shape=None) -> int:
    """Of whole products, as PyTorch counts its own attention: no mask saves any, and scores and sinks are free."""
    return 2 * q[0] * q[2] * q[1] * k[1] * (q[3] + v[3])


@register_flop_formula(torch.ops.flashcore.attention_backward)
def _count_backward(dout, dlse, q, k, v, *_, out_shape=None) -> int:
    """Five products: the scores again, and the gradients of the probabilities, q, k and v."""
    return 2 * q[0] * q[2] * q[1] * k[1] * (3 * q[3] + 2 * v[3])


torch.library.register_autograd(_FORWARD, _differentiate, setup_context=_setup_context)
torch.library.register_autograd(_BACKWARD, api.refuse_second_derivative)


def _plan(
    q, k, v, captured, sink, left, right, scale, score, needs_grad, return_lse, backend
) -> tuple[Plan, tuple[torch.Tensor, ...]]:
    """The plan for these arguments, as an eager call would find it, and what its run gets after the scale."""
    extras = (*(captured or ()), *(() if sink is None else (sink,)))
    key = (
        q.shape, k.shape, v.shape, q.dtype, q.device, tuple((t.shape, t.dtype, t.device) for t in extras),
        sink is None, left, right, scale is None or LEAST_SCALE <= scale <= sys.float_info.max or scale, score,
        needs_grad, return_lse, backend, planning.active_override.get(),
    )  # fmt: skip
    found = _runs.recent.get(key) or _runs.recall(key)
    if found is None:
        spec, _ = _described(score, captured, sink)
        problem = AttentionProblem.from_tensors(
            q, k, v, window=(left, right), scale=scale, score=spec, extras=extras, return_lse=return_lse
        )
        plan = planning.prepared_plan(replace(problem, needs_grad=needs_grad), backend)
        found = _runs.remember(key, plan)
    return found, extras


def _described(score, captured, sink):
    """The spec and its tensors of an operator's arguments."""
    return describe(None if score is None else parse(score), captured or (), sink)


# ---- matrix products ----------------------------------------------------------------------------------------------

_MATMUL = "flashcore::matmul"

torch.library.define(
    _MATMUL, "(Tensor a, Tensor b, Tensor? bias, ScalarType? out_dtype, str? activation) -> Tensor", tags=_TAGS
)


def matmul(a, b, bias, out_dtype, activation) -> torch.Tensor:
    """``flashcore.matmul`` by its operator."""
    return torch.ops.flashcore.matmul(a, b, bias, out_dtype, activation)


@torch.library.impl(_MATMUL, "default")
def _matmul(a, b, bias, out_dtype, activation):
    return gemm._matmul(a, b, bias, out_dtype, activation)


@torch.library.register_fake(_MATMUL)
def _(a, b, bias, out_dtype, activation):
    check_arguments(a, b, out_dtype=out_dtype, bias=bias, activation=activation)
    batch = (a if a.dim() == 3 else b).shape[:-2]
    columns = b.shape[-1] // 2 if activation == "swiglu" else b.shape[-1]
    return a.new_empty((*batch, a.shape[-2], columns), dtype=out_dtype or a.dtype)


@register_flop_formula(torch.ops.flashcore.matmul)
def _count_matmul(a, b, *_, out_shape=None) -> int:
    return 2 * math.prod((a if len(a) == 3 else b)[:-2]) * a[-2] * a[-1] * b[-1]


def _setup_matmul_context(ctx, inputs, output):
    a, b, bias, ctx.out_dtype, ctx.activation = inputs
    ctx.save_for_backward(a, b, bias)


def _differentiate_matmul(ctx, dout):
    options = ctx.out_dtype, ctx.activation, ctx.needs_input_grad[:3]
    return *gemm.differentiate(matmul, *ctx.saved_tensors, *options, dout), None, None


torch.library.register_autograd(_MATMUL, _differentiate_matmul, setup_context=_setup_matmul_context)
