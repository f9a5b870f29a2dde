"""The public functions. A call is one dictionary lookup and the backend; all else happens once per kind of call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, overload

import torch
from torch.autograd.function import once_differentiable

from flashcore import backends, gradients
from flashcore import plan as planning
from flashcore.backends import Run
from flashcore.errors import UnsupportedError
from flashcore.plan import Plan
from flashcore.problem import DEVICES, AttentionProblem, check_tensors, checked_scale
from flashcore.score import bind
from flashcore.watching import answers_itself, is_recorded, is_transformed, is_watched

# How to run each kind of call seen so far. Strides are not part of the key: no check and no plan depends on them.
runs: dict[tuple, Any] = {}
_MAX_RUNS = 4096

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
    return_lse: Literal[False] = False,
    backend: str = "auto",
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
    return_lse: Literal[True],
    backend: str = "auto",
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
    return_lse: bool,
    backend: str = "auto",
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
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Scaled dot-product attention, ``softmax(scale * q k^T) v`` per head.

    Under ``torch.autocast`` q, k and v are first cast to its dtype, as PyTorch's SDPA does it.

    :param q: queries, (batch, seqlen_q, heads_q, head_dim); bfloat16, float16, float32 or float64, on CUDA or CPU. Any
        strides: views of packed or transposed tensors are read where they are.
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
        ``maximum``, ``where``, and elements of tensors such as ``slopes[head]``; :func:`softcap`, :func:`alibi` and
        :func:`bias` make some. It is called with symbols, once for each call.
    :param sink: (heads_q,), float32 or q's dtype: ``exp(sink)`` joins the softmax's denominator, as a key without a
        value would.
    :param return_lse: also return the natural logarithm of each query's softmax denominator. No gradient flows
        through it.
    :param backend: ``"auto"``, or the name of one in ``flashcore.backends.BACKENDS``. See :func:`explain`.
    :returns: out, contiguous (batch, seqlen_q, heads_q, head_dim_v) in q's dtype, and with `return_lse` also lse,
        float32 (batch, heads_q, seqlen_q). A query that sees no key gives zeros and -inf.

    :raises InvalidInputError: arguments that no backend could accept.
    :raises UnsupportedError: no backend, or not the requested one, can do it.
    """
    if _is_any_autocast_enabled():
        q, k, v = autocast(q, k, v)
    if is_watched() and window is score is sink is None:
        run = _by_operations if is_transformed(q, k, v) else _by_operator if is_recorded() else None
        if run is not None:
            out, lse = run(causal, scale, return_lse, backend, q, k, v)
            return (out, lse) if return_lse else out
    if window is not None or score is not None or sink is not None:
        out, lse = _with_features(q, k, v, causal, window, scale, score, sink, return_lse, backend)
        return (out, lse) if return_lse else out
    try:
        grad = _is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        key = (
            q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
            q.layout, k.layout, v.layout, type(q), type(k), type(v), causal, scale, grad, return_lse, backend,
            _active_override(),
        )  # fmt: skip
        run = runs.get(key)
    except (AttributeError, TypeError, RuntimeError):  # not tensors, nested ones, unhashable values:
        key = run = None  # validation says which
    if run is None:
        run = _prepare(key, q, k, v, causal, scale, return_lse, backend)
    out, lse = run(q, k, v)
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
    return_lse: bool = False,
    backend: str = "auto",
) -> Plan:
    """The plan that :func:`attention` would follow for these arguments: print it. Launches nothing.

    It names the backend and why (such as a backend that could, but defers to it), its tile config and why, the backward
    pass and why, and for each rejected backend the one feature that is missing. Raises what :func:`attention` would
    raise.
    """
    q, k, v = autocast(q, k, v)
    spec, extras = bind(score, sink)
    problem = AttentionProblem.from_tensors(
        q, k, v, causal=causal, window=window, scale=scale, score=spec, extras=extras, return_lse=return_lse
    )
    return planning.plan(problem, backend)


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors as autocast wants them: where it is enabled, all but float64 ones in its dtype."""
    return tuple(map(_autocast_one, tensors))


def _autocast_one(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor) or tensor.device.type not in DEVICES:
        return tensor  # validation has a word on it
    device = tensor.device.type
    if (
        not torch.is_autocast_enabled(device)
        or tensor.dtype is torch.float64
        or not tensor.is_floating_point()
    ):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _by_operator(causal, scale, return_lse, backend, q, k, v):
    """(out, lse) by the operator, for those who record operators or answer them."""
    from flashcore import ops

    if not torch.compiler.is_compiling():  # which checks the operator's arguments as it traces
        check_tensors(q, k, v)
        checked_scale(scale, q.shape[3])
    return ops.attention(q, k, v, causal, scale, return_lse, backend)


def _by_operations(causal, scale, return_lse, backend, q, k, v):
    """(out, lse) by a backend that is made of PyTorch's operations, which transforms see through."""
    plan = explain(q, k, v, causal=causal, scale=scale, return_lse=return_lse, backend=backend)
    module = backends.load(plan.backend)
    if not module.NATIVE_GRAD:
        raise UnsupportedError(
            f"attention: backend {plan.backend!r} cannot be transformed by torch.func (grad, vjp, vmap, ...) or "
            'forward-mode differentiation. Pass backend="sdpa".'
        )
    return _detach_lse(partial(module.forward, plan.problem, plan.config), q, k, v)


