"""What a score becomes before the softmax: one expression, printed in every language that computes it.

A score function, ``lambda score, batch, head, query, key: ...``, is called with symbols. What it returns is an
:class:`Expression`, which is printed as CUDA C++ and as Triton, evaluated with torch by the reference, differentiated
by the score for the backward pass, and written down as text in recorded graphs. The tensors that it looks up stay apart
from it: an expression is structure only, so plans and kernels are found by it.
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from flashcore.errors import InvalidInputError

# What a score function gets, in this order; and what it may import from here.
ARGUMENTS = ("score", "batch", "head", "query", "key")
OFFSET_NAME = "offset"

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling

LOOKUP_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Form:
    """An operation: how it is printed, what torch computes, its derivatives by its arguments, whether it is a truth."""

    cuda: str
    triton: str
    torch: Callable
    derivatives: Callable | None = None  # of the arguments; None: it is constant almost everywhere
    truth: bool = False


def _where(condition, a, b):
    return torch.where(torch.as_tensor(condition), torch.as_tensor(a), torch.as_tensor(b))


def _of_tensor(function: Callable) -> Callable:
    return lambda *values: function(*map(torch.as_tensor, values))


_FORMS: dict[str, _Form] = {
    "+": _Form("({0} + {1})", "({0} + {1})", lambda a, b: a + b, lambda a, b: (1, 1)),
    "-": _Form("({0} - {1})", "({0} - {1})", lambda a, b: a - b, lambda a, b: (1, -1)),
    "*": _Form("({0} * {1})", "({0} * {1})", lambda a, b: a * b, lambda a, b: (b, a)),
    "/": _Form("({0} / {1})", "({0} / {1})", lambda a, b: a / b, lambda a, b: (1 / b, -1 * a / (b * b))),
    "<": _Form("({0} < {1})", "({0} < {1})", lambda a, b: a < b, truth=True),
    "<=": _Form("({0} <= {1})", "({0} <= {1})", lambda a, b: a <= b, truth=True),
    "&": _Form("({0} && {1})", "({0} & {1})", lambda a, b: a & b, truth=True),
    "|": _Form("({0} || {1})", "({0} | {1})", lambda a, b: a | b, truth=True),
    "abs": _Form("fabsf({0})", "tl.abs({0})", lambda a: abs(a), lambda a: (where(a < 0, -1, 1),)),
    "minimum": _Form("fminf({0}, {1})", "tl.minimum({0}, {1})", _of_tensor(torch.minimum),
                     lambda a, b: (where(a <= b, 1, 0), where(a <= b, 0, 1))),
    "maximum": _Form("fmaxf({0}, {1})", "tl.maximum({0}, {1})", _of_tensor(torch.maximum),
                     lambda a, b: (where(a <= b, 0, 1), where(a <= b, 1, 0))),
    "tanh": _Form("tanh_approx({0})", "tanh({0})", _of_tensor(torch.tanh), lambda a: (1 - tanh(a) * tanh(a),)),
    "exp": _Form("__expf({0})", "tl.exp({0})", _of_tensor(torch.exp), lambda a: (exp(a),)),
    "log": _Form("__logf({0})", "tl.log({0})", _of_tensor(torch.log), lambda a: (1 / a,)),
    "sqrt": _Form("sqrtf({0})", "tl.sqrt({0})", _of_tensor(torch.sqrt), lambda a: (0.5 / sqrt(a),)),
    "where": _Form("({0} ? {1} : {2})", "tl.where({0}, {1}, {2})", _where),
}  # fmt: skip
_INFIX = ("+", "-", "*", "/", "<", "<=", "&", "|")


class Expression:
    """A value inside a score function. Python's arithmetic and torch's functions of the same names make new ones.

    Dynamo traces score functions, too. No dataclass: it would take one that is frozen for a constant of the graph.
    """

    def __init__(self, op: str, arguments: tuple[Any, ...], found: list[torch.Tensor] | None = None):
        self.op = op  # of _FORMS, or "constant", "name", "lookup"
        self.arguments = arguments  # Expressions; of a constant its number, of a name itself, of a lookup slot, indices
        self.text = self._text()  # decides equality
        # The tensors that its score function has looked up so far, while that is traced.
        self.found = _found(arguments) if found is None else found

    def __eq__(self, other) -> bool:
        return isinstance(other, Expression) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __str__(self) -> str:
        return self.text

    def _text(self) -> str:
        if self.op in ("constant", "name"):
            return repr(self.arguments[0]) if self.op == "constant" else self.arguments[0]
        texts = [a.text if isinstance(a, Expression) else repr(a) for a in self.arguments]
        if self.op in _INFIX:  # sums of texts: what Dynamo formats it cannot compare
            return "(" + texts[0] + " " + self.op + " " + texts[1] + ")"
        return self.op + "(" + ", ".join(texts) + ")"

    # ---- building ----
    def __add__(self, other): return _join("+", self, other)
    def __radd__(self, other): return _join("+", other, self)
    def __sub__(self, other): return _join("-", self, other)
    def __rsub__(self, other): return _join("-", other, self)
    def __mul__(self, other): return _join("*", self, other)
    def __rmul__(self, other): return _join("*", other, self)
    def __truediv__(self, other): return _join("/", self, other)
    def __rtruediv__(self, other): return _join("/", other, self)
    def __neg__(self): return _join("*", -1, self)
    def __abs__(self): return _join("abs", self)
    def __lt__(self, other): return _join("<", self, other)
    def __gt__(self, other): return _join("<", other, self)
    def __le__(self, other): return _join("<=", self, other)
    def __ge__(self, other): return _join("<=", other, self)
    def __and__(self, other): return _join("&", self, other)
    def __or__(self, other): return _join("|", self, other)

    def __bool__(self):
        raise InvalidInputError(
            f"score: Python cannot branch on {self}, which has a value for every query and key. Use torch.where."
        )

    def __getattr__(self, name: str):
        if name.startswith("__") and name not in ("__floordiv__", "__mod__", "__pow__", "__float__", "__int__"):
            raise AttributeError(name)
        raise _no_operation(name)

    def _refuse(name):
        def refuse(self, *_):
            raise _no_operation(name)
        return refuse

    __floordiv__ = __rfloordiv__ = _refuse("//")
    __mod__ = __rmod__ = _refuse("%")
    __pow__ = __rpow__ = _refuse("**")
    __float__ = __int__ = __index__ = _refuse("conversion to a number")
    del _refuse

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        name = getattr(function, "__name__", str(function))
        name = {"clamp_min": "maximum", "clamp_max": "minimum", "add": "+", "sub": "-", "mul": "*", "div": "/",
                "__radd__": "+", "__rmul__": "*"}.get(name, name)  # fmt: skip
        if name == "__getitem__":
            tensor, index = arguments
            return lookup(tensor, *(index if isinstance(index, tuple) else (index,)))
        if name not in _FORMS or options:
            raise _no_operation(f"torch.{name}")
        return _join(name, *arguments)

    # ---- using ----
    @property
    def truth(self) -> bool:
        return self.op in _FORMS and _FORMS[self.op].truth

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The arguments that the value depends on, and "offset"."""
        if self.op == "name":
            return frozenset(self.arguments)
        inner = (a.names for a in self.arguments if isinstance(a, Expression))
        return frozenset().union(*inner)

    @functools.cached_property
    def lookups(self) -> tuple[Expression, ...]:
        """Its look-ups, each once, inner ones first."""
        found = [x for a in self.arguments if isinstance(a, Expression) for x in a.lookups]
        return tuple(dict.fromkeys([*found, *([self] if self.op == "lookup" else [])]))

    def print(self, language: str) -> str:
        """Its source in "cuda" or "triton". Positions are floats, such as ``key_f``, but in indices."""
        if self.op == "constant":
            value = float(self.arguments[0])
            if math.isinf(value):
                infinity = "(-negative_infinity())" if value > 0 else "negative_infinity()"
                return infinity if language == "cuda" else f'float("{value}")'
            return f"{value!r}f" if language == "cuda" else repr(value)
        if self.op == "name":
            return self.arguments[0] if self.arguments[0] == "score" else f"{self.arguments[0]}_f"
        if self.op == "lookup":
            slot, *indices = self.arguments
            return f"captured{slot}({', '.join(i.print_index(language) for i in indices)})"
        if self.op == "*" and SCORE in self.arguments:
            constant = next((a for a in self.arguments if a.op == "constant"), None)
            if constant is not None:  # the product of two constants of the launch is computed once
                return f"(s * (scale * {constant.print(language)}))"
        return getattr(_FORMS[self.op], language).format(*(a.print(language) for a in self.arguments))

    def print_index(self, language: str) -> str:
        """Its source as an integer."""
        if self.op == "constant":
            return repr(self.arguments[0])
        if self.op == "name":
            return self.arguments[0]
        form = getattr(_FORMS[self.op], language)
        form = form.replace("fminf", "min").replace("fmaxf", "max").replace("fabsf", "abs")
        return form.format(*(a.print_index(language) for a in self.arguments))

    def value(self, names: dict[str, Any], captured: tuple[torch.Tensor, ...]) -> Any:
        """With torch: `names` has broadcasting tensors, or numbers, for the arguments and "offset"."""
        if self.op == "constant":
            return self.arguments[0]
        if self.op == "name":
            return names[self.arguments[0]]
        if self.op == "lookup":
            slot, *indices = self.arguments
            tensor = captured[slot]
            at = (torch.as_tensor(i.value(names, captured), device=tensor.device) for i in indices)
            return tensor[tuple(i.clamp(0, size - 1) for i, size in zip(at, tensor.shape, strict=True))]
        values = [a.value(names, captured) for a in self.arguments]
        device = next((x.device for x in values if isinstance(x, torch.Tensor)), None)
        if self.op not in _INFIX and device is not None:
            values = [torch.as_tensor(x, device=device) for x in values]
            if self.op in ("minimum", "maximum"):
                wide = functools.reduce(torch.promote_types, (x.dtype for x in values))
                values = [x.to(wide) for x in values]
        return _FORMS[self.op].torch(*values)

    @functools.cached_property
    def derivative(self) -> Expression:
        """By the score: what a backward pass multiplies with."""
        if self.op == "name":
            return _wrap(1 if self == SCORE else 0)
        if self.op not in _FORMS or "score" not in self.names:
            return _wrap(0)
        if self.op == "where":
            condition, a, b = self.arguments
            return where(condition, a.derivative, b.derivative)
        outer = _FORMS[self.op].derivatives
        if outer is None:
            return _wrap(0)
        total = _wrap(0)
        for by, argument in zip(outer(*self.arguments), self.arguments, strict=True):
            total = total + by * argument.derivative
        return total


