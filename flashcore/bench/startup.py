"""Start-up, in processes of their own: cold compilation, and a warm process until its first result."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from flashcore.bench import record
from flashcore.bench.cases import Part
from flashcore.bench.timing import orders

OnCase = Callable[[str], None]  # told the name of each case before it is measured
Measured = tuple[str, list[dict], list[dict]]  # a case's name, its rows, who was left out of it and why
REPEATS = 3

_START = """
import time, torch
q, k, v = (torch.randn(1, 512, 8, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
{attend}
torch.cuda.synchronize()
print(time.time())
"""
_ATTEND = {
    "torch": "",  # what every program that uses torch on a GPU waits for
    "sdpa": "torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)",
    "flashcore": "import flashcore; flashcore.attention(q, k, v, causal=True)",
}


def measure(cases: Sequence[Part], seed: int, on_case: OnCase) -> Iterator[Measured]:
    """Compile seconds per declared kernel, and seconds from the start of a process to its first result."""
    parts = {"compile": _cold_compile, "start": partial(_warm_start, seed=seed)}
    with tempfile.TemporaryDirectory() as cache:
        for case in cases:
            rows, skipped = [], []
            try:
                rows += parts[case.name](cache, on_case)
            except subprocess.CalledProcessError as error:
                reason = error.stderr.strip().splitlines()[-1]
                skipped.append({"impl": "flashcore", "case": case.name, "reason": reason})
            yield case.name, rows, skipped


def _cold_compile(cache: str, on_case: OnCase) -> Iterator[dict]:
    """Every declared kernel into an empty cache, one at a time, in a fresh process."""
    on_case("cold compile")
    for kernel in json.loads(_python(["-m", "flashcore", "compile", "--all", "--jobs", "1", "--json"], cache)):
        yield {"op": "compile", "impl": "flashcore", **kernel}


def _warm_start(cache: str, on_case: OnCase, seed: int) -> Iterator[dict]:
    """Processes that import torch, make tensors and attend once; in turns."""
    seconds: dict[str, list[float]] = {impl: [] for impl in _ATTEND}
    for repeat, order in enumerate(orders(_ATTEND, REPEATS + 1, seed)):
        for impl in order:
            on_case(f"start {impl} {repeat}/{REPEATS}")
            started = time.time()
            seconds[impl].append(float(_python(["-c", _START.format(attend=_ATTEND[impl])], cache)) - started)
    for impl, values in seconds.items():
        kept = values[1:]  # the first round warmed the file system
        yield {"op": "start", "impl": impl, "s_p50": statistics.median(kept), "s_min": min(kept), "s_max": max(kept)}


def _python(arguments: list[str], cache: str) -> str:
    """What a fresh interpreter prints, with its kernel cache in ``cache``."""
    paths = [str(record.PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "FLASHCORE_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
