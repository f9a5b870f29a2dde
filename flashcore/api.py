"""The public functions. A call is one dictionary lookup and the backend; all else happens once per kind of call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal, NoReturn, overload

import torch

from flashcore import gradients
from flashcore import plan as planning
from flashcore.backends import ATTENTION, Run
from flashcore.calls import Runs, autocast, on_its_device, operators, unknown_keywords
from flashcore.errors import UnsupportedError
from flashcore.plan import Plan
from flashcore.problem import (
    LEAST_SCALE,
    AttentionProblem,
    check_out,
    check_out_of_kernels,
    check_packed,
    check_tensors,
    checked_mask,
    checked_scale,
)
from flashcore.score import PLAIN, Score, bind
from flashcore.sequences import Packed, Paged
from flashcore.watching import answers_itself, is_batched, is_recorded, is_transformed, is_watched

# Strides are not part of a kind: no check and no plan depends on them. Neither is the size of a scale.
runs = Runs()
_recent = runs.recent.get
_LARGEST_SCALE = sys.float_info.max

_is_grad_enabled = torch.is_grad_enabled
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_active_override = planning.active_override.get


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    score: Callable | None = None,
    sink: torch.Tensor | None = None,
    queries: Packed | None = None,
    keys: Packed | Paged | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
    out: torch.Tensor | None = None,
) -> torch.Tensor: ...
@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    score: Callable | None = None,
    sink: torch.Tensor | None = None,
    queries: Packed | None = None,
    keys: Packed | Paged | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    score: Callable | None = None,
    sink: torch.Tensor | None = None,
    queries: Packed | None = None,
    keys: Packed | Paged | None = None,
    return_lse: bool,
    backend: str = "auto",
    out: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    score: Callable | None = None,
    sink: torch.Tensor | None = None,
    queries: Packed | None = None,
    keys: Packed | Paged | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    out: torch.Tensor | None = None,
    **unknown: NoReturn,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Scaled dot-product attention, ``softmax(scale * q k^T) v`` per head.

    Under ``torch.autocast`` q, k and v are first cast to its dtype, as PyTorch's SDPA does it.

    :param q: queries, (batch, seqlen_q, heads_q, head_dim); bfloat16, float16, float32 or float64, on CUDA or CPU. Any
        strides: views of tensors that hold more, or have other orders, are read where they are.
    :param k: keys, (batch, seqlen_k, heads_k, head_dim). heads_q must be a multiple of heads_k; query head ``h`` reads
        key head ``h // (heads_q // heads_k)`` (grouped-query and multi-query attention).
    :param v: values, (batch, seqlen_k, heads_k, head_dim_v).
    :param causal: hide the future, aligned to the bottom right: query ``i`` sees key ``j`` iff
        ``j <= i + seqlen_k - seqlen_q``.
    :param window: (left, right): query ``i`` sees the keys ``i + seqlen_k - seqlen_q - left`` to
        ``i + seqlen_k - seqlen_q + right``, both included; None: no bound on that side. With `causal` the right bound
        is 0: a causal window of n keys is ``causal=True, window=(n - 1, 0)``. Keys that no query of a tile sees are
        not read.
    :param scale: multiplies the scores; ``head_dim ** -0.5`` when None.
    :param score: what becomes of each scaled score before the mask and the softmax: a function of (score, batch, head,
        query, key) written with Python's operators, ``torch.tanh``, ``exp``, ``log``, ``sqrt``, ``abs``, ``minimum``,
        ``maximum``, ``where``, and elements of tensors such as ``slopes[head]`` (:func:`lookup`); :func:`softcap`,
        :func:`alibi` and :func:`bias` make some. It is called with symbols, once for each call.
    :param sink: (heads_q,), float32 or q's dtype: ``exp(sink)`` joins the softmax's denominator, as a key without a
        value would.
    :param queries: a :class:`Packed`, which says where the sequences of a packed q lie, (total_q, heads_q, head_dim).
        Their masks are aligned each to its own bottom right; a score function's indices are those of the sequence, and
        inside of it.
    :param keys: the same of k and v, (total_k, heads_k, head_dim) and (total_k, heads_k, head_dim_v). Both are given,
        for as many sequences, or neither. Or a :class:`Paged`, of caches (pages, page_size, heads_k, head_dim) and
        (pages, page_size, heads_k, head_dim_v); these have no gradients.
    :param return_lse: also return the natural logarithm of each query's softmax denominator. It is differentiable:
        parts of attention over parts of the keys can be merged by it.
    :param backend: ``"auto"``, or the name of one in ``flashcore.backends.ATTENTION.providers``. See :func:`explain`.
    :param out: where the output is written: contiguous, of its shape and dtype, beside q, and aligned to 16 bytes on a
        GPU. It shares no memory with another argument. Not where gradients are needed.
    :returns: out, contiguous (batch, seqlen_q, heads_q, head_dim_v) in q's dtype, and with `return_lse` also lse,
        float32 (batch, heads_q, seqlen_q). A query that sees no key gives zeros and -inf. Of packed sequences they are
        (total_q, heads_q, head_dim_v) and (heads_q, total_q); rows that belong to no sequence are zeros and -inf.

    :raises InvalidInputError: arguments that no backend could accept.
    :raises UnsupportedError: no backend, or not the requested one, can do it; or a second derivative is asked for,
        which only ``backend="reference"`` has; or `out` is given where gradients are needed.
    """
    if unknown:
        raise TypeError(unknown_keywords(attention, unknown))
    if _is_any_autocast_enabled():
        q, k, v = autocast(q, k, v)
    if (
        window is not None or score is not None or sink is not None or queries is not None or keys is not None
        or out is not None or is_watched()
    ):  # fmt: skip
        out, lse = _with_features(q, k, v, causal, window, scale, score, sink, queries, keys, return_lse, backend, out)
        return (out, lse) if return_lse else out
    try:
        grad = _is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        key = (
            q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
            q.layout, k.layout, v.layout, type(q), type(k), type(v), causal, type(causal),
            scale is None or (type(scale) is float and LEAST_SCALE <= scale <= _LARGEST_SCALE) or (type(scale), scale),
            grad, return_lse, type(return_lse), backend, _active_override(),
        )  # fmt: skip
        run = _recent(key)
    except (AttributeError, TypeError, RuntimeError):  # not tensors, nested ones, unhashable values:
        key = run = None  # validation says which
    if run is None:
        run = _prepare(key, q, k, v, (), scale, causal, None, PLAIN, (), return_lse, backend)
    out, lse = run(q, k, v, scale)
    return (out, lse) if return_lse else out


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    score: Callable | None = None,
    sink: torch.Tensor | None = None,
    queries: Packed | None = None,
    keys: Packed | Paged | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    **unknown: NoReturn,
) -> Plan:
    """The plan that :func:`attention` would follow for these arguments: print it. Launches nothing.

    It names the backend and why (such as a backend that could, but defers to it), its tile config and why, the backward
    pass and why, and for each rejected backend the one feature that is missing. Raises what :func:`attention` would
    raise.
    """
    if unknown:
        raise TypeError(unknown_keywords(explain, unknown))
    q, k, v = autocast(q, k, v)
    spec, extras, packed = _specs(score, sink, queries, keys)
    problem = _problem(q, k, v, extras, causal, window, scale, spec, packed, return_lse)
    plan = planning.plan(problem, backend)
    copied = getattr(ATTENTION.load(plan.backend), "copied", None)
    if copied is None or any(map(answers_itself, (q, k, v))):  # these have no addresses
        return plan
    return replace(plan, copied=copied(problem, plan.config, q, k, v, *extras))