def _found(arguments: Sequence[Any]) -> list[torch.Tensor] | None:
    """The list of the trace that these are part of."""
    for one in arguments:
        if type(one) is Expression and one.found is not None:
            return one.found
    return None


def _no_operation(name: str) -> InvalidInputError:
    names = ", ".join(("+", "-", "*", "/", "<", "<=", ">", ">=", "&", "|", *(n for n in _FORMS if n.isalpha())))
    return InvalidInputError(
        f"score: {name} is no operation of a score function (supported: {names}, as Python's operators or torch's "
        "functions, and tensor[indices])."
    )


def _wrap(x, found: list[torch.Tensor] | None = None) -> Expression:
    """Numbers as expressions; of a trace, if it is said of which."""
    if isinstance(x, Expression):
        return x
    if isinstance(x, bool) or not isinstance(x, (int, float, torch.SymInt, torch.SymFloat)):
        what = "a whole tensor: look up an element, such as slopes[head]" if isinstance(x, torch.Tensor) else repr(x)
        raise InvalidInputError(f"score: a score function cannot compute with {what}.")
    if _is_dynamo_compiling() or isinstance(x, (torch.SymInt, torch.SymFloat)):
        x = _constant_of_the_graph(x)
    if math.isnan(x):
        raise InvalidInputError("score: a score function cannot compute with NaN.")
    return Expression("constant", (x,), found)


