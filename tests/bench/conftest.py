"""A record as a GPU would make it, out of numbers that the tests know."""

from __future__ import annotations

import pytest

from flashcore.bench.cases import SUITES
from flashcore.bench.shapes import load_anchors


@pytest.fixture
def anchors():
    return load_anchors("h200")


@pytest.fixture
def forward_record():
    """FlashCore runs at 600 TFLOP/s everywhere, cuDNN at 500, FA2 at 400."""
    rows = [
        {
            "op": "attention_fwd",
            "impl": impl,
            **case.fields(),
            "rel_err": 2.2e-3,
            "max_abs_err": 1e-2,
            **{f"ms_{p}": case.flops / tflops * 1e-9 for p in ("p50", "p10", "p90")},
            "std_pct": 0.7,
            "samples": 100,
            "tflops": float(tflops),
        }
        for case in SUITES["forward"].cases
        for impl, tflops in (("flashcore", 600), ("cudnn", 500), ("fa2", 400))
    ]
    meta = {
        "flashcore": "0.1.0",
        "gpu": "NVIDIA H200",
        "driver": "580.0",
        "power_limit_w": 700,
        "torch": "2.11.0+cu130",
        "cuda": "13.0",
        "cudnn": "9.19.0",
        "nvrtc": "13.0",
        "cuda_core": "1.2.0",
        "commit": "0123456789abcdef",
        "dirty": False,
        "kernel_digest": "f" * 64,
        "date": "2030-01-02T03:04:05+00:00",
        "method": {"mode": "events", "about": "as the tests like it"},
    }
    return {"suite": "forward", "meta": meta, "rows": rows, "skipped": [{"impl": "fa4", "reason": "not installed"}]}
