"""Dense matrix products with fused epilogues: the public functions, their plan and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from flashcore import plan as planning
from flashcore.backends import MATMUL, torch_matmul
from flashcore.calls import Runs, autocast, on_its_device, operators
from flashcore.errors import InvalidInputError
from flashcore.gemm_problem import GemmProblem, check_arguments
from flashcore.plan import Plan
from flashcore.watching import answers_itself, is_batched, is_recorded, is_transformed, is_watched

Run = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]

_runs = Runs()  # a kind has everything that a plan depends on: strides are part of it
_recent = _runs.recent.get

_active_override = planning.active_override.get
_is_grad_enabled = torch.is_grad_enabled
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled


def matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """``activation(a @ b + bias)``, accumulated in float32.

    Under ``torch.autocast`` a, b and bias are first cast to its dtype, as PyTorch's own matmul casts them.

    Differentiable in a, b and bias, as often as one likes; an activation's backward pass computes the sums again.
    ``torch.compile`` and ``torch.export`` carry it in their graph as the operator ``flashcore::matmul``
    (``flashcore/ops.py``).

    :param a: (m, k) or (batch, m, k); bfloat16 or float16 for the Hopper kernel, float32 or float64 elsewhere. Any
        strides: a transposed or sliced matrix is read where it is, if its rows or columns are dense and aligned to
        16 bytes.
    :param b: (k, n) or (batch, k, n), likewise. A matrix without a batch serves all batches of the other operand.
    :param out_dtype: ``None`` for the operands' dtype, or ``torch.float32`` for half-precision operands.
    :param bias: (n), the operands' dtype, added to every row.
    :param activation: None, ``"gelu"`` (its tanh form), ``"silu"``, or ``"swiglu"``: then b has 2 n columns, the
        gate's and after them their factors', and the result is ``silu(gate) * factor``. In half precision the sum is
        rounded before it is activated, as separate operations would.
    :returns: (m, n), or (batch, m, n) if an operand has a batch; contiguous.
    :raises InvalidInputError: arguments that contradict each other or have no meaning.
    """
    if _is_any_autocast_enabled():
        a, b, bias = autocast(a, b, bias)
    if is_watched():
        if is_transformed(a, b, bias):
            problem = GemmProblem.from_tensors(a, b, out_dtype=out_dtype, bias=bias, activation=activation)
            return torch_matmul.multiply(problem, a, b, bias, seen_through=True)
        if is_recorded():
            return _by_operator(out_dtype, activation, a, b, bias)
    if _needs_grad(a, b, bias):
        return _Matmul.apply(a, b, bias, out_dtype, activation)
    return _matmul(a, b, bias, out_dtype, activation)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``: ``torch.nn.functional.linear`` on the same kernels, differentiable likewise.

    :param x: (..., k).
    :param weight: (n, k), x's dtype.
    :param bias: (n) or None.
    :returns: (..., n).
    :raises InvalidInputError: as :func:`matmul`, where a is x and b is the transposed weight.
    """
    for name, tensor in (("x", x), ("weight", weight)):
        if not isinstance(tensor, torch.Tensor):
            raise InvalidInputError(f"linear: {name} must be a torch.Tensor (given {type(tensor).__name__}).")
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise InvalidInputError(
            f"linear: x (..., k) and weight (n, k) must share k (given x {tuple(x.shape)}, "
            f"weight {tuple(weight.shape)})."
        )
    rows = x[None] if x.dim() == 1 else x.flatten(0, -2)
    out = matmul(rows, weight.t(), bias=bias)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], weight.shape[0])


def explain_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> Plan:
    """The plan that :func:`matmul` would follow for these arguments: print it. Launches nothing.

    Under ``torch.autocast`` it is that of the cast operands.
    """
    a, b, bias = autocast(a, b, bias)
    problem = GemmProblem.from_tensors(a, b, out_dtype=out_dtype, bias=bias, activation=activation)
    if _folds(a, b, problem):
        problem, a = _problem_of_rows(a, b, bias, out_dtype, activation), _rows(a)
    plan = planning.plan(problem)
    copied = getattr(MATMUL.load(plan.backend), "copied", None)
    if copied is None or any(map(answers_itself, (a, b))):  # these have no addresses
        return plan
    return replace(plan, copied=copied(problem, plan.config, a, b, bias))


# ---- running -------------------------------------------------------------------------------------------------------


def _needs_grad(*tensors: torch.Tensor | None) -> bool:
    return _is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)


def _matmul(a, b, bias, out_dtype, activation) -> torch.Tensor:
    try:
        key = (
            a.shape, a.stride(), a.dtype, a.device, b.shape, b.stride(), b.dtype, b.device,
            None if bias is None else (bias.shape, bias.dtype, bias.device, type(bias)), out_dtype, activation,
            type(a), type(b), _active_override(),
        )  # fmt: skip
        run = _recent(key)
    except (AttributeError, TypeError, RuntimeError):  # not tensors, sparse ones, unhashable values:
        key = run = None  # validation says which
    if run is None:
        run = _prepare(key, a, b, bias, out_dtype, activation)
    return run(a, b, bias)