def _with_features(q, k, v, causal, window, scale, score, sink, return_lse, backend):
    """(out, lse) of a call with a window, a score function or sinks."""
    if is_watched() and (is_transformed(q, k, v, sink) or is_recorded()):
        raise UnsupportedError(
            "attention: window, score and sink are not there under torch.compile, torch.func and other recordings."
        )
    spec, extras = bind(score, sink)
    grad = _is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in (q, k, v, *extras))
    try:
        key = (
            "features", q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
            q.layout, k.layout, v.layout, type(q), type(k), type(v), causal, type(causal), window, scale, spec,
            tuple(t.device for t in extras), grad, return_lse, type(return_lse), backend, _active_override(),
        )  # fmt: skip
        run = runs.get(key)
    except (AttributeError, TypeError, RuntimeError):
        key = run = None
    if run is None:
        plan = explain(
            q, k, v, causal=causal, window=window, scale=scale, score=score, sink=sink, return_lse=return_lse,
            backend=backend,
        )  # fmt: skip
        run = on_its_device(q, _runner(plan))
        if key is not None:
            remember(key, run)
    return run(q, k, v, *extras)


def _prepare(key: tuple | None, q, k, v, causal, scale, return_lse, backend) -> Run:
    """Validate, plan, and remember how to run this kind of call."""
    if any(map(answers_itself, (q, k, v))):
        return partial(_by_operator, causal, scale, return_lse, backend)
    plan = explain(q, k, v, causal=causal, scale=scale, return_lse=return_lse, backend=backend)
    run = on_its_device(q, _runner(plan))
    return run if key is None else remember(key, run)


def remember(key: tuple, run: Any) -> Any:
    """Keep `run` in :data:`runs`, which stays bounded."""
    if len(runs) >= _MAX_RUNS:
        runs.clear()
    runs[key] = run
    return run


def _runner(plan: Plan) -> Run:
    """The shortest way from q, k, v to (out, lse)."""
    forward = backends.prepare(plan.backend, plan.problem, plan.config)
    if plan.backward == planning.NO_GRAD:
        return forward
    if plan.backward == planning.AUTOGRAD:
        return partial(_detach_lse, forward)
    return partial(_Attention.apply, plan, forward)


def _detach_lse(forward: Run, *tensors):
    out, lse = forward(*tensors)
    return out, lse if lse is None else lse.detach()


def on_its_device(q: torch.Tensor, run: Run) -> Run:
    """`run`, on q's GPU where there are several."""
    return partial(_on_device, run) if q.is_cuda and torch.cuda.device_count() > 1 else run


def _on_device(run: Run, q, *others):
    """Run with q's GPU as the current one, as kernels and their stream need it."""
    if torch.cuda.current_device() == q.device.index:
        return run(q, *others)
    with torch.cuda.device(q.device):
        return run(q, *others)


class _Attention(torch.autograd.Function):
    """Ties a forward that autograd cannot see through to the backward that the plan chose."""

    @staticmethod
    def forward(plan: Plan, forward: Run, *tensors):
        return forward(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.plan, _, q, k, v, *extras = inputs
        out, lse = output
        ctx.save_for_backward(q, k, v, out, lse, *extras)
        ctx.mark_non_differentiable(lse)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        q, k, v, out, lse, *extras = ctx.saved_tensors
        grads = differentiate(ctx.plan, q, k, v, out, lse, dout, *extras)
        of_extras = [None] * len(extras)
        if ctx.plan.problem.score.sink is not None and ctx.needs_input_grad[-1]:
            of_extras[-1] = gradients.of_sinks(extras[-1], out, lse, dout)
        return None, None, *grads, *of_extras


def differentiate(plan: Plan, q, k, v, out, lse, dout, *extras) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) by the backward pass that the plan chose."""
    tensors = q, k, v, out, lse, dout, None, *extras  # None: no gradient of the LSE yet
    if plan.backward == planning.TORCH_FLASH:
        return gradients.torch_flash(plan.problem, *tensors)
    if plan.backward == planning.SDPA_RECOMPUTE:
        return gradients.recompute("sdpa", plan.problem, *tensors)
    if plan.backward == planning.REFERENCE_RECOMPUTE:
        return gradients.recompute("reference", plan.problem, *tensors)
    if plan.backward == planning.AUTOGRAD:  # not from an eager call: autograd saw through that
        return gradients.recompute(plan.backend, plan.problem, *tensors)
    return backends.load(plan.backward).backward(plan.problem, plan.config, *tensors)
