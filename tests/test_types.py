"""What a type checker sees of the public functions, and that overloads keep up with the functions they are of."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flashcore

PACKAGE = Path(flashcore.__file__).parent

PROGRAM = """
import torch
import flashcore
from typing_extensions import assert_type
Tensor = torch.Tensor

def right(q: Tensor, flag: bool) -> None:
    assert_type(flashcore.attention(q, q, q), Tensor)
    assert_type(flashcore.attention(q, q, q, causal=True, return_lse=False), Tensor)
    assert_type(flashcore.attention(q, q, q, return_lse=True), tuple[Tensor, Tensor])
    assert_type(flashcore.attention(q, q, q, return_lse=flag), Tensor | tuple[Tensor, Tensor])
    assert_type(flashcore.explain(q, q, q), flashcore.Plan)
    assert_type(flashcore.matmul(q, q, activation="silu"), Tensor)
    assert_type(flashcore.linear(q, q), Tensor)
    assert_type(flashcore.scaled_dot_product_attention(q, q, q, is_causal=True), Tensor)

def wrong(q: Tensor) -> None:
    flashcore.attention(q, q, q, is_causal=True)  # wrong
    flashcore.attention(q, q, 1.0)  # wrong
    flashcore.linear(q, q, return_lse=True)  # wrong
"""


def test_a_type_checker_knows_what_comes_back(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", "program.py"],
        cwd=tmp_path, env={"PYTHONPATH": str(PACKAGE.parent)}, capture_output=True, text=True,
    )  # fmt: skip
    errors = {tuple(line.split(":")[:2]) for line in done.stdout.splitlines() if ": error: " in line}
    wrong = {
        ("program.py", str(number))
        for number, line in enumerate(PROGRAM.splitlines(), 1)
        if line.endswith("# wrong")
    }
    assert errors == wrong, done.stdout + done.stderr


def is_overload(function: ast.FunctionDef) -> bool:
    return [ast.unparse(decorator) for decorator in function.decorator_list] == ["overload"]


def overloaded() -> dict[str, list[ast.FunctionDef]]:
    """module:name -> the overloads and, last, the function, of all that have overloads."""
    found: dict[str, list[ast.FunctionDef]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                found.setdefault(f"{path.relative_to(PACKAGE)}:{node.name}", []).append(node)
    return {name: nodes for name, nodes in found.items() if any(map(is_overload, nodes))}


def parameters(function: ast.FunctionDef) -> dict[str, str]:
    """Name -> annotation, but of the one that overloads are about."""
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return {a.arg: a.annotation and ast.unparse(a.annotation) for a in every if a.arg != "return_lse"}


def test_overloads_have_all_parameters():
    found = overloaded()
    assert "api.py:attention" in found
    for name, (*overloads, function) in found.items():
        assert all(map(is_overload, overloads)), name
        assert {str(parameters(one)) for one in overloads} == {str(parameters(function))}, name