def _constant_of_the_graph(x):
    """The number that a symbol stands for, from now on in the whole recording."""
    # Much to import, and eager calls need none of it.
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    return guard_scalar(x)


def _join(op: str, *arguments) -> Expression:
    arguments = tuple(map(_wrap, arguments))
    if op == "where":
        if len(arguments) != 3 or not arguments[0].truth:
            raise InvalidInputError("score: torch.where takes a comparison and two values.")
        if arguments[1] == arguments[2]:
            return arguments[1]
    elif any(a.truth for a in arguments) != (op in ("&", "|")):
        raise InvalidInputError(f"score: {op} of a comparison ({', '.join(map(str, arguments))}). Use torch.where.")
    a, b = (*arguments, None)[:2]
    is_zero = [x is not None and x.op == "constant" and x.arguments[0] == 0 for x in (a, b)]
    is_one = [x is not None and x.op == "constant" and x.arguments[0] == 1 for x in (a, b)]
    if op == "*" and any(is_zero):
        return _wrap(0, _found(arguments))
    if op == "*" and any(is_one):
        return b if is_one[0] else a
    if op == "+" and any(is_zero):
        return b if is_zero[0] else a
    if (op == "-" and is_zero[1]) or (op == "/" and is_one[1]):
        return a
    if op in _INFIX and a.op == b.op == "constant" and not _FORMS[op].truth and not (op == "/" and is_zero[1]):
        return _wrap(_FORMS[op].torch(a.arguments[0], b.arguments[0]), _found(arguments))
    return Expression(op, arguments)