def _specs(score, sink, queries, keys) -> tuple[Score, tuple[torch.Tensor, ...], tuple]:
    """The score's spec, all tensors after q, k and v, and where packed sequences lie: (queries, keys), or ()."""
    spec, extras = bind(score, sink)
    if queries is None and keys is None:
        return spec, extras, ()
    places = (t for rows in (queries, keys) for t in getattr(rows, "tensors", ()))  # validation says what is none
    return spec, (*places, *extras), (queries, keys)


def _problem(q, k, v, extras, causal, window, scale, spec, packed, return_lse) -> AttentionProblem:
    queries, keys = packed or (None, None)
    return AttentionProblem.from_tensors(
        q, k, v, causal=causal, window=window, scale=scale, score=spec, extras=extras, queries=queries, keys=keys,
        return_lse=return_lse,
    )  # fmt: skip


def _with_features(q, k, v, causal, window, scale, score, sink, queries, keys, return_lse, backend, into):
    """(out, lse) of a call with a window, a score function, sinks, packed sequences or a place for the output, or that
    somebody watches."""
    spec, extras, packed = _specs(score, sink, queries, keys)
    options = causal, window, spec, packed, return_lse, backend
    if is_watched():
        if is_transformed(q, k, v, *extras):
            return _moved(_by_operations(options, q, k, v, scale, *extras), into, q, k, v, *extras)
        if is_recorded():
            return _moved(_by_operator(options, q, k, v, scale, *extras), into, q, k, v, *extras)
    grad = _is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in (q, k, v, *extras))
    try:
        key = (
            "features", q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
            q.layout, k.layout, v.layout, type(q), type(k), type(v), causal, type(causal), window,
            scale is None or (type(scale) is float and LEAST_SCALE <= scale <= _LARGEST_SCALE) or (type(scale), scale),
            spec, tuple(rows.kind for rows in packed), tuple((t.device, type(t)) for t in extras), grad, return_lse,
            type(return_lse), backend, _active_override(),
        )  # fmt: skip
        run = _recent(key)
    except (AttributeError, TypeError, RuntimeError):
        key = run = None
    if run is None:
        run = _prepare(key, q, k, v, extras, scale, *options)
    if into is None:
        return run(q, k, v, scale, *extras)
    if any(map(answers_itself, (q, k, v, into, *extras))):
        return _moved(run(q, k, v, scale, *extras), into, q, k, v, *extras)
    check_out(into, q, k, v, *extras)
    check_out_of_kernels(into)
    _, lse = run(q, k, v, scale, *extras, out=into)
    return into, lse


