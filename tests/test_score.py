"""Score functions: what they are traced to, that every language says the same, their derivatives, what is refused."""

import math
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from flashcore import score as scores
from flashcore.errors import InvalidInputError
from flashcore.score import OFFSET, PLAIN, alibi, bias, bind, parse, softcap, trace

SLOPES = torch.tensor([0.5, 0.25])
TABLE = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(0))

FUNCTIONS = {
    "softcap": softcap(3.0),
    "alibi": alibi(SLOPES),
    "alibi_of_batches": alibi(torch.rand(2, 2)),
    "bias": bias(TABLE),
    "softcap_and_alibi": lambda s, *at: alibi(SLOPES)(softcap(3.0)(s, *at), *at),
    "polynomial": lambda s, *_: -s * (s - 2) / 4 + 1 - s,
    "quotient": lambda s, *_: 1 / (3 + abs(s)),
    "functions": lambda s, *_: torch.exp(-abs(s)) + torch.sqrt(s * s + 1) + torch.log(s * s + 2),
    "extremes": lambda s, *_: torch.maximum(torch.minimum(s, 1.5 * s + 0.1), 0.25 * s - 1),
    "branches": lambda s, b, h, i, j: torch.where((i + OFFSET - j < 2) & (j > 0) | (b >= 1), 2 * s, torch.tanh(s)),
    "hidden": lambda s, b, h, i, j: torch.where(j <= i, s, -math.inf),
    "computed_index": lambda s, b, h, i, j: s + SLOPES[i - j],
}


def names_of(score: torch.Tensor) -> dict:
    """A grid (batch 2, heads 2, queries 3, keys 4) of arguments."""
    batch, head, query, key = (torch.arange(n) for n in (2, 2, 3, 4))
    return {
        "score": score, "batch": batch[:, None, None, None], "head": head[:, None, None], "query": query[:, None],
        "key": key, "offset": 1,
    }  # fmt: skip


def printed(expression, language: str, captured, score, b, h, i, j, offset) -> float:
    """One value of the printed source, read as Python with C's names."""

    def look_up(tensor):
        return lambda *at: float(tensor[tuple(min(max(a, 0), n - 1) for a, n in zip(at, tensor.shape, strict=True))])

    class tl:
        abs, minimum, maximum, exp, log, sqrt = abs, min, max, math.exp, math.log, math.sqrt

        @staticmethod
        def where(condition, a, b):
            return a if condition else b

    source = expression.print(language)
    if language == "cuda":
        import re

        source = re.sub(r"(?<=[\d.])f\b", "", source).replace("&&", "and").replace("||", "or")
        while "?" in source:  # the innermost conditional first
            source = re.sub(r"\(([^?:]*?) \? ([^?:]*?) : ([^?:]*?)\)$", r"((\2) if (\1) else (\3))", source)
    scope = {
        "s": score / 0.5, "scale": 0.5, "score": score,
        "batch": b, "head": h, "query": i, "key": j, "offset": offset, "tl": tl, "tanh": math.tanh,
        "tanh_approx": math.tanh, "fabsf": abs, "fminf": min, "fmaxf": max, "__expf": math.exp, "__logf": math.log,
        "sqrtf": math.sqrt, "negative_infinity": lambda: -math.inf, "min": min, "max": max,
        **{f"{n}_f": float(x) for n, x in {"batch": b, "head": h, "query": i, "key": j, "offset": offset}.items()},
        **{f"captured{n}": look_up(t) for n, t in enumerate(captured)},
    }  # fmt: skip
    return eval(source, scope)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("language", ["cuda", "triton"])