SCORE = Expression("name", ("score",))
# seqlen_k - seqlen_q: ``query + OFFSET`` is where a query stands among the keys, aligned to the bottom right.
OFFSET = Expression("name", (OFFSET_NAME,))


def where(condition, a, b) -> Expression: return _join("where", condition, a, b)
def tanh(x) -> Expression: return _join("tanh", x)
def exp(x) -> Expression: return _join("exp", x)
def sqrt(x) -> Expression: return _join("sqrt", x)


# ---- from a score function to a Score ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """What a problem says of its scores. Hashable: the tensors travel beside it, in the order of :attr:`tensors`."""

    change: Expression | None = None  # of the scaled score; None: it stays as it is
    captured: tuple[tuple[str, tuple[int, ...]], ...] = ()  # dtype and shape of each tensor that `change` looks up
    sink: str | None = None  # dtype of the sinks, one for each query head; None: there are none

    @property
    def factor(self) -> float:
        """A positive constant that the changed scores are a multiple of: kernels leave it to the exponent."""
        if self.change is not None and self.change.op == "*":
            for one in self.change.arguments:
                if one.op == "constant" and 0 < one.arguments[0] < math.inf:
                    return float(one.arguments[0])
        return 1.0

    @property
    def base(self) -> Expression:
        """`change` without its factor."""
        if self.factor == 1.0:
            return self.change
        a, b = self.change.arguments
        return b if a.op == "constant" else a

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that come after q, k and v."""
        return (*(f"captured{i}" for i in range(len(self.captured))), *(("sink",) if self.sink else ()))

    @property
    def structure(self) -> Score:
        """What a kernel is compiled for: the same for tensors of any size."""
        return replace(self, captured=tuple((dtype, (0,) * len(shape)) for dtype, shape in self.captured))

    def __str__(self) -> str:
        parts = [f"score {self.change}"] if self.change is not None else []
        return ", ".join([*parts, *(["sinks"] if self.sink else [])])


PLAIN = Score()


def lookup(tensor: torch.Tensor, *indices) -> Expression:
    """``tensor[indices]`` inside a score function, such as ``slopes[head]`` or ``bias[batch, head, query, key]``.

    Under ``torch.compile(fullgraph=True)`` several indices need this function: Dynamo cannot trace ``bias[...]`` there.

    :param tensor: float32, bfloat16 or float16, on the device of q; read where it is, and not differentiated.
    :param indices: one for each dimension: arguments of the score function, integers, or sums, differences, products of
        these. They are clamped to the dimension. A dimension of size 1 serves every index.
    :raises InvalidInputError: outside of a score function, or with other tensors or indices.
    """
    found = _found(indices)
    if found is None:
        if any(isinstance(index, torch.Tensor) for index in indices):  # the function is called as PyTorch would
            return tensor[indices]
        raise InvalidInputError("score: arguments of a score function mean nothing outside of it.")
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in LOOKUP_DTYPES:
        given = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise InvalidInputError(f"score: looks up elements of tensors of float32, bfloat16 or float16 (given {given}).")
    if tensor.dim() != len(indices) or 0 in tensor.shape:
        raise InvalidInputError(
            f"score: a tensor of shape {tuple(tensor.shape)} needs {tensor.dim()} indices and no empty dimension "
            f"(given {len(indices)})."
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        raise InvalidInputError(
            "score: a tensor that is looked up requires a gradient, and gets none from a score function. "
            "Detach it, or compute this attention with PyTorch's own."
        )
    wrapped = []
    for size, index in zip(tensor.shape, map(_wrap, indices), strict=True):
        if not _is_integral(index):
            raise InvalidInputError(f"score: {index} is no integer index.")
        wrapped.append(_wrap(0) if size == 1 else index)
    slot = next((i for i, x in enumerate(found) if x is tensor), len(found))
    if slot == len(found):
        found.append(tensor)
    return Expression("lookup", (slot, *wrapped))


def _is_integral(x: Expression) -> bool:
    if x.op == "constant":
        return isinstance(x.arguments[0], int)
    if x.op == "name":
        return x != SCORE
    return x.op in ("+", "-", "*", "minimum", "maximum", "abs") and all(map(_is_integral, x.arguments))


class ScoreFunction:
    """A score function that is traced once: what :func:`softcap`, :func:`alibi` and :func:`bias` return."""

    def __init__(self, function: Callable, *steps: object):
        self._function, self._steps = function, steps  # which its name is made of

    def __call__(self, score, batch, head, query, key):
        return self._function(score, batch, head, query, key)

    @functools.cached_property
    def traced(self) -> tuple[Expression, tuple[torch.Tensor, ...]]:
        return _trace(self._function)

    def __repr__(self) -> str:
        return " then ".join(map(str, self._steps))


def softcap(cap: float) -> ScoreFunction:
    """``cap * tanh(score / cap)``, as Gemma 2 has it: for ``attention(..., score=softcap(50.0))``.

    :raises InvalidInputError: `cap` is no positive number.
    """
    if isinstance(cap, bool) or not isinstance(cap, (int, float)) or not 0 < cap < math.inf:
        raise InvalidInputError(f"softcap: cap must be a positive number (given {cap!r}).")
    make = _softcap.__wrapped__ if _is_dynamo_compiling() else _softcap  # Dynamo warns of caches
    return make(float(cap))


@functools.lru_cache(maxsize=256)
def _softcap(cap: float) -> ScoreFunction:
    return ScoreFunction(lambda score, *_: cap * tanh(score * (1 / cap)), f"softcap({cap})")


def alibi(slopes: torch.Tensor) -> ScoreFunction:
    """``score - slope * distance``, for ``attention(..., score=...)``.

    "Train Short, Test Long" (Press, Smith, Lewis 2021). The distance of query i and key j is
    ``|i + seqlen_k - seqlen_q - j|``, as in flash-attn.

    :param slopes: float32, bfloat16 or float16, (heads_q,) or (batch, heads_q), on q's device.
    :raises InvalidInputError: `slopes` has another shape.
    """
    if not isinstance(slopes, torch.Tensor) or slopes.dim() not in (1, 2):
        given = tuple(slopes.shape) if isinstance(slopes, torch.Tensor) else type(slopes).__name__
        raise InvalidInputError(f"alibi: slopes must be a tensor (heads_q,) or (batch, heads_q) (given {given}).")

    def change(score, batch, head, query, key):
        slope = lookup(slopes, head) if slopes.dim() == 1 else lookup(slopes, batch, head)
        return score - slope * abs(query + OFFSET - key)

    return ScoreFunction(change, f"alibi(slopes {tuple(slopes.shape)})")


def bias(tensor: torch.Tensor) -> ScoreFunction:
    """``score + tensor[batch, head, query, key]``: for ``attention(..., score=...)``.

    :param tensor: float32, bfloat16 or float16, (batch, heads_q, seqlen_q, seqlen_k), on q's device; a dimension of
        size 1 serves all. It is read where it is, and gets no gradient.
    :raises InvalidInputError: `tensor` has not 4 dimensions.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4:
        given = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise InvalidInputError(f"bias: needs a tensor (batch, heads_q, seqlen_q, seqlen_k) (given {given}).")
    return ScoreFunction(lambda score, *at: score + lookup(tensor, *at), f"bias(tensor {tuple(tensor.shape)})")