def _moved(results, into, q, k, v, *extras):
    """(out, lse) where they are made without a place for the output."""
    if into is None:
        return results
    check_out(into, q, k, v, *extras)
    return into.copy_(results[0]), results[1]


def _by_operator(options, q, k, v, scale, *extras):
    """(out, lse) by the operator, for those who record operators or answer them."""
    causal, window, spec, packed, return_lse, backend = options
    if not torch.compiler.is_compiling():  # which checks the operator's arguments as it traces
        check_tensors(q, k, v, packed=bool(packed), paged=bool(packed) and isinstance(packed[1], Paged))
        checked_scale(scale, q.shape[-1])
    if packed:
        check_packed(*packed, q)
    mask, of_score = checked_mask(causal, window), extras[len(extras) - len(spec.tensors) :]
    return operators().attention(q, k, v, of_score, mask, scale, spec, packed, return_lse, backend)


def _by_operations(options, q, k, v, scale, *extras):
    """(out, lse) by a backend that is made of PyTorch's operations, which transforms see through."""
    causal, window, spec, packed, return_lse, backend = options
    plan = planning.prepared_plan(_problem(q, k, v, extras, causal, window, scale, spec, packed, return_lse), backend)
    if not ATTENTION.load(plan.backend).NATIVE_GRAD:
        raise UnsupportedError(
            f"attention: backend {plan.backend!r} cannot be transformed by torch.func (grad, vjp, vmap, ...) or "
            f'forward-mode differentiation. Pass backend="{"sdpa" if spec == PLAIN and not packed else "reference"}".'
        )
    return plan.run(q, k, v, scale, *extras)


def _prepare(key: tuple | None, q, k, v, extras, scale, causal, window, spec, packed, return_lse, backend) -> Run:
    """How to run a kind of call that is no recent one: recalled, or validated, planned and remembered."""
    run = None if key is None else runs.recall(key)
    if run is not None:
        return run
    if any(map(answers_itself, (q, k, v, *extras))):
        return partial(_by_operator, (causal, window, spec, packed, return_lse, backend))
    problem = _problem(q, k, v, extras, causal, window, scale, spec, packed, return_lse)
    run = on_its_device(q, _runner(planning.prepared_plan(problem, backend)))
    return run if key is None else runs.remember(key, run)


def _runner(plan: Plan) -> Run:
    """The shortest way from q, k, v, the scale and extras to (out, lse)."""
    if plan.backward is None:
        return plan.run
    if plan.backward.backend != planning.AUTOGRAD:
        return partial(_Attention.apply, plan)
    if plan.problem.return_lse and "dlse" not in ATTENTION.load(plan.backend).FEATURES:
        return partial(_differentiable_lse, plan)
    return plan.run