def test_printed_is_evaluated(name, language):
    expression, captured = trace(FUNCTIONS[name])
    score = torch.randn(2, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    value = torch.as_tensor(expression.value(names_of(score), captured)).expand_as(score)
    for b, h, i, j in ((0, 1, 2, 0), (1, 0, 0, 3), (1, 1, 2, 2), (0, 0, 1, 1)):
        got = printed(expression, language, captured, float(score[b, h, i, j]), b, h, i, j, 1)
        assert got == pytest.approx(float(value[b, h, i, j]), rel=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivative_is_autograds(name):
    expression, captured = trace(FUNCTIONS[name])
    score = torch.randn(2, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaf = score.clone().requires_grad_()
    value = torch.as_tensor(expression.value(names_of(leaf), captured)).expand_as(score)
    (expected,) = torch.autograd.grad(value.nan_to_num(neginf=0.0).sum(), leaf)
    derivative = expression.derivative.value(names_of(score), captured)
    torch.testing.assert_close(torch.as_tensor(derivative).to(score).expand_as(score), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_text_is_read_back(name):
    expression, _ = trace(FUNCTIONS[name])
    assert parse(str(expression)) == expression
    assert parse(str(expression.derivative)) == expression.derivative


def test_equal_functions_share_one_spec():
    assert bind(softcap(30.0), None)[0] == bind(softcap(30), None)[0] != bind(softcap(20.0), None)[0]
    assert bind(alibi(torch.rand(4)), None)[0] == bind(alibi(torch.ones(4)), None)[0]
    assert bind(lambda s, *_: s, None)[0] == bind(lambda s, *_: s * 1 + 0, None)[0] == PLAIN


def test_tensors_in_order():
    sink = torch.zeros(2)
    spec, extras = bind(lambda s, b, h, i, j: s + SLOPES[h] * TABLE[b, h, i, j] + SLOPES[h], sink)
    assert spec.tensors == ("captured0", "captured1", "sink")
    assert [a is b for a, b in zip(extras, (SLOPES, TABLE, sink), strict=True)] == [True] * 3


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda s, *_: s // 2, "// is no operation"),
        (lambda s, *_: s % 2, "% is no operation"),
        (lambda s, *_: s**2, r"\*\* is no operation"),
        (lambda s, *_: torch.sin(s), "torch.sin is no operation"),
        (lambda s, *_: s.tanh(), "tanh is no operation"),
        (lambda s, *_: math.tanh(s), "conversion to a number is no operation"),
        (lambda s, *_: s if s > 0 else 0, "cannot branch on"),
        (lambda s, *_: s + SLOPES, "whole tensor"),
        (lambda s, *_: s < 1, "returns a comparison"),
        (lambda s, *_: s + (s < 1), "of a comparison"),
        (lambda s, *_: None, "cannot compute with None"),
        (lambda s, *_: s + math.nan, "NaN"),
        (lambda s, *_: s + SLOPES[s], "no integer index"),
        (lambda s, b, h, i, j: s + TABLE[h], "needs 4 indices"),
        (lambda s, b, h, *_: s + torch.arange(3)[h], "float32, bfloat16 or float16"),
        (lambda s, b, h, *_: s + torch.ones(3, requires_grad=True)[h], "requires a gradient"),
        (3.0, "must be a function"),
    ],
)
def test_refusals_name_the_operation(function, message):
    with pytest.raises(InvalidInputError, match=message):
        trace(function)


@pytest.mark.parametrize("cap", [0, -1.0, math.inf, math.nan, True, "30"])
def test_caps_are_positive(cap):
    with pytest.raises(InvalidInputError, match="cap must be a positive number"):
        softcap(cap)


def test_expressions_keep_no_tensors():
    """They stay in plans, which would keep each call's memory."""
    made = [torch.ones(1, 1, 3, 4)]
    expression = trace(lambda s, *at: s + made[0][at])[0]
    gone = weakref.ref(made.pop())
    assert gone() is None, expression


def test_traces_of_several_threads_do_not_mix():
    def function(score, batch, head, query, key):
        inside.wait()
        return score + TABLE[batch, head, query, key] + SLOPES[head]

    inside = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        traces = [pool.submit(trace, function) for _ in range(4)]
    assert all([t is x for t, x in zip(one.result()[1], (TABLE, SLOPES), strict=True)] == [True] * 2 for one in traces)


@pytest.mark.parametrize(
    "text",
    ["__import__('os')", "score.real", "eval(score)", "score if score else key", "'x'", "lookup('x', head)",
     "lookup(1.5, head)", "lookup(True, head)", "lookup(score, head)", "lookup(-1, head)", "lookup(0, score)",
     "lookup(0, 0.5)"],
)  # fmt: skip
def test_text_from_elsewhere_is_not_run(text):
    with pytest.raises((InvalidInputError, AttributeError, KeyError)):
        parse(text)


def test_sizes_are_checked():
    q = torch.randn(2, 3, 2, 8)
    wrong = {"size 3, but there are 2": alibi(torch.ones(3)), "size 5": bias(torch.ones(2, 2, 3, 5))}
    for message, function in wrong.items():
        spec, extras = bind(function, None)
        with pytest.raises(InvalidInputError, match=message):
            scores.check(spec, extras, q, 4)
    spec, extras = bind(alibi(SLOPES), None)
    for text in ("lookup(1, head)", "lookup(0, head, key)"):
        with pytest.raises(InvalidInputError, match="no tensor fits"):
            scores.check(replace(spec, change=parse(text)), extras, q, 4)
    for sink in (torch.zeros(3), torch.zeros(2, dtype=torch.float64), torch.zeros(1, 2)):
        spec, extras = bind(None, sink)
        with pytest.raises(InvalidInputError, match="sink must be"):
            scores.check(spec, extras, q, 4)
