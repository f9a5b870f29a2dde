"""``import flashcore`` is light, and its names come when they are asked for."""

import json
import subprocess
import sys

import pytest

import flashcore


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


def test_importing_the_api_does_not_shadow_a_function():
    code = "import flashcore.api, flashcore.plan; print(flashcore.attention.__name__, flashcore.explain.__name__)"
    assert run_python(code).strip() == "attention explain"


def test_unknown_name():
    with pytest.raises(AttributeError, match=r"flashcore.*no attribute 'atention'"):
        _ = flashcore.atention