def _differentiable_lse(plan: Plan, q, k, v, scale, *extras):
    """(out, lse) by what autograd sees through, but for the LSE."""
    out, lse = plan.run(q, k, v, scale, *extras)
    return out, _Lse.apply(plan, q, k, v, scale, out.detach(), lse.detach(), *extras)


class _Attention(torch.autograd.Function):
    """Ties a forward that autograd cannot see through to the backward that the plan chose."""

    @staticmethod
    def forward(plan: Plan, *arguments):
        return plan.run(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.plan, q, k, v, ctx.scale, *extras = inputs
        out, lse = output
        ctx.save_for_backward(q, k, v, out, lse, *extras)
        ctx.set_materialize_grads(False)  # whether the loss depends on the LSE makes a difference

    @staticmethod
    def backward(ctx, dout, dlse):
        (dq, dk, dv), of_extras = _differentiate(ctx, dout, dlse)
        return None, dq, dk, dv, None, *of_extras


class _Lse(torch.autograd.Function):
    """Ties the LSE to its gradient alone, where autograd sees through the rest."""

    @staticmethod
    def forward(plan: Plan, q, k, v, scale, out, lse, *extras):
        return lse.view_as(lse)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.plan, q, k, v, ctx.scale, out, lse, *extras = inputs
        ctx.save_for_backward(q, k, v, out, lse, *extras)

    @staticmethod
    def backward(ctx, dlse):
        (dq, dk, dv), of_extras = _differentiate(ctx, None, dlse)
        return None, dq, dk, dv, None, None, None, *of_extras


def _differentiate(ctx, dout, dlse):
    """((dq, dk, dv), gradients of the extras) for what either function saved."""
    if _is_grad_enabled():
        refuse_second_derivative()
    q, k, v, out, lse, *extras = ctx.saved_tensors
    dout, dlse = gradients.of_results(out, lse, dout, dlse)
    of_extras = [None] * len(extras)
    if ctx.plan.problem.score.sink is not None and ctx.needs_input_grad[-1]:
        of_extras[-1] = gradients.of_sinks(extras[-1], out, lse, dout, dlse)
    return _gradients(ctx.plan, ctx.scale, q, k, v, out, lse, dout, dlse, *extras), of_extras


def refuse_second_derivative(*_):
    raise UnsupportedError(
        "attention: this backward pass has no derivative of its own: create_graph=True and second derivatives are not "
        'there. An eager call with backend="reference" has them.'
    )


def _gradients(plan: Plan, scale: float | None, q, k, v, out, lse, dout, dlse, *extras) -> tuple[torch.Tensor, ...]:
    """(dq, dk, dv) of an eager call, whoever looks at its backward pass alone."""
    tensors = q, k, v, out, lse, dout, dlse, *extras
    if is_watched() and is_transformed(*tensors):
        return _TransformedGradients.apply(plan, scale, *tensors)
    if is_recorded() or is_batched(dout) or is_batched(dlse) or any(map(answers_itself, tensors)):
        return _gradients_by_operator(plan, scale, *tensors)
    backward = plan.backward if dlse is None else plan.backward_with_dlse
    return backward.run(q, k, v, out, lse, dout, dlse, scale, *extras)


def _gradients_by_operator(plan: Plan, scale: float | None, q, k, v, out, lse, dout, dlse, *extras):
    problem, backend = plan.problem, plan.backend if plan.backend in ATTENTION.providers else "auto"
    *packed, extras = problem.split(extras) if problem.packed else (extras,)
    options = problem.mask, scale, problem.score, packed, problem.return_lse, backend
    return operators().attention_backward(dout, dlse, q, k, v, out, lse, extras, *options)


class _TransformedGradients(torch.autograd.Function):
    """The backward pass under transforms: a batch of output gradients is taken one by one, all else is refused."""

    @staticmethod
    def forward(plan: Plan, scale: float | None, *tensors):
        return _gradients(plan, scale, *tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, plan: Plan, scale: float | None, *tensors):
        def apply(i: int):
            one = (t if dim is None else t.select(dim, i) for t, dim in zip(tensors, in_dims[2:], strict=True))
            return _TransformedGradients.apply(plan, scale, *one)

        grads = zip(*map(apply, range(info.batch_size)), strict=True)
        return tuple(map(torch.stack, grads)), (0, 0, 0)

    backward = jvp = staticmethod(refuse_second_derivative)
