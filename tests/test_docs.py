"""The documents' commands and examples run, and what they name exists.

A fenced block is run by its language: ``python`` as a program, ``sh`` line by line as flashcore's commands. ``text``,
``dockerfile`` and ``sh install`` (it would download) are only checked for commands and options that exist.
"""

import contextlib
import fnmatch
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
from tests.cases import BY_NAME

ROOT = Path(flashcore.__file__).parents[1]
DOCS = ("architecture.md", "deployment.md", "numerics.md")
RUN = {"python", "sh"}
NOT_RUN = {"text", "dockerfile", "sh install"}

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not a clone")


def blocks():
    """(document, language, text) of every fenced block."""
    return [
        (name, language, text)
        for name in DOCS
        for language, text in re.findall(
            r"^```(.*?)\n(.*?)^```$", (ROOT / "docs" / name).read_text(), re.M | re.S
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


NO_NVRTC = cli._nvrtc_missing()


@pytest.mark.parametrize("text", numbered("sh"))
def test_commands(text, tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(tmp_path))
    declared = cli._declared
    monkeypatch.setattr(cli, "_declared", lambda head_dims: declared(head_dims)[:1])  # one kernel will do
    for program, *arguments in commands(text):
        assert program == "flashcore"
        if arguments[0] == "compile" and NO_NVRTC:
            pytest.skip(str(NO_NVRTC))
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 0, result.output
        assert result.output.strip()


def test_commands_that_are_not_run_exist():
    """In Dockerfiles, in tables and in running text."""
    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    for name in DOCS:
        text = (ROOT / "docs" / name).read_text()
        assert set(re.findall(r"(?:`|RUN )flashcore (\w+)", text)) <= known, name


def test_what_doctor_and_warnings_say_is_in_the_sources():
    table = (ROOT / "docs/deployment.md").read_text().partition("| what it says | what to do |")[2]
    messages = re.findall(r"^\| `(.*?)` \|", table, re.M)
    sources = "".join(path.read_text() for path in (ROOT / "flashcore").rglob("*.py")).replace("\\'", "'")
    assert len(messages) > 5
    assert [message for message in messages if message not in sources] == []


def test_cases_exist():
    table = (ROOT / "docs/numerics.md").read_text().partition("| input | what it provokes | cases |")[2]
    patterns = [
        name
        for row in re.findall(r"^\|.*\| (.*?) \|$", table, re.M)[1:]
        for name in re.findall(r"`(.*?)`", row)
    ]
    assert len(patterns) > 5
    assert [pattern for pattern in patterns if not fnmatch.filter(BY_NAME, pattern)] == []


def test_files_exist():
    """Whatever looks like a file of the repository."""
    folders = ("", "docs", "flashcore", "flashcore/backends", "flashcore/backends/hopper", "flashcore/device")
    for name in DOCS:
        text = (ROOT / "docs" / name).read_text()
        names = re.findall(r"`([\w/]+\.(?:py|cuh|md))`", text) + re.findall(r"\]\(([\w/.]+)\)", text)
        missing = [file for file in names if not any((ROOT / folder / file).exists() for folder in folders)]
        assert missing == [], name


def test_variables_exist():
    environment = (ROOT / "flashcore/env.py").read_text()
    for name in DOCS:
        for variable in re.findall(r"FLASHCORE_\w+", (ROOT / "docs" / name).read_text()):
            assert variable in environment
