"""The decoding kernel's variants: what a variant is, which problems it serves, and in clusters of which size.

Pure arithmetic, as configs.py is: needs neither torch nor CUDA.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from flashcore.backends.hopper.configs import ELEMENTS
from flashcore.problem import AttentionProblem
from flashcore.score import PLAIN, Score

MAX_ROWS = 8  # queries x heads of a group
MAX_HEAD_DIM = 128
CLUSTERS = (1, 2, 4, 8, 16)

_BLOCK_N = 16  # keys that a warp takes at a time
# What a CTA does besides its keys, and what a cluster of 16 takes to find its place, in blocks of keys (docs/log/0018).
_OVERHEAD = 2
_OVERHEAD_OF_16 = 2


@dataclass(frozen=True)
class DecodeConfig:
    """One variant of ``device/attention/decode_sm90.cuh``, and the clusters it is launched in."""

    dtype: str  # "bfloat16" | "float16"
    head_dim: int  # the problem's own
    head_dim_v: int
    cluster: int = 1  # CTAs that share the keys of a head; the launch's business, not the kernel's
    score: Score = PLAIN  # what becomes of scores; without shapes
    packed: bool = False  # sequences of any lengths in one tensor, which the kernel learns when it runs
    page: int = 0  # their keys are in pages: 1: a page for each key; 16: pages hold whole blocks of 16; 0: they are not
    why: str = field(default="", compare=False)

    source: ClassVar[str] = "attention/decode_sm90.cuh"
    entry: ClassVar[str] = "attention_decode_sm90"
    # Clusters of more than 8; and the hardware may place the CTAs of a cluster where SMs have least to do.
    attributes: ClassVar[Mapping[str, int]] = {
        "NON_PORTABLE_CLUSTER_SIZE_ALLOWED": 1,
        "CLUSTER_SCHEDULING_POLICY_PREFERENCE": 2,
    }
    warps: ClassVar[int] = 8
    _constants: ClassVar[tuple[str, ...]] = (
        "head_dim", "head_dim_v", "packed", "page", "warps", "threads", "smem_bytes",
    )  # fmt: skip

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def smem_bytes(self) -> int:
        """``sizeof(DecodeSmem<Config>)``, which the kernel asserts."""
        q = -(-self.head_dim // 32) * 32 * 16
        of_a_row = 2 + self.warps * (self.head_dim_v + 4) + 2 * (self.warps + 1)
        return q + 4 * MAX_ROWS * of_a_row

    @property
    def variant(self) -> DecodeConfig:
        """What is compiled: the same for all sizes of clusters."""
        return replace(self, cluster=1)

    def constants(self) -> dict[str, int | bool]:
        """Name and value of every constant of the device-side ``struct Config``."""
        return {name: getattr(self, name) for name in self._constants}

    @property
    def element(self) -> str:
        """The device-side element type."""
        return ELEMENTS[self.dtype]

    def __str__(self) -> str:
        shared = "" if self.cluster == 1 else f", its keys shared out among {self.cluster} CTAs"
        head_dims = str(self.head_dim) + (f"/{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        score = f", {self.score}" if self.score != PLAIN else ""
        score += ", packed" if self.packed else ""
        score += {0: "", 1: ", a page for each key", _BLOCK_N: ", keys in pages"}[self.page]
        return f"{self.dtype} head_dim {head_dims}{score}: up to {MAX_ROWS} rows of a key head packed{shared}"


def choose_decode(problem: AttentionProblem) -> DecodeConfig | None:
    """The config for a problem that the backend accepts; None where it is not for this kernel."""
    rows = problem.seqlen_q * problem.group_size
    if rows > MAX_ROWS or max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
        return None
    why = f"{rows} rows for each key head: time is what reading the keys takes"
    head_dims = problem.head_dim, problem.head_dim_v
    page = 0 if not problem.paged else 1 if problem.keys.page_size == 1 else _BLOCK_N
    return DecodeConfig(
        problem.dtype, *head_dims, choose_cluster(problem), problem.kernel_score, problem.packed, page, why
    )


def choose_cluster(problem: AttentionProblem) -> int:
    """The size of clusters with which the busiest SM is done first."""
    # A CTA that has an SM for itself reads as fast as two together, unless its heads are short and it asks for little.
    slots = problem.sm_count * (2 if problem.head_dim <= 64 else 1)
    begin, end = problem.visible.kv_range(0, problem.seqlen_q)
    blocks = -(-end // _BLOCK_N) - begin // _BLOCK_N

    def time(cluster: int) -> int:
        ctas = problem.batch * problem.heads_k * cluster
        of_a_warp = -(-blocks // (cluster * DecodeConfig.warps))
        return -(-ctas // slots) * (of_a_warp + _OVERHEAD + (_OVERHEAD_OF_16 if cluster == 16 else 0))

    return min(CLUSTERS, key=time)


def declared_configs(head_dims: Iterable[int] = (64, 96, 128)) -> list[tuple[str, DecodeConfig]]:
    """The variants for these head_dims, with a name. Those of other ones are compiled when they are met."""
    return [
        (f"decode-{head_dim}-{dtype}", DecodeConfig(dtype, head_dim, head_dim))
        for head_dim, dtype in itertools.product(head_dims, ELEMENTS)
        if head_dim <= MAX_HEAD_DIM
    ]
