"""FlashCore as an attention backend of vLLM: ``vllm serve ... --attention-backend FLASHCORE``.

Installed beside vLLM, FlashCore is found by vLLM's plug-in mechanism, which calls :func:`register` in every process. It
adds a name and no more: vLLM never chooses the backend by itself. ``VLLM_PLUGINS=flashcore`` allows this plug-in alone.

It serves decoders in bfloat16, float16 and float32 with head sizes up to 256 and pages of any multiple of 16 tokens:
prompts, chunks of prompts, single and speculated tokens in one call, grouped heads, sliding windows, softcap, ALiBi,
sinks. The graphs that vLLM captures may be of any batch. By what the backend says of itself vLLM refuses it for all
else: quantised caches, MLA, encoders, non-causal layers, ranges of images that are seen from both sides, context
parallelism, batch-invariant mode, GPUs on which FlashCore would have no kernel.

A cache's layout is vLLM's own. Its kernels write new keys and values; FlashCore reads the pages where they are, and its
output is copied into vLLM's buffer. vLLM promises no stable interface: this is written for 0.32 and 0.33, and tested in
the engine of 0.32 on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from flashcore import api
from flashcore import plan as planning
from flashcore.backends import ATTENTION
from flashcore.errors import UnsupportedError
from flashcore.problem import AttentionProblem
from flashcore.score import alibi, chained, softcap
from flashcore.sequences import Packed, Paged

__all__ = ["NAME", "register"]

NAME = "FLASHCORE"

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def register() -> None:
    """Tell vLLM the name ``"FLASHCORE"``. Its entry point ``vllm.general_plugins``; call it as often as you like."""
    if NAME not in AttentionBackendEnum.__members__:
        register_backend(NAME, f"{__name__}.{FlashCoreBackend.__qualname__}")


class FlashCoreBackend(AttentionBackend):
    """What vLLM asks before it builds a layer. What is not said here is vLLM's default, which refuses it."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", *_DTYPES]

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type[FlashCoreImpl]:
        return FlashCoreImpl

    @staticmethod
    def get_builder_cls() -> type[FlashCoreBuilder]:
        return FlashCoreBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return _has_a_kernel(_plan(head_size))

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_compute_capability(cls, capability) -> bool:
        return _has_a_kernel(_plan(arch=tuple(capability)))

    @classmethod
    def supports_combination(
        cls, head_size, dtype, kv_cache_dtype, block_size, use_mla, has_sink, use_sparse, use_mm_prefix,
        device_capability,
    ) -> str | None:  # fmt: skip
        if _DTYPES.get(kv_cache_dtype, dtype) != dtype:
            return f"a cache in {kv_cache_dtype} of a model in {str(dtype).removeprefix('torch.')}"
        if torch.cuda.is_available() and not _has_a_kernel(plan := _plan(head_size, anywhere=False)):
            return "FlashCore has no kernel here: " + "; ".join(": ".join(reason) for reason in plan.rejected)
        return None


@dataclass
class FlashCoreMetadata(AttentionMetadata):
    """Where the tokens of a batch and their keys lie. The tensors are vLLM's, and stay on the device."""

    queries: Packed
    keys: Paged