def _prepare(key: tuple | None, a, b, bias, out_dtype, activation) -> Run:
    """How to run a kind of call that is no recent one: recalled, or validated, planned and remembered."""
    run = None if key is None else _runs.recall(key)
    if run is not None:
        return run
    if any(map(answers_itself, (a, b, bias))):
        check_arguments(a, b, out_dtype=out_dtype, bias=bias, activation=activation)
        return partial(_by_operator, out_dtype, activation)
    problem = GemmProblem.from_tensors(a, b, out_dtype=out_dtype, bias=bias, activation=activation)
    folds = _folds(a, b, problem)
    if folds:
        problem = _problem_of_rows(a, b, bias, out_dtype, activation)
    run = planning.plan(problem).run
    if folds:
        run = partial(_on_rows, run)
    run = on_its_device(a, run)
    return run if key is None else _runs.remember(key, run)


def _by_operator(out_dtype, activation, a, b, bias) -> torch.Tensor:
    return _operator(a, b, bias, out_dtype, activation)


def _operator(a, b, bias, out_dtype, activation) -> torch.Tensor:
    return operators().matmul(a, b, bias, out_dtype, activation)


def _folds(a: torch.Tensor, b: torch.Tensor, problem: GemmProblem) -> bool:
    """Whether the batches of a lie one below the other and share b: then they are one taller matrix."""
    return (
        a.dim() == 3 and b.dim() == 2 and not problem.is_empty
        and (a.shape[1] == 1 or a.shape[0] == 1 or a.stride(0) == a.shape[1] * a.stride(1))
    )  # fmt: skip


def _rows(a: torch.Tensor) -> torch.Tensor:
    return a.view(-1, a.shape[2])


def _problem_of_rows(a, b, bias, out_dtype, activation) -> GemmProblem:
    return GemmProblem.from_tensors(_rows(a), b, out_dtype=out_dtype, bias=bias, activation=activation)


def _on_rows(run: Run, a, b, bias) -> torch.Tensor:
    out = run(_rows(a), b, bias)
    return out.view(a.shape[0], a.shape[1], out.shape[1])


# ---- gradients -----------------------------------------------------------------------------------------------------


class _Matmul(torch.autograd.Function):
    """The gradients are products too: of the output's gradient with the transposed operands."""

    @staticmethod
    def forward(ctx, a, b, bias, out_dtype, activation):
        out = _matmul(a, b, bias, out_dtype, activation)
        ctx.save_for_backward(a, b, bias)
        ctx.out_dtype, ctx.activation = out_dtype, activation
        return out

    @staticmethod
    def backward(ctx, dout):
        needs = ctx.needs_input_grad[:3]
        multiply = _operator if is_batched(dout) else _on_record if _is_grad_enabled() or is_watched() else _matmul
        return *differentiate(multiply, *ctx.saved_tensors, ctx.out_dtype, ctx.activation, needs, dout), None, None


def _on_record(a, b, bias, out_dtype, activation) -> torch.Tensor:
    """:func:`_matmul` for those who record or transform a backward pass, autograd among them."""
    with torch.autocast(a.device.type, enabled=False):
        return matmul(a, b, out_dtype=out_dtype, bias=bias, activation=activation)


def differentiate(multiply, a, b, bias, out_dtype, activation, needs, dout) -> tuple[torch.Tensor | None, ...]:
    """(da, db, dbias), None where `needs` says no; `multiply` computes products as :func:`_matmul` does."""
    if activation is not None:
        dout = _activation_gradient(activation, multiply(a, b, bias, out_dtype, None), dout)
    needs_a, needs_b, needs_bias = needs
    da = db = dbias = None
    if needs_bias:
        wide = torch.promote_types(dout.dtype, torch.float32)
        dbias = dout.sum(dim=tuple(range(dout.dim() - 1)), dtype=wide).to(bias.dtype)
    dout = dout.to(a.dtype)
    if needs_a:
        da = multiply(dout, b.mT, None, None, None)
        if a.dim() < da.dim():
            da = da.sum(0)
    if needs_b and b.dim() < dout.dim():  # a batch of products with one b: their sum is one long reduction
        rows = a.expand(dout.shape[0], -1, -1).flatten(0, 1)
        db = multiply(rows.mT, dout.flatten(0, 1), None, None, None)
    elif needs_b:
        db = multiply(a.mT, dout, None, None, None)
    return da, db, dbias


def _activation_gradient(activation: str, sums: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
    if _is_grad_enabled():  # a derivative of this one is wanted, too
        return torch.autograd.grad(torch_matmul.activate(activation, sums), sums, dout, create_graph=True)[0]
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(dout, sums, approximate="tanh")
    if activation == "silu":
        return torch.ops.aten.silu_backward(dout, sums)
    gate, factor = sums.chunk(2, dim=-1)
    return torch.cat((torch.ops.aten.silu_backward(dout * factor, gate), dout * F.silu(gate)), dim=-1)
