"""``torch.ops.flashcore``: the calls as operators that torch.compile and torch.export can carry in a graph.

:func:`flashcore.attention` and :func:`flashcore.matmul` use them while somebody records operators or answers them
(``flashcore/watching.py``), and only then: an eager call through them would take longer on the host. The plan decides
which backend runs when the graph runs, so lengths may be symbols before. A program that loads an exported graph imports
this module first.

``attention_forward`` returns ``(out, lse)``, contiguous; the LSE is empty where nobody asked for it. Its mask says how
many keys to the left and right of its own a query sees, None for all; what becomes of a score is an expression's text.
Packed sequences are their offsets and how long the longest is, on both sides, None for dense ones; keys in pages are
their table and lengths.
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
from typing import NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from flashcore import api, calls, gemm, gradients
from flashcore import plan as planning
from flashcore.gemm_problem import check_arguments
from flashcore.plan import Plan
from flashcore.problem import LEAST_SCALE, AttentionProblem, check_tensors, refuse_gradients_of_pages
from flashcore.score import Score, describe, parse
from flashcore.score import check as check_score
from flashcore.sequences import Packed, Paged

_runs = calls.Runs()

_FORWARD = "flashcore::attention_forward"
_BACKWARD = "flashcore::attention_backward"
# Where packed sequences lie, what the score looks up, in the order of its slots, or None, and the sinks. Not a list
# that is always there: PyTorch takes no batch of output gradients apart for an operator with one, and AOTInductor's
# packages fail with an empty one.
_PLACES = "Tensor? offsets_q, Tensor? used_q, Tensor? offsets_k, Tensor? used_k, Tensor? table_k, Tensor? lengths_k"
_EXTRAS = f"{_PLACES}, Tensor[]? captured, Tensor? sink"
# Bounds of packed sequences, the mask, what becomes of a scaled score as an expression's text, and how to plan.
_OPTIONS = (
    "SymInt? longest_q, SymInt? longest_k, SymInt? left, SymInt? right, float? scale, str? score, bool needs_grad, "
    "bool return_lse, str backend"
)

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


class _Arguments(NamedTuple):
    """What comes after the tensors that every call has, as the schemas have it."""

    offsets_q: torch.Tensor | None
    used_q: torch.Tensor | None
    offsets_k: torch.Tensor | None
    used_k: torch.Tensor | None
    table_k: torch.Tensor | None
    lengths_k: torch.Tensor | None
    captured: list[torch.Tensor] | None
    sink: torch.Tensor | None
    longest_q: int | None
    longest_k: int | None
    left: int | None
    right: int | None
    scale: float | None
    score: str | None
    needs_grad: bool
    return_lse: bool
    backend: str

    @property
    def packed(self) -> bool:
        return self.offsets_q is not None

    @property
    def paged(self) -> bool:
        return self.table_k is not None

    def places(self) -> tuple[Packed, Packed | Paged] | tuple[None, None]:
        """Where the sequences of queries and keys lie."""
        if not self.packed:
            return None, None
        queries = Packed(self.offsets_q, self.longest_q, self.used_q)
        if self.paged:
            return queries, Paged(self.table_k, self.lengths_k, self.longest_k)
        return queries, Packed(self.offsets_k, self.longest_k, self.used_k)

    @property
    def extras(self) -> tuple[torch.Tensor, ...]:
        """All tensors, in the order of ``AttentionProblem.tensors``."""
        one_by_one = *self[:6], *(self.captured or ()), self.sink
        return tuple(tensor for tensor in one_by_one if tensor is not None)

    def described(self) -> tuple[Score, tuple[torch.Tensor, ...]]:
        """The score's spec and its tensors."""
        return describe(None if self.score is None else parse(self.score), self.captured or (), self.sink)


def attention(q, k, v, extras, mask, scale, spec, packed, return_lse, backend) -> tuple[torch.Tensor, torch.Tensor]:
    """``flashcore.attention`` by operators: `extras` are the score's, `packed` is (queries, keys), empty if dense."""
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, *extras))
    if needs_grad and packed and isinstance(packed[1], Paged):
        refuse_gradients_of_pages()
    arguments = _arguments(extras, mask, scale, spec, packed, needs_grad, return_lse, backend)
    return torch.ops.flashcore.attention_forward(q, k, v, *arguments)


def attention_backward(
    dout, dlse, q, k, v, out, lse, extras, mask, scale, spec, packed, return_lse, backend
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) by the operator."""
    arguments = _arguments(extras, mask, scale, spec, packed, True, return_lse, backend)
    return torch.ops.flashcore.attention_backward(dout, dlse, q, k, v, out, lse, *arguments)


def _arguments(extras, mask, scale, spec, packed, needs_grad, return_lse, backend) -> tuple:
    """What comes after the tensors that every call has, in the schemas' order."""
    places = [None] * 6
    if packed:
        queries, keys = packed
        paged = isinstance(keys, Paged)
        of_keys = (None, None, keys.table, keys.lengths) if paged else (keys.offsets, keys.used, None, None)
        places = queries.offsets, queries.used, *of_keys
    captured, sink = (extras, None) if spec.sink is None else (extras[:-1], extras[-1])
    longest = [rows.longest for rows in packed] or [None] * 2
    text = None if spec.change is None else spec.change.text
    return (
        *places, list(captured) or None, sink, *longest, mask.left, mask.right, scale, text, needs_grad, return_lse,
        backend,
    )  # fmt: skip


