"""What is published: the wheel and the sdist, what they need, and the command where its libraries are missing."""

import ast
import configparser
import email
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import flashcore

ROOT = Path(flashcore.__file__).parents[1]
CORE = {"torch", "cuda-core", "numpy", "filelock"}

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="not a clone")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with a wheel and an sdist of this clone."""
    pytest.importorskip("hatchling")
    pytest.importorskip("hatch_fancy_pypi_readme")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", folder], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    assert path.name == f"flashcore_attention-{flashcore.__version__}-py3-none-any.whl"
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel) -> email.message.Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def requirements(metadata, extra: str | None = None) -> dict[str, str]:
    """Name -> versions of what the package, or one of its extras, needs."""
    found = {}
    for line in metadata.get_all("Requires-Dist"):
        what, _, condition = line.partition("; ")
        if condition == (f"extra == '{extra}'" if extra else ""):
            name, versions = re.fullmatch(r"([\w-]+)(.*)", what).groups()
            found[name] = versions
    return found


def test_wheel_has_the_package_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "flashcore").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert names == sources
    assert "flashcore/py.typed" in names
    assert "flashcore/device/attention/forward_sm90.cuh" in names


def test_sdist_has_all_that_the_tests_need(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("benchmarks", "docs", "flashcore", "tests", "tools")
    files = {
        str(file.relative_to(ROOT))
        for folder in folders
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".cuh", ".h", ".json", ".md", ".png", ".py")
    }
    assert files <= names
    assert {"LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml"} <= names


def test_core_needs_four_packages(metadata):
    assert set(requirements(metadata)) == CORE


def test_every_dependency_has_a_floor(metadata):
    lines = metadata.get_all("Requires-Dist")
    assert [line for line in lines if not re.search(r">=\d", line.partition(";")[0])] == []


def test_constraints_are_within_what_is_declared(metadata):
    """And name nothing that no extra installs."""
    declared = {re.match(r"[\w-]+", line).group() for line in metadata.get_all("Requires-Dist")}
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.M))
    assert pinned <= declared


def test_core_imports_nothing_but_what_it_needs():
    """Everywhere, at the top of a module or in a function; Triton comes with torch, or its backend is not there."""
    allowed = {*sys.stdlib_module_names, "flashcore", "torch", "cuda", "numpy", "filelock", "triton"}
    extras = ("cli", "__main__.py", "bench", "integrations/transformers.py", "integrations/vllm.py")
    for path in (ROOT / "flashcore").rglob("*.py"):
        name = str(path.relative_to(ROOT / "flashcore"))
        if any(name == extra or name.startswith(f"{extra}/") for extra in extras):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or "flashcore"] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert {name.partition(".")[0] for name in names} <= allowed, f"{path}:{node.lineno}"


def test_readme_on_an_index_leads_nowhere_that_is_not_there(metadata):
    text = metadata.get_payload()
    assert text.startswith("# FlashCore")
    assert "## Limits" in text
    assert [link for link in re.findall(r"\]\(([^)]*)\)", text) if not link.startswith("https://")] == []


def test_messages_and_documents_install_what_exists(metadata):
    """``flashcore`` is another project's distribution; ours has the extras that are named."""
    extras = set(metadata.get_all("Provides-Extra"))
    files = [*(ROOT / "flashcore").rglob("*.py"), *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    found = [
        (name, extra)
        for path in files
        for name, listed in re.findall(
            r"pip install[^\n]*['\"\s/](flashcore[\w-]*|\.)\[([\w,{}]+)\]", path.read_text()
        )
        for extra in listed.replace("{wanted}", "13").split(",")
    ]
    assert ("flashcore-attention", "cu13") in found
    assert {extra for _, extra in found} <= extras
    assert not any(
        re.search(r"pip install ['\"]?flashcore(\[|\s|$|['\"])", path.read_text(), re.M) for path in files
    )


# --- beside the package


def test_changes_and_citation_are_of_this_version():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased" or headings[0].startswith(flashcore.__version__)
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == flashcore.__version__
    assert {"cff-version", "message", "title", "authors", "license"} <= set(citation)


def test_issue_templates_ask_for_what_exists():
    yaml = pytest.importorskip("yaml")
    paths = [path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"]
    assert len(paths) == 2
    for path in paths:
        template = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= set(template)
        for field in template["body"]:
            assert field["type"] in {"textarea", "checkboxes"}
            assert {"label"} <= set(field["attributes"])
    text = (ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text()
    assert "`flashcore doctor --json`" in text
    for name in re.findall(r"flashcore\.(?!__)(\w+)", text):
        assert hasattr(flashcore, name), name


# --- the command


def command(*arguments: str, hidden: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """``flashcore ARGUMENTS``, with libraries hidden."""
    code = f"import sys; sys.modules.update(dict.fromkeys({hidden})); from flashcore.__main__ import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_entry_points_are_there(wheel):
    """The command and the plug-in: what they name is defined in the module that they name."""
    (name,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(name).decode())
    points = {group: dict(parser[group]) for group in parser.sections()}
    assert points == {
        "console_scripts": {"flashcore": "flashcore.__main__:main"},
        "vllm.general_plugins": {"flashcore": "flashcore.integrations.vllm:register"},
    }
    for value in (value for group in points.values() for value in group.values()):
        module, _, function = value.partition(":")
        tree = ast.parse(wheel.read(f"{module.replace('.', '/')}.py"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("library", ["typer", "rich"])
def test_command_without_its_libraries_says_what_to_install(library):
    done = command("doctor", hidden=(library,))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "The flashcore command needs typer and rich: pip install 'flashcore-attention[cli]'\n"
    )


def test_command_does_not_hide_other_errors():
    done = command("--version", hidden=("json",))
    assert "ModuleNotFoundError" in done.stderr


def test_version():
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"flashcore {flashcore.__version__}\n")
