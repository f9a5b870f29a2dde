"""Writes docs/api: what the docstrings of the public modules say, one page for each module.

Run `python tools/api_pages.py` (or `make api`) after a change; a test compares the committed pages with the output.
Public is what a module's `__all__` names; the package's own is in `flashcore/__init__.py`.
"""

import re
from pathlib import Path

import griffe

import flashcore

ROOT = Path(flashcore.__file__).parents[1]
TARGET = ROOT / "docs" / "api"
MODULES = (
    "flashcore",
    "flashcore.plan",
    "flashcore.distributed",
    "flashcore.integrations.sdpa",
    "flashcore.integrations.torch_registry",
    "flashcore.integrations.transformers",
    "flashcore.integrations.vllm",
    "flashcore.compat.flash_attn",
    "flashcore.compat.flash_attn_interface",
    "flashcore.env",
)
NOTE = "<!-- Made by tools/api_pages.py from the docstrings: do not edit. -->\n\n"


def pages() -> dict[Path, str]:
    """File -> text of all pages."""
    package = griffe.load("flashcore", search_paths=[str(ROOT)], docstring_parser="sphinx")
    modules = {name: package[name.partition(".")[2]] if "." in name else package for name in MODULES}
    found = {TARGET / f"{name}.md": page(module) for name, module in modules.items()}
    found[TARGET / "README.md"] = index(modules)
    return found


def index(modules: dict[str, griffe.Module]) -> str:
    lines = ["# API reference\n"]
    for name, module in modules.items():
        lines.append(f"\n**[{name}]({name}.md)**: {summary(module)}\n\n")
        lines += [f"- [`{one.name}`]({name}.md#{anchor(one)}): {summary(one)}\n" for one in public(module)]
    return NOTE + "".join(lines)


def page(module: griffe.Module) -> str:
    parts = [f"# {module.path}\n", *docstring(module)]
    for one in public(module):
        parts += [f"## {one.name}\n", *describe(one)]
        if isinstance(one, griffe.Class):
            for member in methods(one):
                parts += [f"### {one.name}.{member.name}\n", *describe(member)]
    return NOTE + "\n".join(parts)


def public(module: griffe.Module) -> list[griffe.Object]:
    """The functions and classes that the module's `__all__` names."""
    if module.path == "flashcore":
        objects = [
            module[home if home == name else f"{home}.{name}"] for name, home in flashcore._PUBLIC.items()
        ]
    else:
        objects = [module[name] for name in module.exports or ()]
    return [one for one in objects if isinstance(one, griffe.Class | griffe.Function)]


def methods(one: griffe.Class) -> list[griffe.Object]:
    return [m for m in one.members.values() if not m.name.startswith("_") and m.has_docstring]


def anchor(one: griffe.Object) -> str:
    return one.name.lower()


def summary(one: griffe.Object) -> str:
    """The docstring's first sentence, or its first paragraph where that is shorter."""
    first = plain(one.docstring.value if one.docstring else "").partition("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<=\.) (?=[A-Z])", first)[0]


def describe(one: griffe.Object) -> list[str]:
    """Signature and docstring."""
    if isinstance(one, griffe.Function):
        return [f"```python\n{signature(one)}\n```\n", *docstring(one)]
    if isinstance(one, griffe.Attribute):  # a property
        return [f"```python\n{one.name}: {one.annotation}\n```\n" if one.annotation else "", *docstring(one)]
    return [f"```python\n{fields(one)}\n```\n", *docstring(one)]


def signature(function: griffe.Function) -> str:
    """As it would be written, on one line where it fits."""
    shown, kind = [], None
    for parameter in function.parameters:
        if parameter.name in ("self", "cls", "unknown"):  # the last takes what is refused
            continue
        if parameter.kind is griffe.ParameterKind.keyword_only and kind is not parameter.kind:
            shown.append("*")
        kind = parameter.kind
        stars = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}.get(
            kind, ""
        )
        text = f"{stars}{parameter.name}" + (f": {parameter.annotation}" if parameter.annotation else "")
        if parameter.default is not None and not stars:
            text += (" = " if parameter.annotation else "=") + str(parameter.default)
        shown.append(text)
    result = f" -> {function.returns}" if function.returns else ""
    line = f"{function.name}({', '.join(shown)}){result}"
    if len(line) <= 100:
        return line
    return f"{function.name}(\n" + "".join(f"    {text},\n" for text in shown) + f"){result}"


def fields(one: griffe.Class) -> str:
    """A class as it is called, or a dataclass with its fields, whose comments say what they hold."""
    bases = f"({', '.join(map(str, one.bases))})" if one.bases else ""
    if not any("dataclass" in str(decorator.value) for decorator in one.decorators):
        init = one.members.get("__init__")
        called = init and signature(init).replace("__init__", one.name, 1).removesuffix(" -> None")
        return f"class {called or one.name + bases}"
    lines = one.filepath.read_text().splitlines()
    members = [m for m in one.members.values() if isinstance(m, griffe.Attribute) and not m.has_docstring]
    members = [m for m in members if "property" not in m.labels and not m.name.startswith("_")]
    return f"class {one.name}{bases}:\n" + "\n".join(lines[m.lineno - 1] for m in members)


def docstring(one: griffe.Object) -> list[str]:
    if one.docstring and re.search(r"^:\w+.*\n\n[^:\s]", one.docstring.value, re.M | re.S):
        raise ValueError(
            f"{one.path}: text after the fields of its docstring would be taken for part of the last one"
        )
    parts = []
    for section in one.docstring.parsed if one.docstring else ():
        if section.kind is griffe.DocstringSectionKind.text:
            parts.append(f"{plain(section.value)}\n")
        elif section.kind is griffe.DocstringSectionKind.parameters:
            parts += ["Parameters:\n", *(f"- `{item.name}`: {entry(item)}" for item in section.value), ""]
        elif section.kind is griffe.DocstringSectionKind.returns:
            parts.append(f"Returns: {entry(section.value[0])}\n")
        elif section.kind is griffe.DocstringSectionKind.raises:
            parts += ["Raises:\n", *(f"- `{item.annotation}`: {entry(item)}" for item in section.value), ""]
        else:
            raise ValueError(f"{one.path}: no rule for {section.kind} in a docstring")
    return parts


def entry(item: griffe.DocstringElement) -> str:
    return re.sub(r"\n\s*", "\n  ", plain(item.description))


def plain(text: str) -> str:
    """Markdown of a docstring's reStructuredText: roles, double backticks, examples and tables."""
    blocks = []
    for block in text.strip().split("\n\n"):
        if block.startswith((">>> ", "===")):
            blocks.append(f"```text\n{block}\n```")
        else:
            blocks.append(re.sub(r"``([^`]+)``", r"`\1`", re.sub(r":\w+:`~?([^`]+)`", r"`\1`", block)))
    return "\n\n".join(blocks)


if __name__ == "__main__":
    TARGET.mkdir(exist_ok=True)
    for old in TARGET.glob("*.md"):
        old.unlink()
    for path, text in pages().items():
        path.write_text(text)
