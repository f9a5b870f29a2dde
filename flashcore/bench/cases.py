"""The shapes that FlashCore is measured on, in named suites."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import accumulate

from flashcore.bench.models import E2E, ModelCase
from flashcore.mask import Mask, Visible

# How far two correct implementations may lie apart, relative to 1 + |value|: about two units in the last place.
APART = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 1e-4, "float64": 1e-10}
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


INPUTS = {
    "normal": "N(0, 1)",
    "outliers": "0.1 % of the elements times 100",
    "large": "queries times 64",
    "negative": "one channel of q is 64 and of k -64, so that every score is very negative, and so is the LSE",
}


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
    inputs: str = "normal"  # of INPUTS
    backward: bool = False  # its gradients are computed, not its output
    label: str = ""  # what a user would call it
    window: tuple[int | None, int | None] | None = None  # (left, right), as `attention` takes it
    softcap: float | None = None
    alibi: bool = False  # with the slopes of check.slopes
    sink: bool = False  # one per head: check.sinks

    def __post_init__(self) -> None:
        if self.softcap and self.alibi:
            raise ValueError("a case has a softcap or ALiBi, not both")

    @classmethod
    def of(cls, row: dict) -> Case:
        """The case that a recorded row is about."""
        columns = {field.name: row[field.name] for field in fields(cls) if field.name in row}
        columns["backward"] = row.get("op") == "attention_bwd"  # the column of that name says whose it was
        if "window" in columns:
            columns["window"] = tuple(columns["window"])
        return cls(**columns)

    @property
    def features(self) -> frozenset[str]:
        """What a peer must have to compute it, beyond causal masks."""
        has = {"window": self.window, "softcap": self.softcap, "alibi": self.alibi, "sink": self.sink}
        return frozenset(name for name, there in has.items() if there)

    @property
    def plain(self) -> Case:
        """The same shape without features."""
        return replace(self, window=None, softcap=None, alibi=False, sink=False)

    @property
    def parts(self) -> tuple[Case, ...]:
        """The dense cases that it is made of."""
        return (self,)

    def split(self, rows, of_keys: bool = False) -> list:
        """What each part has of a tensor with a row for each query, or each key: (batch, seqlen, ...)."""
        return [rows]

    @property
    def visible(self) -> Visible:
        left, right = self.window or (None, None)
        return Mask(left, 0 if self.causal else right).of(self.seqlen_q, self.seqlen_k)

    @property
    def mask(self) -> str:
        """What a query sees and what becomes of its scores, in words; part of the name."""
        words = ["causal" if self.causal else "full"]
        if self.window:
            words = [f"window {self.window[0] + 1 if self.causal else self.window}"]
        words += [f"softcap {self.softcap:g}"] if self.softcap else []
        return ", ".join([*words, *(word for word in ("alibi", "sink") if word in self.features)])

    @property
    def sizes(self) -> str:
        """Of the sequences; part of the name."""
        seqlen = f"s{self.seqlen_q}" if self.seqlen_q == self.seqlen_k else f"s{self.seqlen_q}x{self.seqlen_k}"
        return f"{seqlen}-b{self.batch}"

    @property
    def name(self) -> str:
        heads = f"h{self.heads}" if self.heads == self.kv_heads else f"h{self.heads}:{self.kv_heads}"
        mask = self.mask.replace(", ", "-").replace(" ", "")
        parts = [f"d{self.head_dim}", self.sizes, heads, mask]
        if self.inputs != "normal":
            parts.append(self.inputs)
        if self.backward:
            parts.append("bwd")
        return "-".join([*parts, SHORT[self.dtype]])

    @property
    def rows(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The dimensions of q, and of k and v, before the heads."""
        return (self.batch, self.seqlen_q), (self.batch, self.seqlen_k)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return *self.rows[0], self.heads, self.head_dim

    @property
    def apart(self) -> float:
        """How far two right answers may lie apart."""
        return APART[self.dtype]

    @property
    def flops(self) -> int:
        """Floating-point operations by the usual convention: two matmuls, of which a causal mask needs half; five in
        the backward pass.

        The exact causal count is a little higher, since the diagonal is kept; every published number halves. With a
        window, the pairs of a query and a key that it sees are counted.
        """
        matmuls = 5 if self.backward else 2
        each = 2 * matmuls * self.batch * self.heads * self.head_dim
        if self.window:
            return each * self.visible.pairs()
        full = each * self.seqlen_q * self.seqlen_k
        return full // 2 if self.causal else full

    def tflops(self, ms: float) -> float:
        """TFLOP/s at ``ms`` milliseconds per call."""
        return self.flops / ms * 1e-9

    @property
    def kv_bytes(self) -> int:
        """Of K and V together."""
        return 2 * math.prod(self.rows[1]) * self.kv_heads * self.head_dim * BYTES[self.dtype]

    def speed(self, ms: float) -> dict[str, float]:
        """The recorded columns that say how fast ``ms`` milliseconds per call are.

        With one query per sequence also TB (1e12 bytes) of K and V per second: reading them is all the work.
        """
        decode = {"tbps": self.kv_bytes / ms * 1e-9} if self.seqlen_q == 1 else {}
        return {"tflops": self.tflops(ms)} | decode

    def fields(self) -> dict:
        """The columns that identify this case in a recorded row."""
        return {
            **({"label": self.label} if self.label else {}),
            "dtype": self.dtype,
            "batch": self.batch,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "seqlen_q": self.seqlen_q,
            "seqlen_k": self.seqlen_k,
            "head_dim": self.head_dim,
            "causal": self.causal,
            "inputs": self.inputs,
            **({"window": list(self.window)} if self.window else {}),
            **{name: getattr(self, name) for name in ("softcap", "alibi", "sink") if getattr(self, name)},
        }


