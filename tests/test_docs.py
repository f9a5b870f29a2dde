"""The documents' commands and examples run, and what they name exists.

A fenced block is run by its language: ``python`` as a program, as it stands, ``sh`` line by line.
flashcore's commands run, with measurements and Nsight Compute replaced: tests/bench and test_cli.py are about those.
Commands that would install something, and ``make``, are checked for what they name. Of ``text`` and ``dockerfile`` only
flashcore's commands are checked.
"""

import contextlib
import fnmatch
import inspect
import io
import re
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

import flashcore
from flashcore import cli
from flashcore.bench import cases, documents, profile, record, suites
from tests.cases import BY_NAME

ROOT = Path(flashcore.__file__).parents[1]
DOCS = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    *(
        f"docs/{name}.md"
        for name in ("architecture", "benchmarks", "deployment", "distributed", "numerics", "performance")
    ),
)
RUN = {"python", "sh"}
NOT_RUN = {"text", "dockerfile"}

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not a clone")


def blocks():
    """(document, language, text) of every fenced block."""
    return [
        (name, language, text)
        for name in DOCS
        for language, text in re.findall(
            r"^```(.*?)\n(.*?)^```$", (ROOT / name).read_text(), re.M | re.S
        )
    ]


def commands(text: str) -> list[list[str]]:
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def numbered(language: str) -> list:
    found = [(name, text) for name, kind, text in blocks() if kind == language]
    return [pytest.param(text, id=f"{name}-{number}") for number, (name, text) in enumerate(found)]


def test_every_block_says_what_it_is():
    assert {language for _, language, _ in blocks()} == RUN | NOT_RUN


@pytest.mark.parametrize("text", numbered("python"))
def test_example(text):
    if "transformers" in text:
        pytest.importorskip("transformers")
    before = F.scaled_dot_product_attention
    torch.manual_seed(0)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(text, "example", "exec"), {})
    assert F.scaled_dot_product_attention is before
    for line in text.splitlines():
        if line.startswith("print(") and "  # " in line:
            assert line.split("  # ")[1] in printed.getvalue()


NO_NVRTC = cli.compile.nvrtc_missing()


@pytest.fixture
def replaced(tmp_path, monkeypatch):
    """No command measures, profiles, or writes outside of tmp_path; one kernel stands for all."""
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(tmp_path / "kernels"))
    declared = cli.compile.declared
    monkeypatch.setattr(cli.compile, "declared", lambda head_dims: declared(head_dims)[:1])

    def measured(name):
        return {"suite": name, "meta": {"gpu": None, "method": {"mode": "wall"}}, "rows": [], "skipped": []}

    monkeypatch.setattr(suites, "run", lambda suite, *rest: measured(suite.name))
    monkeypatch.setattr(profile, "missing", lambda ncu: None)
    monkeypatch.setattr(profile, "run", lambda *rest: measured("profile"))
    monkeypatch.setattr(documents.Documents, "update", lambda self: [])
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    for command in (cli.bench, cli.report):
        monkeypatch.setattr(command, "need_matplotlib", lambda: None)


def run_command(words: list[str]) -> None:
    program, *arguments = words
    if program == "make":
        targets = {word for word in arguments if "=" not in word}
        assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    elif program == "pip":
        check_installation(arguments)
    else:
        assert Path(program).name == "flashcore"
        if arguments[0] == "compile" and NO_NVRTC:
            pytest.skip(str(NO_NVRTC))
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 0, result.output
        assert result.output


def check_installation(arguments: list[str]) -> None:
    """It installs this package, with extras that it has."""
    verb, what = arguments
    assert verb == "install"
    name, _, extras = what.partition("[")
    assert name == "."
    declared = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    assert all(f"\n{extra} = [" in declared for extra in extras.removesuffix("]").split(",") if extra)


@pytest.mark.usefixtures("replaced")
@pytest.mark.parametrize("text", numbered("sh"))
def test_commands(text):
    installs = [words for words in commands(text) if words[0] == "pip"]
    if installs and any(words[0] == "flashcore" for words in commands(text)):
        assert any("cli" in words[-1] for words in installs)
    for words in commands(text):
        run_command(words)


