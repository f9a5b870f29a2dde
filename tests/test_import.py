"""``import flashcore`` is light, and its names come when they are asked for."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flashcore

ROOT = Path(flashcore.__file__).parents[1]


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_is_light():
    loaded = json.loads(run_python("import flashcore, json, sys; print(json.dumps(sorted(sys.modules)))"))
    assert "flashcore" in loaded
    assert {"torch", "numpy", "cuda", "triton", "typer", "flashcore.api"}.isdisjoint(loaded)


def test_a_call_imports_nothing_slow_that_it_does_not_need():
    code = """
import sys, torch, flashcore
q = torch.randn(1, 4, 2, 8)
flashcore.attention(q, q, q, backend="sdpa")
print([name for name in ("cuda.core", "cuda.bindings.nvrtc", "triton", "torch._dynamo") if name in sys.modules])
"""
    assert run_python(code).strip() == "[]"


@pytest.mark.parametrize("name", flashcore.__all__)
def test_public_name(name):
    assert getattr(flashcore, name) is not None
    assert name in dir(flashcore)


def test_public_names_in_a_fresh_process():
    assert run_python("import flashcore; print(flashcore.plan.override.__name__)").strip() == "override"
    assert run_python("from flashcore import attention; print(attention.__name__)").strip() == "attention"


DOCUMENTS = [path for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")) if path.exists()]


def written(text: str) -> set[str]:
    """The names under flashcore in a document, as attributes; of what belongs to no public module, nothing."""
    found = set(re.findall(r"\bflashcore((?:\.[a-z]\w*)+)", text))
    return {name[1:] for name in found if name[1:].partition(".")[0] in flashcore.__all__}


@pytest.mark.skipif(not DOCUMENTS, reason="not a clone")
def test_what_documents_name_is_there_after_import_flashcore():
    names = set().union(*(written(path.read_text()) for path in DOCUMENTS))
    assert {"attention", "integrations.sdpa.replace_torch", "compat.flash_attn", "plan.override"} <= names
    for name in ("transformers", "vllm"):
        if importlib.util.find_spec(name) is None:
            names.discard(f"integrations.{name}")
    names |= {"errors.UnsupportedError", "env.cache_dir"}
    deepest_first = sorted(names, key=lambda name: -name.count("."))  # before anything else imports their modules
    run_python("\n".join(["import flashcore", *(f"flashcore.{name}" for name in deepest_first)]))


def test_importing_the_api_does_not_shadow_a_function():
    code = "import flashcore.api, flashcore.plan; print(flashcore.attention.__name__, flashcore.explain.__name__)"
    assert run_python(code).strip() == "attention explain"


def test_unknown_name():
    with pytest.raises(AttributeError, match=r"flashcore.*no attribute 'atention'"):
        _ = flashcore.atention
    with pytest.raises(AttributeError, match=r"flashcore.integrations.*no attribute 'nobody'"):
        _ = flashcore.integrations.nobody