def _alone(lengths: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Sequences that see themselves."""
    return tuple((length, length) for length in lengths)


# Drawn once, uniform in the logarithm, from 64 to 16384.
_DRAWN_16K = (135, 7031, 4421, 263, 998, 774, 2373, 389)
_DRAWN_64K = (
    135, 7031, 4421, 263, 998, 774, 2373, 5077, 108, 75, 6590, 705, 4385, 65, 756, 3498, 228, 12095, 9485, 76, 74, 1288,
    5036,
)  # fmt: skip
_TOKENS = tuple((1, keys) for keys in (
    2024, 3914, 5263, 11908, 3873, 10650, 75, 846, 11968, 2339, 9457, 120, 863, 251, 1305, 1543, 69, 213, 301, 10303,
    4469, 155, 5320, 138, 1964, 129, 65, 8030, 204, 211, 14862, 8075,
))  # fmt: skip
# (queries, keys) of each sequence of cases whose sequences are not of one length. Names are in records: what one stands
# for does not change.
LENGTHS: dict[str, tuple[tuple[int, int], ...]] = {
    "log-uniform 16k": _alone(_DRAWN_16K),
    "log-uniform 64k": _alone(_DRAWN_64K),
    "mix 16k": _alone((84, *(150,) * 12, *(300,) * 4, 600, 600, 1100, 3000, 8000)),  # the long ones at the end
    "single tokens": _TOKENS,
    # One call of a server: two prompts, chunks of two longer ones, and requests that are being answered.
    "mixed": ((1500, 1500), (300, 300), (512, 6500), (512, 2560), *_TOKENS),
}  # fmt: skip


@dataclass(frozen=True)
class PackedCase(Case):
    """Sequences one after the other in tensors (total, heads, head_dim), K and V perhaps in shuffled pages.

    `batch` is how many there are; `seqlen_q` and `seqlen_k` are the longest. Floating-point operations are counted for
    the pairs of a query and a key that it sees, of each sequence.
    """

    lengths: str = "equal"  # or one of LENGTHS
    page_size: int | None = None

    @property
    def sequences(self) -> tuple[tuple[int, int], ...]:
        """Queries and keys of each."""
        if self.lengths == "equal":
            return ((self.seqlen_q, self.seqlen_k),) * self.batch
        return LENGTHS[self.lengths]

    @property
    def parts(self) -> tuple[Case, ...]:
        shared = {field.name: getattr(self, field.name) for field in fields(Case)}
        return tuple(
            Case(**shared | {"batch": 1, "seqlen_q": queries, "seqlen_k": keys}) for queries, keys in self.sequences
        )

    def split(self, rows, of_keys: bool = False) -> list:
        lengths = [sequence[of_keys] for sequence in self.sequences]
        return [rows[None, end - length : end] for length, end in zip(lengths, accumulate(lengths), strict=True)]

    @property
    def features(self) -> frozenset[str]:
        return super().features | {"paged" if self.page_size else "packed"}

    @property
    def sizes(self) -> str:
        """Of the sequences and their pages; part of the name."""
        sizes = super().sizes if self.lengths == "equal" else self.lengths.replace(" ", "-")
        return f"{sizes}-page{self.page_size}" if self.page_size else sizes

    @property
    def rows(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        queries, keys = (sum(lengths) for lengths in zip(*self.sequences, strict=True))
        return (queries,), (keys,)

    @property
    def flops(self) -> int:
        pairs = sum(_pairs(one.visible) for one in self.parts)
        return (10 if self.backward else 4) * self.heads * self.head_dim * pairs

    def speed(self, ms: float) -> dict[str, float]:
        """The recorded columns; TB/s of K and V where they lie in pages, each byte once."""
        return {"tflops": self.tflops(ms)} | ({"tbps": self.kv_bytes / ms * 1e-9} if self.page_size else {})

    def fields(self) -> dict:
        """The columns that identify this case in a recorded row."""
        phase = {} if self.page_size else {"phase": "backward" if self.backward else "forward"}
        pages = {"page_size": self.page_size} if self.page_size else {}
        return {**super().fields(), **phase, "lengths": self.lengths, **pages}


@cache  # each counts its rows one by one
def _pairs(visible: Visible) -> int:
    return visible.pairs()


@dataclass(frozen=True)
class GemmCase:
    """One matrix product to measure: (m, k) @ (k, n), or with SwiGLU (m, k) @ (k, 2 n) to (m, n)."""

    group: str  # what the case is an example of
    m: int
    n: int
    k: int
    dtype: str = "bfloat16"
    out_dtype: str = "bfloat16"
    weight: bool = False  # b is the transpose of a linear layer's (n, k) weight, else dense (k, n)
    activation: str | None = None
    inputs: str = "normal"

    @property
    def name(self) -> str:
        dtypes = list(dict.fromkeys((SHORT[self.dtype], SHORT[self.out_dtype])))
        parts = [self.group, f"{self.m}x{self.n}x{self.k}", *dtypes, self.activation]
        return "-".join(filter(None, parts))

    @property
    def columns(self) -> int:
        """Of b."""
        return 2 * self.n if self.activation == "swiglu" else self.n

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.m, self.n

    @property
    def apart(self) -> float:
        """How far two right answers may lie apart: long sums in fp32 by more than fp32's last place."""
        return APART[self.dtype] if self.dtype == self.out_dtype else APART["float16"]

    @property
    def flops(self) -> int:
        return 2 * self.m * self.columns * self.k

    def tflops(self, ms: float) -> float:
        """TFLOP/s at ``ms`` milliseconds per call."""
        return self.flops / ms * 1e-9

    def speed(self, ms: float) -> dict[str, float]:
        """The recorded columns that say how fast ``ms`` milliseconds per call are."""
        return {"tflops": self.tflops(ms)}

    def fields(self) -> dict:
        """The columns that identify this case in a recorded row."""
        return asdict(self)


@dataclass(frozen=True)
class Part:
    """What is measured of start-up, in one go."""

    name: str

    def fields(self) -> dict:
        """The columns that identify this case in a recorded row."""
        return {"op": self.name}


@dataclass(frozen=True)
class ParallelCase:
    """One sequence on two GPUs."""

    shape: Case
    phase: str  # "forward", or "train": forward and backward

    @property
    def name(self) -> str:
        return f"{self.shape.name}-{self.phase}"

    @property
    def flops(self) -> float:
        return self.shape.flops * (3.5 if self.phase == "train" else 1)

    def fields(self) -> dict:
        """The columns that identify this case in a recorded row."""
        return {**self.shape.fields(), "phase": self.phase}


@dataclass(frozen=True)
class Suite:
    """Cases that are measured in one way and recorded in one file."""

    name: str
    about: str
    op: str  # the recorded rows' op; that of cases with gradients is attention_bwd
    # "events", "graph", "host", "accuracy", "e2e", "parallel" or "startup": suites.py runs each, timing.py explains
    mode: str
    cases: tuple[Case, ...] | tuple[GemmCase, ...] | tuple[ModelCase, ...] | tuple[ParallelCase, ...] | tuple[Part, ...]
    peers: tuple[str, ...]  # what is measured when the caller names nothing
    sustained: bool = False  # every implementation at the power cap for seconds, instead of after a rest
    inputs: str = ""  # in words, where they are not those of its operation


def square(batch: int, heads: int, seqlen: int, head_dim: int, causal: bool, dtype: str, **more) -> Case:
    return Case(batch, seqlen, seqlen, heads, more.pop("kv_heads", heads), head_dim, causal, dtype, **more)


def of_lengths(lengths: str, heads: int, kv_heads: int, head_dim: int, causal: bool, **more) -> PackedCase:
    """bf16 sequences of one of `LENGTHS`, or "32 x 512": so many of one length."""
    if lengths in LENGTHS:
        queries, keys = zip(*LENGTHS[lengths], strict=True)
        sizes = len(queries), max(queries), max(keys)
    else:
        batch, seqlen = map(int, lengths.split(" x "))
        sizes, lengths = (batch, seqlen, seqlen), "equal"
    return PackedCase(*sizes, heads, kv_heads, head_dim, causal, lengths=lengths, **more)


# Implementations that are not peers.
OURS = (
    "flashcore", "flashcore-triton", "flashcore-dense", "flashcore-matmul", "reference", "ring", "ulysses", "one-gpu",
)  # fmt: skip
MASKS = (False, True)
FAST_PEERS = ("flashcore", "flashcore-triton", "cudnn", "fa2", "fa3", "fa4", "xformers", "flashinfer", "te")

MATRIX_PEERS = (
    "sdpa", "math", "efficient", "fa2", "cudnn", "flex", "fa3", "fa4", "xformers", "flashinfer", "te",
    "flashcore-triton", "flashcore",
)  # fmt: skip

FORWARD = tuple(
    square(16384 // seqlen, 2048 // head_dim, seqlen, head_dim, causal, "bfloat16")
    for head_dim in (64, 128, 256)
    for causal in MASKS
    for seqlen in (512, 1024, 2048, 4096, 8192, 16384)
)
_GQA_BACKWARD = tuple(
    square(16384 // seqlen, 32, seqlen, 128, True, "bfloat16", kv_heads=8) for seqlen in (2048, 4096, 8192, 16384)
)
BACKWARD = tuple(
    replace(case, backward=True)
    for case in (*FORWARD, *_GQA_BACKWARD, *(replace(case, window=(1023, 0)) for case in _GQA_BACKWARD))
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
# What models and caches have beside powers of 2: grids that fill the SMs unevenly, groups of 5 and 7, lengths that no
# tile divides, rows that see nothing, few queries on many keys.
ODD = (
    square(1, 8, 4096, 248, True, "bfloat16"),
    square(1, 16, 4096, 128, True, "float16"),
    Case(2, 4000, 500, 16, 16, 64, True),
    Case(8, 16, 4096, 32, 8, 128, True),
    square(4, 32, 512, 128, True, "float16"),
    square(3, 10, 1000, 128, False, "bfloat16", kv_heads=2),
    square(3, 5, 3000, 96, False, "bfloat16", kv_heads=1),
    square(2, 14, 5120, 80, False, "bfloat16", kv_heads=2),
    square(16, 12, 197, 64, False, "bfloat16"),
    square(1, 20, 1500, 64, False, "bfloat16"),
    square(2, 24, 4429, 128, False, "bfloat16"),
    Case(2, 128, 16384, 32, 8, 128, False),
)
_CAUSAL = square(2, 16, 8192, 128, True, "bfloat16")
WINDOW = (
    *(
        square(16384 // seqlen, 2048 // head_dim, seqlen, head_dim, True, "bfloat16", window=(keys - 1, 0))
        for head_dim in (64, 128, 256)
        for seqlen in (8192, 16384)
        for keys in (128, 1024, 4096)
    ),
    *(square(1, 2048 // head_dim, 16384, head_dim, True, "bfloat16") for head_dim in (64, 128, 256)),  # the yardsticks
    square(2, 64, 8192, 64, True, "bfloat16", kv_heads=8, window=(127, 0), sink=True, label="gpt-oss, a layer"),
    square(
        2, 16, 8192, 256, True, "bfloat16", kv_heads=8, window=(4095, 0), softcap=50.0, label="Gemma 2 9B, a layer"
    ),
    *(replace(_CAUSAL, **feature) for feature in ({}, {"softcap": 30.0}, {"alibi": True}, {"sink": True})),
)
DECODE = tuple(
    Case(batch, 1, seqlen, heads, kv_heads, head_dim, False)
    for batch, seqlen, heads, kv_heads, head_dim in (
        (8, 8192, 32, 8, 128),
        (1, 131072, 32, 8, 128),
        (64, 2048, 32, 32, 128),
        (16, 4096, 32, 8, 64),
        (1, 8192, 32, 8, 128),
        (128, 1024, 32, 8, 128),
    )
)


_SHAPES = tuple((2048 // head_dim, 2048 // head_dim, head_dim) for head_dim in (64, 128, 256))
VARLEN = (
    *(
        of_lengths(lengths, *shape, True)
        for shape in _SHAPES
        for lengths in ("log-uniform 16k", "log-uniform 64k", "mix 16k", "32 x 512", "8 x 2048", "8 x 8192")
    ),
    *(of_lengths(lengths, *shape, False) for shape in _SHAPES for lengths in ("log-uniform 64k", "8 x 2048")),
    *(
        of_lengths(lengths, *shape, True, backward=True)
        for shape in _SHAPES
        for lengths in ("log-uniform 64k", "8 x 2048")
    ),
    *(of_lengths(lengths, 16, 16, 128, True, backward=True) for lengths in ("mix 16k", "32 x 512")),
    of_lengths("log-uniform 64k", 16, 16, 128, False, backward=True),
)
PAGED = (
    *(
        PackedCase(**asdict(case) | {"seqlen_q": queries, "causal": True}, page_size=page_size)
        for case in DECODE
        for queries, page_size in ((1, 16), (1, 64), (1, 256), (4, 64), (16, 64))
    ),
    of_lengths("single tokens", 32, 8, 128, True, page_size=64),
    *(of_lengths("mixed", 32, 8, 128, True, page_size=page_size) for page_size in (16, 64, 256)),
    of_lengths("mixed", 32, 8, 64, True, page_size=64),
)
MATRIX = (
    Case(1, 512, 512, 8, 8, 64, False, "float16", label="one short sequence"),
    Case(16, 512, 512, 12, 12, 64, False, label="BERT-base, batch 16"),
    Case(1, 4608, 4608, 24, 24, 128, False, label="FLUX.1, an image of 1024 x 1024"),
    Case(1, 4096, 4096, 32, 8, 128, True, label="Llama 3 8B, prompt of 4096"),
    Case(8, 1, 8192, 32, 8, 128, False, label="Llama 3 8B, decoding a batch of 8 at 8192"),
)
FLOAT32 = (
    *(
        square(16384 // seqlen, 2048 // head_dim, seqlen, head_dim, causal, "float32")
        for head_dim in (64, 128)
        for causal in MASKS
        for seqlen in (512, 2048, 8192)
    ),
    *(Case(8, seqlen_q, 8192, 32, 8, 128, False, "float32") for seqlen_q in (1, 4, 16)),  # few rows for each key head
)
HOSTCALL = tuple(square(1, 8, 128, head_dim, False, "bfloat16") for head_dim in (64, 128))
ACCURACY = tuple(
    square(1, 8, 2048, head_dim, causal, dtype, inputs=inputs)
    for head_dim in (64, 96, 128, 192, 256)
    for causal in MASKS
    for dtype in ("bfloat16", "float16")
    for inputs in ("normal", "outliers")
)
# Where implementations go wrong: lengths at tile edges, rows without a key, scores far from 0.
ADVERSARIAL = (
    *(square(1, 8, seqlen, 128, causal, "bfloat16") for seqlen in (1, 63, 64, 65, 127, 129) for causal in MASKS),
    *(Case(1, 321, 65, 8, 8, head_dim, True) for head_dim in (64, 128, 256)),
    *(
        square(1, 8, 513, head_dim, True, dtype, inputs=inputs)
        for inputs in ("large", "negative")
        for head_dim in (64, 128, 256)
        for dtype in ("bfloat16", "float16")
    ),
)
QUICK = (
    square(2, 8, 256, 64, False, "bfloat16"),
    square(2, 8, 256, 64, True, "bfloat16"),
    square(1, 8, 512, 128, True, "bfloat16"),
    square(1, 8, 256, 64, True, "bfloat16", kv_heads=2),
)

_HALVES = ("bfloat16", "float16")
_MLP = {"llama2-7b": (4096, 11008), "llama3-8b": (4096, 14336), "llama3-70b": (8192, 28672)}  # hidden, intermediate
GEMM = (
    *(
        GemmCase("large", m, n, k, dtype, out_dtype)
        for m, n, k in ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 16384, 4096))
        for dtype in _HALVES
        for out_dtype in (dtype, "float32")
    ),
    GemmCase("long", 8192, 8192, 237568, "float16", "float32"),
    *(
        GemmCase(f"{model}-{layer}", tokens, n, k, weight=True)
        for model, (hidden, inner) in _MLP.items()
        for layer, n, k in (("up", inner, hidden), ("down", hidden, inner))
        for tokens in (16, 128, 1024, 4096, 16384)
    ),
    *(
        GemmCase(model, tokens, inner, hidden, weight=True, activation="swiglu")
        for model, (hidden, inner) in _MLP.items()
        for tokens in (1024, 4096, 16384)
    ),
)

PARALLEL = tuple(
    ParallelCase(Case(1, seqlen, seqlen, 32, 8, 128, True), phase)
    for seqlen in (16384, 65536, 131072)
    for phase in ("forward", "train")
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
        Suite(
            "backward",
            "the shapes of forward, grouped heads and windows of 1024 keys; the backward pass alone, random dO",
            "attention_bwd",
            "events",
            BACKWARD,
            ("flashcore", "flashcore-triton", "cudnn", "fa2", "fa3", "fa4", "te"),
        ),
        Suite("small", "fp16 latency, CUDA-graph replay, L2 warm", "attention_fwd", "graph", SMALL, FAST_PEERS),
        Suite("long", "bf16, causal, 64K and 128K tokens", "attention_fwd", "events", LONG, FAST_PEERS),
        Suite(
            "sustained", "bf16, S = 8192, after seconds at the power cap", "attention_fwd", "events",
            tuple(case for case in FORWARD if case.seqlen_q == 8192), FAST_PEERS, sustained=True,
        ),
        Suite("gqa", "bf16, grouped query heads", "attention_fwd", "events", GQA, FAST_PEERS),
        Suite(
            "odd", "shapes that fit no tile or grid, CUDA-graph replay, L2 as it is", "attention_fwd", "graph", ODD,
            FAST_PEERS,
        ),
        Suite(
            "window",
            "bf16, 16,384 tokens: causal windows, softcap, ALiBi, sinks",
            "attention_fwd",
            "events",
            WINDOW,
            ("flashcore", "flashcore-triton", "cudnn", "fa2", "fa3", "fa3-varlen", "fa4", "flex"),
        ),
        Suite(
            "float32",
            "float32: 16,384 tokens, and few queries on top of a cache",
            "attention_fwd",
            "events",
            FLOAT32,
            ("flashcore", "flashcore-triton", "efficient", "math"),
        ),
        Suite(
            "decode",
            "bf16, one query per sequence on top of a cache, K and V from memory",
            "attention_decode",
            "graph",
            DECODE,
            ("flashcore", "flashcore-triton", "cudnn", "fa2", "fa3", "fa4", "flashinfer"),
        ),
        Suite(
            "varlen",
            "bf16, packed sequences, heads x head_dim = 2048; forward, and the backward pass alone",
            "attention_fwd",
            "events",
            VARLEN,
            ("flashcore", "flashcore-triton", "flashcore-dense", "fa2-varlen", "fa3-varlen"),
            inputs="random N(0, 1), the output's gradient too, (total, heads, head_dim)",
        ),
        Suite(
            "paged",
            "bf16, K and V in shuffled pages, from memory; causal, few queries on top of a cache, and mixed batches",
            "attention_decode",
            "graph",
            PAGED,
            ("flashcore", "flashcore-triton", "flashcore-dense", "fa3-varlen"),
            inputs="random N(0, 1), q (total, heads, head_dim), K and V in shuffled pages, in turn from copies that L2 "
            "cannot hold",
        ),
        Suite(
            "matrix",
            "everything that can run it, at five shapes that people ask about",
            "attention_fwd",
            "graph",
            MATRIX,
            MATRIX_PEERS,
        ),
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
            "error against float64, N(0, 1) inputs, outliers, and adversarial cases",
            "accuracy",
            "accuracy",
            ACCURACY + ADVERSARIAL,
            ("flashcore", "flashcore-triton", "cudnn", "fa2", "fa3", "math"),
        ),
        Suite(
            "gemm",
            "matrix products: large ones, the layers of an MLP, fused SwiGLU",
            "gemm",
            "events",
            GEMM,
            ("flashcore-matmul", "cublas"),
        ),
        Suite("e2e", "whole models, random weights", "e2e", "e2e", E2E, ("flashcore", "cudnn", "fa2", "eager")),
        Suite(
            "parallel", "one sequence on two GPUs, bf16, causal", "parallel", "parallel", PARALLEL,
            ("ring", "ulysses", "one-gpu", "context-parallel"),
        ),
        Suite(
            "startup", "cold compile, and start to first result of a warm process", "startup", "startup",
            (Part("compile"), Part("start")), (),
        ),
    )
}
