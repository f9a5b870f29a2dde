"""The scripts of examples/ run as they are, and print what they promise."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import flashcore

FOLDER = Path(flashcore.__file__).parents[1] / "examples"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="not a clone")


def close(name: str, printed: str) -> None:
    (difference,) = re.findall(r"by at most (\S+)", printed)
    assert float(difference) < (5e-2 if torch.cuda.is_available() else 1e-5), name


def learns(name: str, printed: str) -> None:
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", printed)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 3 > 1 > losses[-1]


CHECKS = {
    "decode": close,
    "paged_cache": close,
    "replace_sdpa": close,
    "swiglu_mlp": close,
    "train": learns,
    "train_packed": learns,
    "transformers_model": close,
}


def test_every_example_is_run():
    assert set(CHECKS) | {"train_distributed"} == {path.stem for path in FOLDER.glob("*.py")}


@pytest.mark.parametrize("name", CHECKS)
def test_example(name, monkeypatch, capsys):
    if name == "transformers_model":
        pytest.importorskip("transformers")
    path = FOLDER / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path)])
    before = F.scaled_dot_product_attention
    runpy.run_path(str(path), run_name="__main__")
    CHECKS[name](name, capsys.readouterr().out)
    assert F.scaled_dot_product_attention is before


@pytest.mark.parametrize("name", CHECKS)
def test_example_calls_flashcore(name, monkeypatch):
    """The comparisons above compare something."""
    if name == "transformers_model":
        pytest.importorskip("transformers")
    called = []

    def refuse(*args, **kwargs):
        called.append(args)
        raise RuntimeError("stop")

    monkeypatch.setattr("flashcore.api.attention", refuse)
    monkeypatch.setattr("flashcore.gemm.matmul", refuse)
    monkeypatch.setitem(vars(flashcore), "attention", refuse)
    monkeypatch.setitem(vars(flashcore), "matmul", refuse)
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(RuntimeError, match="stop"):
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert len(called) == 1


def test_two_processes():
    """They start each other, so the example is a program of its own here."""
    path = FOLDER / "train_distributed.py"
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(re.findall("loss", done.stdout)) == 4
    learns("train_distributed", done.stdout)


def test_a_process_started_by_torchrun_calls_flashcore(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise RuntimeError("stop")

    monkeypatch.setattr("flashcore.distributed.attention", refuse)
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(RuntimeError, match="stop"):
        runpy.run_path(str(FOLDER / "train_distributed.py"), run_name="__main__")
