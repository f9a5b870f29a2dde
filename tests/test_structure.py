"""The shape of the house: imports point one way."""

import ast
from pathlib import Path

import flashcore

ROOT = Path(flashcore.__file__).parent
UPWARDS = {("flashcore.calls", "flashcore.ops")}  # those who record calls are looked for when there are any


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in ROOT.rglob("*.py") if path.name != "__main__.py"}


def imports_of(name: str) -> set[str]:
    """FlashCore's modules that a module imports, wherever it does, but for type checkers."""
    tree = ast.parse(MODULES[name].read_text())
    typing = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if node in typing:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inner}
    return {module for module in found if module in MODULES} - {name, "flashcore"}


def test_no_module_is_imported_by_what_it_imports():
    graph = {name: {other for other in imports_of(name) if (name, other) not in UPWARDS} for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_exceptions_are_there():
    assert all(other in imports_of(name) for name, other in UPWARDS)


def test_nothing_below_knows_of_several_devices():
    """But for the package itself, which has the name, and benchmarks, which measure it."""
    above = ("flashcore.distributed", "flashcore.bench", "flashcore.cli")
    below = [name for name in MODULES if name != "flashcore" and not name.startswith(above)]
    assert "flashcore.api" in below
    assert [name for name in below if any(o.startswith("flashcore.distributed") for o in imports_of(name))] == []
    for name in ("ring", "ulysses"):
        assert "flashcore.distributed.layout" in imports_of(f"flashcore.distributed.{name}")
