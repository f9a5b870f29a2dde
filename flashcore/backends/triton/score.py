"""A problem's score, printed as functions that the Triton kernels call."""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl

from flashcore.backends.triton.tiles import INTERPRETED
from flashcore.problem import AttentionProblem
from flashcore.score import Expression, Score

ZERO = Expression("constant", (0,))

_ARGUMENTS = "s, scale, batch, head, query, key, offset, tensors, strides, sizes"


@triton.jit
def step(index, size, stride):
    """How far an index, clamped to its dimension, is from the first element."""
    return tl.minimum(tl.maximum(index, 0), size - 1).to(tl.int64) * stride


@triton.jit
def tanh(x):
    """In float32. Where exp overflows, 1 is right."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def tanh_approx(x):
    """By the hardware's instruction, as the kernels in CUDA C++: off by 2^-11 at most."""
    if INTERPRETED:
        y = tanh(x)
    else:
        y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return y


@dataclass(frozen=True)
class Functions:
    """What a kernel does to a scaled score: constexprs CHANGE and SLOPE."""

    change: Callable | None  # the changed score without its constant factor; None: there is no change
    slope: Callable | None  # its derivative; None: that is 1


def functions(problem: AttentionProblem) -> Functions:
    """The functions of a problem's score. All scores of one structure share theirs, and so their kernels."""
    return _functions(problem.score.structure, problem.dtype == "float32")


@lru_cache(maxsize=256)
def _functions(score: Score, precise: bool) -> Functions:
    if score.change is None:
        return Functions(None, None)
    slope = score.base.derivative
    is_one = slope.op == "constant" and slope.arguments[0] == 1
    return Functions(_made(score.base, precise), None if is_one else _made(slope, precise))


def _made(expression: Expression, precise: bool) -> Callable:
    """An expression as a function of _ARGUMENTS: a (queries, keys) tile or its transpose of unscaled scores, positions
    that broadcast with it, and tuples that say where captured tensors are."""
    text = source(expression)
    # Two functions with one name would be one function to Triton, where a kernel calls both.
    name = f"score_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    text = text.replace("def change(", f"def {name}(", 1)
    linecache.cache[f"<{name}>"] = len(text), None, text.splitlines(keepends=True), f"<{name}>"  # where Triton reads it
    scope = {"__name__": __name__, "tl": tl, "step": step, "tanh": tanh if precise else tanh_approx}
    exec(compile(text, f"<{name}>", "exec"), scope)
    jit = type(step)  # compiled or interpreted, as the kernels are
    return jit(scope[name])


def source(expression: Expression) -> str:
    """The text of the function ``change`` that computes an expression."""
    lines = [f"def change({_ARGUMENTS}):", "    score = s * scale"]
    lines += [f"    {name}_f = {name}.to(tl.float32)" for name in sorted(expression.names - {"score"})]
    text = expression.print("triton")
    for i, one in enumerate(expression.lookups):
        slot, *indices = one.arguments
        steps = [
            f" + step({index.print_index('triton')}, sizes[{slot}][{dim}], strides[{slot}][{dim}])"
            for dim, index in enumerate(indices)
            if index != ZERO
        ]
        lines.append(f"    element{i} = tl.load(tensors[{slot}]{''.join(steps)}).to(tl.float32)")
        text = text.replace(one.print("triton"), f"element{i}")
    if "score" not in expression.names:
        text = f"tl.zeros_like(score) + {text}"
    return "\n".join([*lines, f"    return {text}", ""])
