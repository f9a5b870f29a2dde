"""Dense matrix products with fused epilogues: the public functions, their plan and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from flashcore.api import autocast
from flashcore.calls import Runs, on_its_device
from flashcore.errors import InvalidInputError
from flashcore.gemm_problem import GemmProblem, check_arguments
from flashcore.plan import warn_that_the_gpu_could_do_better
from flashcore.watching import answers_itself, is_batched, is_recorded, is_transformed, is_watched

Run = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]

_runs = Runs()  # a kind has everything that a plan depends on: strides are part of it
_recent = _runs.recent.get

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
            return _by_torch(problem, a, b, bias, seen_through=True)
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


@dataclass(frozen=True)
class GemmPlan:
    """What a call of :func:`matmul` with this problem does. ``print`` it, or read the fields."""

    problem: GemmProblem
    backend: str  # "hopper" or "torch"
    config: Any  # GemmConfig, or None where there is no choice
    schedule: Any  # GemmSchedule, or None
    why: str  # of the backend
    rejected: tuple[tuple[str, str], ...]
    copied: tuple[tuple[str, str], ...] = ()  # (operand that each call copies first, what makes it unreadable)

    def __str__(self) -> str:
        lines = [("problem", str(self.problem)), ("backend", f"{self.backend}: {self.why}")]
        if self.config is not None:
            lines += [("config", f"{self.config}: {self.config.why}"), ("schedule", str(self.schedule))]
        lines += [("copied", f"{name}: {reason}") for name, reason in self.copied]
        lines += [("rejected", f"{name}: {reason}") for name, reason in self.rejected]
        return "\n".join(f"{label:<9} {text}" for label, text in lines)


def explain_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> GemmPlan:
    """The plan that :func:`matmul` would follow for these arguments: print it. Launches nothing.

    Under ``torch.autocast`` it is that of the cast operands.
    """
    a, b, bias = autocast(a, b, bias)
    problem = GemmProblem.from_tensors(a, b, out_dtype=out_dtype, bias=bias, activation=activation)
    if _folds(a, b, problem):
        problem, a = _problem_of_rows(a, b, bias, out_dtype, activation), _rows(a)
    plan = plan_gemm(problem)
    if plan.backend != "hopper" or any(map(answers_itself, (a, b))):  # these have no addresses
        return plan
    from flashcore.backends.hopper import gemm

    return replace(plan, copied=gemm.copied(problem, a, b))


@lru_cache(maxsize=4096)
def plan_gemm(problem: GemmProblem, anywhere: bool = False) -> GemmPlan:
    """Who computes a problem, and how: here, or `anywhere` that has all libraries. Memoised."""
    from flashcore.backends import hopper
    from flashcore.backends.hopper import gemm

    reason = gemm.rejects(problem)
    if reason is None and not anywhere:
        reason = hopper.unavailable()
        if reason is not None:
            warn_that_the_gpu_could_do_better("matmul", "hopper", reason)
    if reason is not None:
        return GemmPlan(
            problem, "torch", None, None, "torch's matmul takes everything", (("hopper", reason),)
        )
    from flashcore.backends.hopper.gemm_configs import choose_gemm

    return GemmPlan(problem, "hopper", *choose_gemm(problem), "the first choice", ())


# ---- running -------------------------------------------------------------------------------------------------------


def _needs_grad(*tensors: torch.Tensor | None) -> bool:
    return _is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)


def _matmul(a, b, bias, out_dtype, activation) -> torch.Tensor:
    try:
        key = (
            a.shape, a.stride(), a.dtype, a.device, b.shape, b.stride(), b.dtype, b.device,
            None if bias is None else (bias.shape, bias.dtype, bias.device, type(bias)), out_dtype, activation,
            type(a), type(b),
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
    plan = plan_gemm(problem)
    if plan.backend == "torch":
        run = partial(_by_torch, problem)
    else:
        from flashcore.backends.hopper.gemm import GemmLauncher

        run = GemmLauncher(problem, plan.config, plan.schedule)
    if folds:
        run = partial(_on_rows, run)
    run = on_its_device(a, run)
    return run if key is None else _runs.remember(key, run)


def _by_operator(out_dtype, activation, a, b, bias) -> torch.Tensor:
    return _operator(a, b, bias, out_dtype, activation)


def _operator(a, b, bias, out_dtype, activation) -> torch.Tensor:
    from flashcore import ops

    return ops.matmul(a, b, bias, out_dtype, activation)


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


def _by_torch(problem: GemmProblem, a, b, bias, *, seen_through: bool = False) -> torch.Tensor:
    """By PyTorch's operations; where transforms see through them, by those that have derivatives."""
    with torch.autocast(problem.device, enabled=False):
        wide = {} if problem.out_dtype == problem.dtype else {"out_dtype": torch.float32}
        if wide and (seen_through or problem.device != "cuda" or "dtype" not in torch.ops.aten.addmm.overloads()):
            wide, a, b = {}, a.float(), b.float()
        if bias is not None and problem.out_dtype != problem.dtype:
            bias = bias.float()
        sums = _sums(a, b, bias, wide)
    return _activate(problem.activation, sums).contiguous()


def _sums(a, b, bias, wide: dict[str, torch.dtype]) -> torch.Tensor:
    """``a @ b + bias`` in one product of PyTorch's; `wide` holds its out_dtype if the operands' is another."""
    if a.dim() == 3 and b.dim() == 2:
        return _sums(a.flatten(0, 1), b, bias, wide).unflatten(0, a.shape[:2])
    if a.dim() == 2 and b.dim() == 3:
        a = a.expand(b.shape[0], -1, -1)
    if a.dim() == 2:
        return torch.mm(a, b, **wide) if bias is None else torch.addmm(bias, a, b, **wide)
    return torch.bmm(a, b, **wide) if bias is None else torch.baddbmm(bias, a, b, **wide)


def _activate(activation: str | None, sums: torch.Tensor) -> torch.Tensor:
    if activation == "gelu":
        return F.gelu(sums, approximate="tanh")
    if activation == "silu":
        return F.silu(sums)
    if activation == "swiglu":
        gate, factor = sums.chunk(2, dim=-1)
        return F.silu(gate) * factor
    return sums


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
        return torch.autograd.grad(_activate(activation, sums), sums, dout, create_graph=True)[0]
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(dout, sums, approximate="tanh")
    if activation == "silu":
        return torch.ops.aten.silu_backward(dout, sums)
    gate, factor = sums.chunk(2, dim=-1)
    return torch.cat((torch.ops.aten.silu_backward(dout * factor, gate), dout * F.silu(gate)), dim=-1)
