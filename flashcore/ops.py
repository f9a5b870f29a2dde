"""``torch.ops.flashcore``: the calls as operators that torch.compile and torch.export can carry in a graph.

:func:`flashcore.attention` and :func:`flashcore.matmul` use them while somebody records operators or answers them
(``flashcore/watching.py``), and only then: an eager call through them would take longer on the host. The plan decides
which backend runs when the graph runs, so lengths may be symbols before. A program that loads an exported graph imports
this module first.

``attention_forward`` returns ``(out, lse)``, contiguous; the LSE is empty where nobody asked for it.
``attention_backward`` returns ``(dq, dk, dv)``, contiguous, by the plan's backward pass; where that is autograd
(PyTorch's own attention and the reference), it computes the forward again.

``matmul`` returns what ``flashcore.matmul`` does. Its gradients are made of itself and of PyTorch's operations, which
the compiler can fuse.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import torch
from torch.utils.flop_counter import register_flop_formula

from flashcore import api, calls, gemm
from flashcore import plan as planning
from flashcore.gemm_problem import check_arguments
from flashcore.plan import Plan
from flashcore.problem import LEAST_SCALE, AttentionProblem, check_tensors

_runs = calls.Runs()

_FORWARD = "flashcore::attention_forward"
_BACKWARD = "flashcore::attention_backward"
_OPTIONS = "bool causal, float? scale, bool needs_grad, bool return_lse, str backend"

# Backends read any strides, but not all equally fast: the compiler keeps those that an eager call would see.
_TAGS = torch.Tag.needs_fixed_stride_order

torch.library.define(_FORWARD, f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)", tags=_TAGS)
torch.library.define(
    _BACKWARD,
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def attention(q, k, v, causal, scale, return_lse, backend) -> tuple[torch.Tensor, torch.Tensor]:
    """``flashcore.attention`` by operators. No gradient flows through the LSE."""
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    out, lse = torch.ops.flashcore.attention_forward(q, k, v, causal, scale, needs_grad, return_lse, backend)
    return out, lse.detach()


def attention_backward(dout, q, k, v, out, lse, *options) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) by the operator. `options` are those of the schema, in its order."""
    return torch.ops.flashcore.attention_backward(dout, q, k, v, out, lse, *options)


@torch.library.impl(_FORWARD, "default")
def _forward(q, k, v, causal, scale, needs_grad, return_lse, backend):
    plan = _plan(q, k, v, causal, scale, needs_grad, return_lse, backend)
    out, lse = calls.on_its_device(q, plan.run)(q, k, v, scale)
    if not plan.problem.needs_lse:
        lse = q.new_empty(0, dtype=torch.float32)
    elif lse is None:  # nobody reads it: autograd differentiates this backend without
        lse = q.new_zeros(plan.problem.lse_shape, dtype=torch.float32)
    return out, lse


@torch.library.register_fake(_FORWARD)
def _(q, k, v, causal, scale, needs_grad, return_lse, backend):
    check_tensors(q, k, v)
    batch, seqlen_q, heads_q, _ = q.shape
    lse_shape = (batch, heads_q, seqlen_q) if needs_grad or return_lse else (0,)
    return q.new_empty(batch, seqlen_q, heads_q, v.shape[3]), q.new_empty(lse_shape, dtype=torch.float32)


@torch.library.impl(_BACKWARD, "default")
def _backward(dout, q, k, v, out, lse, causal, scale, needs_grad, return_lse, backend):
    plan = planning.recorded_backward(_plan(q, k, v, causal, scale, needs_grad, return_lse, backend))
    grads = calls.on_its_device(q, plan.run)(q, k, v, out, lse, dout, None, scale)
    return tuple(grad.contiguous() for grad in grads)


@torch.library.register_fake(_BACKWARD)
def _(dout, q, k, v, out, lse, causal, scale, needs_grad, return_lse, backend):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx, dout, _):
    if torch.is_grad_enabled():
        api.refuse_second_derivative()
    q, k, v, out, lse = ctx.saved_tensors
    causal, scale, needs_grad, return_lse, backend = ctx.options
    options = causal, scale, True, return_lse, backend
    if not needs_grad:  # it was recorded where nobody needed a gradient, nor the LSE
        out, lse = torch.ops.flashcore.attention_forward(q, k, v, *options)
    return *attention_backward(dout, q, k, v, out, lse, *options), *(None for _ in options)


@register_flop_formula(torch.ops.flashcore.attention_forward)
def _count_forward(q, k, v, *_, out_shape=None) -> int:
    """Of whole products, as PyTorch counts its own attention: a causal mask saves nothing."""
    return 2 * q[0] * q[2] * q[1] * k[1] * (q[3] + v[3])


@register_flop_formula(torch.ops.flashcore.attention_backward)
def _count_backward(dout, q, k, v, *_, out_shape=None) -> int:
    """Five products: the scores again, and the gradients of the probabilities, q, k and v."""
    return 2 * q[0] * q[2] * q[1] * k[1] * (3 * q[3] + 2 * v[3])


torch.library.register_autograd(_FORWARD, _differentiate, setup_context=_setup_context)
torch.library.register_autograd(_BACKWARD, api.refuse_second_derivative)


def _plan(q, k, v, causal, scale, needs_grad, return_lse, backend) -> Plan:
    """The plan for these arguments, as an eager call would find it."""
    key = (
        q.shape, k.shape, v.shape, q.dtype, q.device, causal,
        scale is None or LEAST_SCALE <= scale <= sys.float_info.max or scale, needs_grad, return_lse, backend,
        planning.active_override.get(),
    )  # fmt: skip
    found = _runs.recent.get(key) or _runs.recall(key)
    if found is None:
        problem = AttentionProblem.from_tensors(q, k, v, causal=causal, scale=scale, return_lse=return_lse)
        plan = planning.prepared_plan(replace(problem, needs_grad=needs_grad), backend)
        found = _runs.remember(key, plan)
    return found


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