def chained(*functions: ScoreFunction | None) -> ScoreFunction | None:
    """Those that are not None, one after the other, as one score function; None if there is none."""
    there = [function for function in functions if function is not None]
    if len(there) < 2:
        return there[0] if there else None

    def change(score, *at):
        for function in there:
            score = function(score, *at)
        return score

    return ScoreFunction(change, *there)


def trace(function: Callable) -> tuple[Expression, tuple[torch.Tensor, ...]]:
    """The expression that a score function computes, and the tensors that it looks up."""
    if isinstance(function, ScoreFunction) and not _is_dynamo_compiling():  # Dynamo has no lock for the memory
        return function.traced
    if not callable(function):
        raise InvalidInputError(
            f"attention: score must be a function of (score, batch, head, query, key), such as flashcore.softcap(30.0) "
            f"(given {function!r})."
        )
    return _trace(function)


def _trace(function: Callable) -> tuple[Expression, tuple[torch.Tensor, ...]]:
    found: list[torch.Tensor] = []
    expression = _wrap(function(*(Expression("name", (name,), found) for name in ARGUMENTS)))
    tensors = tuple(found)
    found.clear()  # the expression outlives the call, in plans
    if expression.truth:
        raise InvalidInputError(f"attention: score returns a comparison, {expression}. Use torch.where.")
    return expression, tensors