class FlashCoreBuilder(AttentionMetadataBuilder[FlashCoreMetadata]):
    """Makes them of what vLLM says about a batch, once for all layers of a group. Nothing is read back.

    A captured graph holds the bounds of its capture, which vLLM makes as large as any batch that replays it: kernels
    read lengths, offsets and tables anew.
    """

    supports_update_block_table = True

    def __init__(self, kv_cache_spec, layer_names: list[str], vllm_config, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        """All batches, where there is a kernel: the reference asks the device for lengths."""
        there = torch.cuda.is_available() and _has_a_kernel(_plan(kv_cache_spec.head_size, anywhere=False))
        return AttentionCGSupport.ALWAYS if there else AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FlashCoreMetadata:
        batch = common_attn_metadata
        if batch.causal is not True:
            kind = "requests that differ in causality" if isinstance(batch.causal, torch.Tensor) else "causal=False"
            raise UnsupportedError(
                f"{NAME}: {kind} (supported: causal attention). Use another --attention-backend for this model."
            )
        queries = Packed(batch.query_start_loc, _bound(batch.max_query_len))
        return FlashCoreMetadata(queries, Paged(batch.block_table_tensor, batch.seq_lens, _bound(batch.max_seq_len)))

    def update_block_table(
        self, metadata: FlashCoreMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> FlashCoreMetadata:
        return replace(metadata, keys=Paged(blk_table, metadata.keys.lengths, metadata.keys.longest))


class FlashCoreImpl(AttentionImpl[FlashCoreMetadata]):
    """The attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """As vLLM calls it. Sinks are (num_heads,), and may be filled later.

        :raises UnsupportedError: what :class:`FlashCoreBackend` does not say that it supports.
        """
        if attn_type != AttentionType.DECODER or kv_cache_dtype not in FlashCoreBackend.supported_kv_cache_dtypes:
            supported = ", ".join(FlashCoreBackend.supported_kv_cache_dtypes)
            raise UnsupportedError(
                f"{NAME}: attention type {AttentionType(attn_type).value} with a cache in {kv_cache_dtype} (supported: "
                f"decoder, with {supported}). Use another --attention-backend."
            )
        self.num_heads, self.num_kv_heads = num_heads, num_heads if num_kv_heads is None else num_kv_heads
        self.head_size, self.scale = head_size, float(scale)
        self.kv_cache_dtype, self.attn_type = kv_cache_dtype, attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        self._window = None if sliding_window is None else (sliding_window - 1, 0)
        self._cap = softcap(logits_soft_cap) if logits_soft_cap else None
        self._slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self._score = self._cap if self._slopes is None else chained(self._cap, alibi(self._slopes))

    def forward(
        self,
        layer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FlashCoreMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Fill `output` (tokens, num_heads, head_size) with the attention of `query`, which is shaped like it.

        Rows behind the last request's, which fill a graph up, become 0. `key` and `value` are in the cache already.
        """
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError(f"{NAME}: a quantised output. Turn the fusion of attention and quantisation off.")
        if attn_metadata is None:  # vLLM looks how much memory the model needs
            return output.fill_(0)
        k_cache, v_cache = self._split(kv_cache)
        out = api.attention(
            query, k_cache, v_cache, causal=True, window=self._window, scale=self.scale,
            score=self._score_on(query.device), sink=self._sink(query.dtype), queries=attn_metadata.queries,
            keys=attn_metadata.keys,
        )  # fmt: skip
        return output.copy_(out)

    def do_kv_cache_update(
        self,
        layer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write `key` and `value` (tokens, num_kv_heads, head_size) to their slots, of which those below 0 are none.

        There may be more tokens than slots: the others fill a graph up.
        """
        k_cache, v_cache = self._split(kv_cache)
        if kv_cache.is_cuda:
            from vllm._custom_ops import reshape_and_cache_flash

            scales = layer._k_scale, layer._v_scale
            reshape_and_cache_flash(key, value, k_cache, v_cache, slot_mapping, self.kv_cache_dtype, *scales)
            return
        there = slot_mapping >= 0
        slots, page_size = slot_mapping[there], k_cache.shape[1]
        for cached, new in ((k_cache, key), (v_cache, value)):
            cached[slots // page_size, slots % page_size] = new[: len(there)][there]

    def _split(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, (pages, page_size, num_kv_heads, head_size), of a row that holds both."""
        k_cache, v_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        return k_cache, v_cache

    def _score_on(self, device: torch.device):
        """What becomes of a score: the softcap, then what ALiBi subtracts."""
        if self._slopes is not None and self._slopes.device != device:
            self._slopes = self._slopes.to(device)  # once: vLLM runs each kind of batch before it captures one
            self._score = chained(self._cap, alibi(self._slopes))
        return self._score

    def _sink(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The sinks, in a dtype that they may have beside the queries."""
        return self.sinks if self.sinks is None or self.sinks.dtype in (torch.float32, dtype) else self.sinks.float()


@cache
def _plan(head_size: int = 128, arch: tuple[int, int] = (9, 0), anywhere: bool = True) -> planning.Plan:
    """Who reads pages on such a GPU: with all that kernels need there, or with what is here."""
    numbers = torch.zeros(1, 2, dtype=torch.int32, device="cpu")
    problem = AttentionProblem.hypothetical(
        (1, 1, head_size), (1, 16, 1, head_size), arch=arch, queries=Packed(numbers[0], 1),
        keys=Paged(numbers, numbers[0, :1], 1),
    )  # fmt: skip
    return planning.plan(problem, anywhere=anywhere)


def _has_a_kernel(plan: planning.Plan) -> bool:
    """Or it is the reference, one sequence after the other."""
    return not ATTENTION.load(plan.backend).NATIVE_GRAD


def _bound(longest: int) -> int:
    """At most an eighth more, so that batches of almost one length are planned alike."""
    step = 1 << max(0, longest.bit_length() - 4)
    return -(-longest // step) * step
