"""The environment variables, and that the table in the docstring is complete."""

import os
import re
from pathlib import Path

import pytest

import flashcore
from flashcore import env
from flashcore.errors import EnvironmentProblem


@pytest.fixture(autouse=True)
def _unset(monkeypatch):
    for name in ("FLASHCORE_CACHE_DIR", "FLASHCORE_CACHE", "FLASHCORE_KEEP_SOURCES", "FLASHCORE_CHECK_LENGTHS",
                 "XDG_CACHE_HOME"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)


def test_defaults(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert env.cache_dir() == Path("/home/someone/.cache/flashcore")
    assert env.cache_enabled()
    assert not env.keep_sources()
    assert not env.check_lengths()


def test_cache_dir(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert env.cache_dir() == Path("/xdg/flashcore")
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", "~/kernels")
    assert env.cache_dir() == Path("/home/someone/kernels")


def test_a_user_without_a_home(monkeypatch):
    """A container's user id that passwd does not know, and no HOME."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    assert env.cache_dir() == Path(f"/tmp/flashcore-{os.getuid()}")
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", "~/kernels")
    with pytest.raises(EnvironmentProblem, match=r"FLASHCORE_CACHE_DIR='~/kernels'.*absolute path"):
        env.cache_dir()


@pytest.mark.parametrize(
    ("value", "expected"), [("0", False), ("off", False), ("1", True), ("True", True), (" ", True)]
)
def test_cache_switch(monkeypatch, value, expected):
    monkeypatch.setenv("FLASHCORE_CACHE", value)
    assert env.cache_enabled() is expected


def test_keep_sources_switch(monkeypatch):
    monkeypatch.setenv("FLASHCORE_KEEP_SOURCES", "yes")
    assert env.keep_sources()
    assert not env.check_lengths()


def test_check_lengths_switch(monkeypatch):
    monkeypatch.setenv("FLASHCORE_CHECK_LENGTHS", "1")
    assert env.check_lengths()
    assert not env.keep_sources()


def test_nonsense_is_refused(monkeypatch):
    monkeypatch.setenv("FLASHCORE_CACHE", "maybe")
    with pytest.raises(EnvironmentProblem, match=r"FLASHCORE_CACHE='maybe'.*1 or 0"):
        env.cache_enabled()


def test_the_table_has_every_variable_and_no_other():
    sources = "".join(path.read_text() for path in Path(flashcore.__file__).parent.rglob("*.py"))
    table = set(re.findall(r"``(FLASHCORE_[A-Z0-9_]+)``", env.__doc__))
    assert set(re.findall(r"\bFLASHCORE_[A-Z0-9_]+", sources.replace(env.__doc__, ""))) == table


def test_other_modules_do_not_read_variables_themselves():
    read = re.compile(r"(?:environ\[|environ\.get\(|getenv\()\s*.FLASHCORE_")
    readers = [
        path.name for path in Path(flashcore.__file__).parent.rglob("*.py") if read.search(path.read_text())
    ]
    assert readers == ["env.py"]