INLINE = sorted(
    {text for name in DOCS for text in re.findall(r"`((?:flashcore|pip|make) [^`]+)`", (ROOT / name).read_text())}
)


@pytest.mark.usefixtures("replaced")
@pytest.mark.parametrize("text", INLINE)
def test_commands_in_running_text(text):
    run_command(shlex.split(text))


def test_commands_in_containers_exist():
    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    texts = [text for _, kind, text in blocks() if kind in NOT_RUN]
    found = {name for text in texts for name in re.findall(r"(?:RUN|flashcore) flashcore (\w+)", text)}
    assert {"compile", "doctor"} <= found <= known
    for text in texts:
        assert "RUN flashcore" not in text or re.search(r"^RUN pip install .*flashcore\[cli\]", text, re.M)


def test_what_doctor_and_warnings_say_is_in_the_sources():
    table = (ROOT / "docs/deployment.md").read_text().partition("| what it says | what to do |")[2]
    messages = re.findall(r"^\| `(.*?)` \|", table, re.M)
    sources = "".join(path.read_text() for path in (ROOT / "flashcore").rglob("*.py")).replace("\\'", "'")
    assert len(messages) > 5
    assert [message for message in messages if message not in sources] == []


def test_lines_of_doctor_exist():
    table = (ROOT / "docs/deployment.md").read_text().partition("| line of `doctor` |")[2].partition("\n\n")[0]
    lines = re.findall(r"^\| `(\w+)` \|", table, re.M)
    printed = {name for values in cli.doctor.diagnose().values() for name in values}
    assert len(lines) > 5
    assert set(lines) <= printed


def test_cases_exist():
    table = (ROOT / "docs/numerics.md").read_text().partition("| input | what it provokes | cases |")[2]
    patterns = [
        name
        for row in re.findall(r"^\|.*\| (.*?) \|$", table, re.M)[1:]
        for name in re.findall(r"`(.*?)`", row)
    ]
    assert len(patterns) > 5
    assert [pattern for pattern in patterns if not fnmatch.filter(BY_NAME, pattern)] == []


def test_every_suite_is_described():
    table = (ROOT / "docs/benchmarks.md").read_text().partition("| suite | what it measures |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.M)) == sorted(cases.SUITES)


def test_files_exist():
    """Whatever looks like a file of the repository."""
    folders = ("", "docs", "tests", "flashcore", "flashcore/backends", "flashcore/backends/hopper", "flashcore/device")
    for name in DOCS:
        text = (ROOT / name).read_text()
        names = re.findall(r"`([\w/]+\.(?:py|cuh|md))`", text) + re.findall(r"\]\(([\w/.]+)\)", text)
        missing = [file for file in names if not any((ROOT / folder / file).exists() for folder in folders)]
        assert missing == [], name


def anchors(path: Path) -> set[str]:
    """Of a document's headings, as hosts of repositories make them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCS)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("https://"):
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_examples_need_no_gpu():
    """Nor a change to run without one."""
    assert [name for name, kind, text in blocks() if kind == "python" and 'device="cuda"' in text] == []


def test_signatures_are_the_functions_own():
    found = re.findall(r"`flashcore\.(\w+)(\([^`]*=[^`]*\))`", (ROOT / "README.md").read_text())
    assert {"attention", "linear", "matmul"} <= {name for name, _ in found}
    for name, text in found:
        parameters = inspect.signature(getattr(flashcore, name)).parameters.values()
        plain = [one.replace(annotation=one.empty) for one in parameters if one.name != "unknown"]
        assert " ".join(text.split()) == str(inspect.Signature(plain)).replace("'", '"'), name


def test_variables_exist():
    environment = (ROOT / "flashcore/env.py").read_text()
    for name in DOCS:
        for variable in re.findall(r"FLASHCORE_\w+", (ROOT / name).read_text()):
            assert variable in environment
