"""The shapes that FlashCore is measured on, in named suites."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One attention problem to measure; tensors are (batch, seqlen, heads, head_dim)."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    dtype: str = "bfloat16"
    inputs: str = "normal"  # N(0, 1), or "outliers": 0.1 % of the elements times 100

    @property
    def name(self) -> str:
        heads = f"h{self.heads}" if self.heads == self.kv_heads else f"h{self.heads}:{self.kv_heads}"
        seqlen = f"s{self.seqlen_q}" if self.seqlen_q == self.seqlen_k else f"s{self.seqlen_q}x{self.seqlen_k}"
        parts = [f"d{self.head_dim}", seqlen, f"b{self.batch}", heads, "causal" if self.causal else "full"]
        if self.inputs != "normal":
            parts.append(self.inputs)
        return "-".join([*parts, {"bfloat16": "bf16", "float16": "fp16"}.get(self.dtype, self.dtype)])

    @property
    def flops(self) -> int:
        """Floating-point operations by the usual convention: two matmuls, of which a causal mask needs half.

        The exact causal count is a little higher, since the diagonal is kept; every published number halves.
        """
        full = 4 * self.batch * self.heads * self.seqlen_q * self.seqlen_k * self.head_dim
        return full // 2 if self.causal else full

    def tflops(self, ms: float) -> float:
        """TFLOP/s at ``ms`` milliseconds per call."""
        return self.flops / ms * 1e-9

    def fields(self) -> dict:
        """The columns that identify this case in a recorded row."""
        return {
            "dtype": self.dtype,
            "batch": self.batch,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "seqlen_q": self.seqlen_q,
            "seqlen_k": self.seqlen_k,
            "head_dim": self.head_dim,
            "causal": self.causal,
            "inputs": self.inputs,
        }


@dataclass(frozen=True)
class Suite:
    """Cases that are measured in one way and recorded in one file."""

    name: str
    about: str
    op: str  # the recorded rows' op
    mode: str  # "events", "graph", "host", "accuracy" or "startup"; suites.py runs each, timing.py explains them
    cases: tuple[Case, ...]
    peers: tuple[str, ...]  # what is measured when the caller names nothing


def square(batch: int, heads: int, seqlen: int, head_dim: int, causal: bool, dtype: str, **more) -> Case:
    return Case(batch, seqlen, seqlen, heads, more.pop("kv_heads", heads), head_dim, causal, dtype, **more)


OURS = ("flashcore", "flashcore-triton", "reference")  # implementations that are not peers
MASKS = (False, True)
FAST_PEERS = ("flashcore", "flashcore-triton", "cudnn", "fa2", "fa3", "fa4", "xformers", "flashinfer", "te")

FORWARD = tuple(
    square(16384 // seqlen, 2048 // head_dim, seqlen, head_dim, causal, "bfloat16")
    for head_dim in (64, 128, 256)
    for causal in MASKS
    for seqlen in (512, 1024, 2048, 4096, 8192, 16384)
)
SMALL = tuple(
    square(batch, heads, seqlen, head_dim, causal, "float16")
    for batch, heads, seqlen, head_dim in (
        (1, 8, 512, 64),
        (8, 16, 512, 64),
        (4, 32, 512, 128),
        (1, 32, 1024, 128),
        (16, 16, 2048, 64),
        (1, 16, 4096, 128),
        (1, 8, 8192, 64),
    )
    for causal in MASKS
)
LONG = tuple(square(1, 8, seqlen, 128, True, "bfloat16") for seqlen in (65536, 131072))
GQA = tuple(
    square(batch, heads, seqlen, head_dim, causal, "bfloat16", kv_heads=kv_heads)
    for batch, heads, kv_heads, seqlen, head_dim, masks in (
        (4, 32, 8, 2048, 128, MASKS),
        (1, 32, 8, 8192, 128, MASKS),
        (4, 64, 8, 2048, 128, (True,)),
        (2, 32, 4, 4096, 64, (True,)),
    )
    for causal in masks
)
HOSTCALL = tuple(square(1, 8, 128, head_dim, False, "bfloat16") for head_dim in (64, 128))
ACCURACY = tuple(
    square(1, 8, 2048, head_dim, causal, dtype, inputs=inputs)
    for head_dim in (64, 96, 128, 192, 256)
    for causal in MASKS
    for dtype in ("bfloat16", "float16")
    for inputs in ("normal", "outliers")
)
QUICK = (
    square(2, 8, 256, 64, False, "bfloat16"),
    square(2, 8, 256, 64, True, "bfloat16"),
    square(1, 8, 512, 128, True, "bfloat16"),
    square(1, 8, 256, 64, True, "bfloat16", kv_heads=2),
)

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "quick",
            "a few small shapes, on any machine",
            "attention_fwd",
            "events",
            QUICK,
            ("flashcore", "flashcore-triton", "cudnn", "fa2", "math", "sdpa", "reference"),
        ),
        Suite(
            "forward",
            "bf16, 16,384 tokens, heads x head_dim = 2048",
            "attention_fwd",
            "events",
            FORWARD,
            FAST_PEERS,
        ),
        Suite("small", "fp16 latency, CUDA-graph replay, L2 warm", "attention_fwd", "graph", SMALL, FAST_PEERS),
        Suite("long", "bf16, causal, 64K and 128K tokens", "attention_fwd", "events", LONG, FAST_PEERS),
        Suite("gqa", "bf16, grouped query heads", "attention_fwd", "events", GQA, FAST_PEERS),
        Suite(
            "hostcall",
            "host time per eager call without gradients",
            "attention_fwd_host",
            "host",
            HOSTCALL,
            ("flashcore", "flashcore-triton", "cudnn", "fa2", "sdpa", "fa3", "fa4"),
        ),
        Suite(
            "accuracy",
            "error against float64, N(0, 1) inputs and inputs with outliers",
            "accuracy",
            "accuracy",
            ACCURACY,
            ("flashcore", "flashcore-triton", "cudnn", "fa2", "fa3", "math"),
        ),
        Suite("startup", "cold compile, and start to first result of a warm process", "startup", "startup", (), ()),
    )
}