def bind(score: Callable | None, sink: torch.Tensor | None) -> tuple[Score, tuple[torch.Tensor, ...]]:
    """The spec of a call's score function and sinks, and the tensors that they bring, in the spec's order."""
    change, captured = (None, ()) if score is None else trace(score)
    return describe(None if change == SCORE else change, captured, sink)


def describe(
    change: Expression | None, captured: Sequence[torch.Tensor], sink: torch.Tensor | None
) -> tuple[Score, tuple[torch.Tensor, ...]]:
    """The same of an expression and the tensors that it looks up."""
    spec = Score(
        change,
        tuple((str(t.dtype).removeprefix("torch."), tuple(t.shape)) for t in captured),
        None if sink is None else str(getattr(sink, "dtype", type(sink).__name__)).removeprefix("torch."),
    )
    return spec, tuple(captured) if sink is None else (*captured, sink)


def check(
    spec: Score, extras: tuple[torch.Tensor, ...], q: torch.Tensor, seqlen_k: int, packed: int | None = None
) -> None:
    """Raise InvalidInputError unless these tensors, in the spec's order, fit queries and keys.

    :param packed: how many sequences are packed in q; None: it is dense.
    """
    heads_q = q.shape[-2]
    if packed is None:
        sizes = {"batch": q.shape[0], "head": heads_q, "query": q.shape[1], "key": seqlen_k}
    else:  # whose lengths are on the device
        sizes = {"batch": packed, "head": heads_q}
    for name, tensor in zip(spec.tensors, extras, strict=True):
        if not isinstance(tensor, torch.Tensor):
            raise InvalidInputError(f"attention: {name} must be a torch.Tensor (given {type(tensor).__name__}).")
        if tensor.device != q.device:
            raise InvalidInputError(
                f"attention: {name} is on {tensor.device}, q on {q.device}. Move it there."
                if name == "sink"
                else f"attention: score looks up a tensor on {tensor.device}, but q is on {q.device}. Move it there."
            )
    for one in spec.change.lookups if spec.change is not None else ():
        slot, *indices = one.arguments
        if slot >= len(spec.captured) or len(indices) != extras[slot].dim():
            raise InvalidInputError(f"attention: score looks up {one}, and no tensor fits that.")
        for size, index in zip(extras[slot].shape, indices, strict=True):
            if index.op == "name" and index.arguments[0] in sizes and size != sizes[index.arguments[0]]:
                raise InvalidInputError(
                    f"attention: score looks up {index} in a dimension of size {size}, but there are "
                    f"{sizes[index.arguments[0]]} (shape {tuple(extras[slot].shape)})."
                )
    if spec.sink is not None:
        sink = extras[-1]
        if sink.shape != (heads_q,) or sink.dtype not in (torch.float32, q.dtype):
            raise InvalidInputError(
                f"attention: sink must be ({heads_q},), one for each query head, in float32 or q's dtype "
                f"(given {tuple(sink.shape)} in {spec.sink})."
            )


# ---- text ----------------------------------------------------------------------------------------------------------

_NODES = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Lt: "<", ast.LtE: "<=", ast.BitAnd: "&",
    ast.BitOr: "|",
}  # fmt: skip


def parse(text: str) -> Expression:
    """The expression whose ``text`` this is. Reads nothing but what expressions write."""
    return _parse(ast.parse(text, mode="eval").body)


def _parse(node: ast.AST) -> Expression:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return _wrap(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return _wrap(-_parse(node.operand).arguments[0])
    if isinstance(node, ast.Name) and node.id == "inf":
        return _wrap(math.inf)
    if isinstance(node, ast.Name) and node.id in (*ARGUMENTS, OFFSET_NAME):
        return Expression("name", (node.id,))
    if isinstance(node, ast.BinOp):
        return Expression(_NODES[type(node.op)], (_parse(node.left), _parse(node.right)))
    if isinstance(node, ast.Compare):
        return Expression(_NODES[type(node.ops[0])], (_parse(node.left), _parse(node.comparators[0])))
    if isinstance(node, ast.Call) and node.func.id == "lookup":
        slot, indices = getattr(node.args[0], "value", None), tuple(map(_parse, node.args[1:]))
        if type(slot) is int and all(map(_is_integral, indices)):
            return Expression("lookup", (slot, *indices))
    if isinstance(node, ast.Call) and node.func.id in _FORMS:
        return Expression(node.func.id, tuple(map(_parse, node.args)))
    raise InvalidInputError(f"score: {ast.unparse(node)} is no expression of a score function.")
