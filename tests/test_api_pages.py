"""docs/api is what the docstrings say, and says something of every public name."""

import ast
import re
from pathlib import Path

import pytest

import flashcore

pytest.importorskip("griffe")
if not (Path(flashcore.__file__).parents[1] / "tools").is_dir():
    pytest.skip("not a clone", allow_module_level=True)

from tools import api_pages


@pytest.fixture(scope="module")
def pages():
    return api_pages.pages()


def test_pages_are_current(pages):
    """`make api` writes them."""
    assert {path.name for path in api_pages.TARGET.iterdir()} == {path.name for path in pages}
    stale = [path.name for path, text in pages.items() if path.read_text() != text]
    assert stale == [], "make api"


def test_every_public_name_is_described(pages):
    page = pages[api_pages.TARGET / "flashcore.md"]
    parts = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    modules = {name for name, home in flashcore._PUBLIC.items() if name == home}
    assert set(parts) == set(flashcore.__all__) - modules - {"__version__"}
    assert [name for name, text in parts.items() if len(text.partition("\n```\n")[2]) < 20] == []
    modules -= {"errors"}  # the page of the package itself has its names
    for name in modules:
        assert any(page.startswith(f"flashcore.{name}") for page in api_pages.MODULES), name


def test_links_lead_somewhere(pages):
    anchors = {
        f"{path.name}#{heading.lower().replace('.', '')}"
        for path, text in pages.items()
        for heading in re.findall(r"^#+ (.*)$", text, re.M)
    }
    links = re.findall(r"\]\(([^)]*)\)", pages[api_pages.TARGET / "README.md"])
    assert len(links) > 30
    assert [link for link in links if "#" in link and link not in anchors] == []
    assert [link for link in links if "#" not in link and api_pages.TARGET / link not in pages] == []


def test_nothing_of_a_docstring_is_taken_for_something_else(tmp_path):
    (tmp_path / "one.py").write_text('def f(x):\n    """Does.\n\n    :param x: it.\n\n    More.\n    """\n')
    module = api_pages.griffe.load("one", search_paths=[str(tmp_path)], docstring_parser="sphinx")
    with pytest.raises(ValueError, match=r"one\.f: text after the fields"):
        api_pages.docstring(module["f"])


def test_type_checkers_see_every_public_name():
    (block,) = (
        node for node in ast.parse(Path(flashcore.__file__).read_text()).body if isinstance(node, ast.If)
    )
    assert {alias.name for node in block.body for alias in node.names} == set(flashcore._PUBLIC)
