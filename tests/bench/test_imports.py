"""Modules of the bench import downwards: what runs, then tables, then documents."""

from __future__ import annotations

import ast
from pathlib import Path

import flashcore.bench

FOLDER = Path(flashcore.bench.__file__).parent


def imported(path: Path) -> set[str]:
    """Other modules of the bench that one imports, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "flashcore.bench":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flashcore.bench."):
            found.add(node.module.split(".")[2])
    return found


def test_imports_have_one_direction():
    graph = {path.stem: imported(path) for path in FOLDER.glob("*.py")}
    assert graph["suites"]
    below: dict[str, int] = {}
    while len(below) < len(graph):
        ready = [name for name, needs in graph.items() if name not in below and needs <= below.keys()]
        assert ready, f"a circle among {graph.keys() - below.keys()}"
        below |= dict.fromkeys(ready, len(below))
    assert below["tables"] < below["documents"]
    assert not {"documents", "plot", "tables"} & (graph["suites"] | graph["e2e"] | graph["operations"])
    assert "profile" not in graph["roofline"]