@torch.library.impl(_FORWARD, "default")
def _forward(q, k, v, *arguments):
    given = _Arguments(*arguments)
    plan, extras = _plan(q, k, v, given), given.extras
    out, lse = calls.on_its_device(q, plan.run)(q, k, v, given.scale, *extras)
    if not plan.problem.needs_lse:
        lse = q.new_empty(0, dtype=torch.float32)
    elif lse is None:  # nobody reads it: autograd differentiates this backend without
        lse = q.new_zeros(plan.problem.lse_shape, dtype=torch.float32)
    return out, lse


@torch.library.register_fake(_FORWARD)
def _(q, k, v, *arguments):
    given = _Arguments(*arguments)
    check_tensors(q, k, v, packed=given.packed, paged=given.paged)
    seqlen_k, sequences = (given.longest_k, given.offsets_q.shape[0] - 1) if given.packed else (k.shape[1], None)
    check_score(*given.described(), q, seqlen_k, sequences)
    *batch, rows, heads_q, _ = q.shape
    lse_shape = (*batch, heads_q, rows) if given.needs_grad or given.return_lse else (0,)
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(lse_shape, dtype=torch.float32)


@torch.library.impl(_BACKWARD, "default")
def _backward(dout, dlse, q, k, v, out, lse, *arguments):
    given = _Arguments(*arguments)
    plan = _plan(q, k, v, given)
    backward = planning.recorded_backward(plan) if dlse is None else plan.backward_with_dlse
    grads = calls.on_its_device(q, backward.run)(q, k, v, out, lse, dout, dlse, given.scale, *given.extras)
    return tuple(grad.contiguous() for grad in grads)


@torch.library.register_fake(_BACKWARD)
def _(dout, dlse, q, k, v, *_):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, *places, captured, sink = inputs[:11]
    ctx.options = inputs[11:]
    ctx.save_for_backward(q, k, v, *output, sink, *places, *captured or ())
    ctx.set_materialize_grads(False)  # whether the loss depends on the LSE makes a difference


def _differentiate(ctx, dout, dlse):
    if torch.is_grad_enabled():
        api.refuse_second_derivative()
    q, k, v, out, lse, sink, *others = ctx.saved_tensors
    places, captured = others[:6], others[6:]
    given = _Arguments(*places, captured or None, sink, *ctx.options)
    arguments = given._replace(needs_grad=True)
    if not given.needs_grad:  # it was recorded where nobody needed a gradient, nor the LSE
        out, lse = torch.ops.flashcore.attention_forward(q, k, v, *arguments)
    dout, dlse = gradients.of_results(out, lse, dout, dlse)
    dq, dk, dv = torch.ops.flashcore.attention_backward(dout, dlse, q, k, v, out, lse, *arguments)
    dsink = gradients.of_sinks(sink, out, lse, dout, dlse) if ctx.needs_input_grad[10] else None
    return dq, dk, dv, *[None] * 6, [None] * len(captured) or None, dsink, *(None for _ in ctx.options)


@register_flop_formula(torch.ops.flashcore.attention_forward)
def _count_forward(q, k, v, *arguments, out_shape=None) -> int:
    """Of whole products, as PyTorch counts its own attention: no mask saves any, and scores and sinks are free."""
    return 2 * _count_scores(q, k, arguments) * (q[-1] + v[-1])


@register_flop_formula(torch.ops.flashcore.attention_backward)
def _count_backward(dout, dlse, q, k, v, out, lse, *arguments, out_shape=None) -> int:
    """Five products: the scores again, and the gradients of the probabilities, q, k and v."""
    return 2 * _count_scores(q, k, arguments) * (3 * q[-1] + 2 * v[-1])


def _count_scores(q, k, arguments) -> int:
    """Of packed sequences, whose lengths the device would have to be asked for, no less than there are."""
    given = _Arguments(*arguments)
    rows_q, rows_k = q[-3], k[-3]
    if given.paged:  # a page may be of many sequences
        return q[-2] * rows_q * min(given.longest_k, given.table_k[-1] * rows_k)
    if given.packed:
        return q[-2] * min(rows_q * rows_k, rows_q * given.longest_k, rows_k * given.longest_q)
    return q[0] * q[-2] * rows_q * rows_k


torch.library.register_autograd(_FORWARD, _differentiate, setup_context=_setup_context)
torch.library.register_autograd(_BACKWARD, api.refuse_second_derivative)


def _plan(q, k, v, given: _Arguments) -> Plan:
    """The plan for these arguments, as an eager call would find it."""
    scale, extras = given.scale, given.extras
    key = (
        q.shape, k.shape, v.shape, q.dtype, q.device, tuple((t.shape, t.dtype, t.device) for t in extras),
        given.used_q is None, given.used_k is None, given.paged, given.sink is None, given.longest_q, given.longest_k,
        given.left, given.right, scale is None or LEAST_SCALE <= scale <= sys.float_info.max or scale, given.score,
        given.needs_grad, given.return_lse, given.backend, planning.active_override.get(),
    )  # fmt: skip
    found = _runs.recent.get(key) or _runs.recall(key)
    if found is None:
        queries, keys = given.places()
        problem = AttentionProblem.from_tensors(
            q, k, v, window=(given.left, given.right), scale=scale, score=given.described()[0], extras=extras,
            queries=queries, keys=keys, return_lse=given.return_lse,
        )  # fmt: skip
        found = _runs.remember(
            key, planning.prepared_plan(replace(problem, needs_grad=given.needs_grad), given.backend)
        )
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
