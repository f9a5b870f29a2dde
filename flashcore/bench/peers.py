"""The implementations that can be measured. Each says why it cannot be, on this machine or for this case.

``peer.prepare(case, q, k, v)`` does everything that a user would do once (views, plans, workspaces) and returns a
callable without arguments; inputs are contiguous (batch, seqlen, heads, head_dim), or of packed cases (total, heads,
head_dim): K and V of paged ones, too, for who takes pages puts them there.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from flashcore.bench import check, gemm, packed
from flashcore.bench.cases import Case, GemmCase, PackedCase
from flashcore.bench.machine import version_of

LIBRARIES: dict[str, str] = {}  # shared objects to load by peer name: {"fa3-varlen": "/path/to/fa3.so"}


@dataclass(frozen=True)
class Peer:
    name: str
    about: str
    prepare: Callable[[Case, torch.Tensor, torch.Tensor, torch.Tensor], Callable[[], object]]
    unavailable: Callable[[], str | None] = lambda: None  # why it cannot run on this machine
    rejects: Callable[[Case], str | None] = lambda case: None  # why it cannot run this case
    context: Callable[[], AbstractContextManager] = nullcontext  # active while it is called
    transposed: bool = False  # it returns (batch, heads, seqlen, head_dim)
    operation: str = "attention"  # what it computes; "gemm": it gets (case, a, b); "parallel": parallel.py calls it
    features: frozenset[str] = frozenset()  # of a case's: those that it has
    distribution: str | None = None  # what pip calls it, where its version is not PyTorch's or FlashCore's

    def lacks(self, case: Case | GemmCase) -> str | None:
        """The features of a case that it has not."""
        absent = sorted(getattr(case, "features", frozenset()) - self.features)
        return f"it has no {', no '.join(absent)}" if absent else None

    def result(self, case: Case | GemmCase, returned: object) -> torch.Tensor:
        """What it returned, as (batch, seqlen, heads, head_dim) or (m, n)."""
        out = returned[0] if isinstance(returned, tuple | list) else returned
        if self.transposed:
            return out.transpose(1, 2)
        return out.reshape(case.out_shape)


# --- FlashCore


def _flashcore(backend: str, case: Case, q, k, v):
    import flashcore

    k, v = packed.stored(case, k, v)
    return partial(flashcore.attention, q, k, v, causal=case.causal, backend=backend, **options(case, q.device))


def _flashcore_dense(case: PackedCase, q, k, v):
    """The same sequences as a batch of one length."""
    import flashcore

    q, k, v = (x.unflatten(0, (case.batch, -1)) for x in (q, k, v))
    return partial(flashcore.attention, q, k, v, causal=case.causal)


def _dense_rejects(case: Case) -> str | None:
    if not isinstance(case, PackedCase):
        return "the case is dense: flashcore computes it"
    return None if case.lengths == "equal" else "the sequences are not of one length"


def options(case: Case, device: torch.device) -> dict:
    """The arguments of `attention` beyond `causal`: none for a plain case."""
    import flashcore

    found = packed.places(case, device) if isinstance(case, PackedCase) else {}
    if case.window:
        found["window"] = case.window
    if case.softcap:
        found["score"] = flashcore.softcap(case.softcap)
    if case.alibi:
        found["score"] = flashcore.alibi(check.slopes(case, device))
    if case.sink:
        found["sink"] = check.sinks(case, device)
    return found


def _backend_rejects(name: str, case: Case) -> str | None:
    """The first of a case's features that a backend of FlashCore's does not name."""
    from flashcore import backends

    needed = {{"softcap": "score", "alibi": "score"}.get(feature, feature) for feature in case.features}
    absent = sorted(needed - backends.ATTENTION.load(name).FEATURES)
    return f"{name} has no {', no '.join(absent)} yet" if absent else None


def _backend_unavailable(name: str) -> str | None:
    from flashcore import backends

    if name not in backends.ATTENTION.providers:
        return f"there is no {name} backend yet"
    return backends.ATTENTION.load(name).unavailable()


# --- PyTorch


def _sdpa(case: Case, q, k, v):
    more = {"enable_gqa": True} if case.heads != case.kv_heads else {}
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return partial(F.scaled_dot_product_attention, q, k, v, is_causal=case.causal, **more)


def _sdpa_rejects(case: Case) -> str | None:
    if case.causal and case.seqlen_q != case.seqlen_k:
        return "SDPA aligns a causal mask to the top left"
    return None


def _half_only(case: Case) -> str | None:
    return _sdpa_rejects(case) or (f"{case.dtype} inputs" if case.dtype not in ("float16", "bfloat16") else None)


def _math_rejects(case: Case) -> str | None:
    scores = 4 * case.batch * case.heads * case.seqlen_q * case.seqlen_k
    return _sdpa_rejects(case) or (f"its scores alone take {scores / 2**30:.0f} GiB" if scores > 8 * 2**30 else None)


def _sdpa_kernel(name: str) -> AbstractContextManager:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(getattr(SDPBackend, name))


def _eager(case: Case, q, k, v):
    from transformers.models.llama.modeling_llama import eager_attention_forward

    module = SimpleNamespace(num_key_value_groups=case.heads // case.kv_heads, training=False)
    mask = None
    if case.causal:
        hidden = torch.full((case.seqlen_q, case.seqlen_k), float("-inf"), dtype=q.dtype, device=q.device)
        mask = hidden.triu(case.seqlen_k - case.seqlen_q + 1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return partial(eager_attention_forward, module, q, k, v, mask, scaling=case.head_dim**-0.5)


def _no_transformers() -> str | None:
    return None if importlib.util.find_spec("transformers") else "transformers is not installed"


def _fa2(case: Case, q, k, v):
    """SDPA, whose kernel also knows windows: they are reached by the operator beneath."""
    if not case.window:
        return _sdpa(case, q, k, v)
    left, right = _bounds(case, -1)
    call = partial(
        torch.ops.aten._flash_attention_forward, q, k, v, None, None, case.seqlen_q, case.seqlen_k, 0.0, case.causal,
        False, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return lambda: call()[0].transpose(1, 2)


def _fa2_varlen(case: PackedCase, q, k, v):
    """The operator under torch.nn.attention.varlen, which older versions of PyTorch have, too."""
    offsets = (packed.offsets(case, q.device, of_keys) for of_keys in (False, True))
    operator = torch.ops.aten._flash_attention_forward
    return partial(operator, q, k, v, *offsets, case.seqlen_q, case.seqlen_k, 0.0, case.causal, False)


def _fa2_varlen_rejects(case: Case) -> str | None:
    if not isinstance(case, PackedCase):
        return "the case is dense: fa2 computes it"
    return f"{case.dtype} inputs" if case.dtype not in ("float16", "bfloat16") else None


def _flex(case: Case, q, k, v):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # beyond a few compiled cases dynamo would leave the rest uncompiled
    visible, slopes = case.visible, check.slopes(case, q.device)
    left, right, offset = visible.mask.left, visible.mask.right, visible.offset
    sees = {
        (False, False): None,
        (False, True): lambda b, h, i, j: j <= i + offset + right,
        (True, False): lambda b, h, i, j: j >= i + offset - left,
        (True, True): lambda b, h, i, j: (j <= i + offset + right) & (j >= i + offset - left),
    }[left is not None, right is not None]
    mask = sees and create_block_mask(sees, None, None, case.seqlen_q, case.seqlen_k, device=q.device)
    change = None
    if case.softcap:
        change = lambda score, b, h, i, j: case.softcap * torch.tanh(score / case.softcap)  # noqa: E731
    elif case.alibi:
        change = lambda score, b, h, i, j: score - slopes[h] * (i + offset - j).abs()  # noqa: E731
    given = {"score_mod": change, "block_mask": mask, "enable_gqa": case.heads != case.kv_heads}
    sinks = check.sinks(case, q.device)[:, None].float() if case.sink else None

    def attend(q, k, v):
        if sinks is None:
            return flex_attention(q, k, v, **given)
        out, lse = flex_attention(q, k, v, return_lse=True, **given)
        return (out * torch.sigmoid(lse - sinks)[..., None]).to(out.dtype)

    return partial(torch.compile(attend, dynamic=False), *(x.transpose(1, 2) for x in (q, k, v)))


# --- other libraries, when they are installed


# Where builds and wheels of FlashAttention-3 put its interface.
_FA3_MODULES = ("flash_attn_interface", "flash_attn_3.flash_attn_interface")


def _fa3(case: Case, q, k, v):
    flash_attn_func = importlib.import_module(next(filter(_is_there, _FA3_MODULES))).flash_attn_func
    more = {"window_size": _bounds(case, -1)} if case.window else {}
    if case.seqlen_q < case.seqlen_k:  # keys split as it sees fit, which its own function for caches does by default
        more |= {"num_splits": 0}
    return partial(flash_attn_func, q, k, v, causal=case.causal, softcap=case.softcap or 0.0, **more)


def _fa4(case: Case, q, k, v):
    from flash_attn.cute.interface import flash_attn_func

    more = {"window_size": _bounds(case, None)} if case.window else {}
    more |= {"softcap": case.softcap} if case.softcap else {}
    more |= {"learnable_sink": check.sinks(case, q.device)} if case.sink else {}
    return partial(flash_attn_func, q, k, v, causal=case.causal, **more)


def _bounds(case: Case, unbounded: int | None) -> tuple:
    """Left and right of the case's mask."""
    mask = case.visible.mask
    return tuple(unbounded if bound is None else bound for bound in (mask.left, mask.right))


def _offsets(batch: int, seqlen: int, device: torch.device) -> torch.Tensor:
    return torch.arange(0, (batch + 1) * seqlen, seqlen, dtype=torch.int32, device=device)


def _fa3_varlen(case: Case, q, k, v):
    """The op of vLLM's build: 37 positional arguments, of which packed and paged forward attention needs these."""
    cu_seqlens_k = used_k = page_table = None
    if isinstance(case, PackedCase):
        k, v = packed.stored(case, k, v)
        cu_seqlens_q = packed.offsets(case, q.device)
        if case.page_size:
            page_table, used_k = packed.table(case, q.device), packed.key_lengths(case, q.device)
        else:
            cu_seqlens_k = packed.offsets(case, q.device, of_keys=True)
    else:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        cu_seqlens_q = _offsets(case.batch, case.seqlen_q, q.device)
        cu_seqlens_k = _offsets(case.batch, case.seqlen_k, q.device)
    new_kv_and_out = [None] * 4  # k_new, v_new, q_v, out
    lengths = [cu_seqlens_q, cu_seqlens_k, None, None, used_k, case.seqlen_q, case.seqlen_k]
    paging_rotary_descale = [page_table, *[None] * 8]  # kv_batch_idx, leftpad_k, 3 of rotary, 3 of descale
    left, right = _bounds(case, -1) if case.window else (-1, -1)
    scale_mask = [case.head_dim**-0.5, case.causal, left, right, case.softcap or 0.0]
    sinks = check.sinks(case, q.device) if case.sink else None
    schedule = [True, None, 0, None, 0]  # rotary_interleaved, scheduler_metadata, num_splits, pack_gqa, sm_margin
    sinks_and_context = [sinks, 1, 0, None]  # s_aux, cp_world_size, cp_rank, cp_tot_seqused_k
    arguments = [*new_kv_and_out, *lengths, *paging_rotary_descale, *scale_mask, *schedule, *sinks_and_context]
    return partial(torch.ops._vllm_fa3_C.fwd, q, k, v, *arguments)


def _fa3_varlen_unavailable() -> str | None:
    path = LIBRARIES.get("fa3-varlen")
    if path is None:
        return "no shared object given (--fa3-so)"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path}: {error}"
    return None


def _xformers(case: Case, q, k, v):
    from xformers.ops import fmha

    bias = fmha.attn_bias.LowerTriangularFromBottomRightMask() if case.causal else None
    return partial(fmha.memory_efficient_attention_forward, q, k, v, attn_bias=bias)


def _xformers_rejects(case: Case) -> str | None:
    return "grouped heads need its five-dimensional layout" if case.heads != case.kv_heads else None


def _flashinfer(case: Case, q, k, v):
    import flashinfer

    workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        _offsets(case.batch, case.seqlen_q, q.device),
        _offsets(case.batch, case.seqlen_k, q.device),
        case.heads,
        case.kv_heads,
        case.head_dim,
        causal=case.causal,
        q_data_type=q.dtype,
    )
    return partial(wrapper.run, *(x.flatten(0, 1) for x in (q, k, v)))


def _te(case: Case, q, k, v):
    from transformer_engine.pytorch import DotProductAttention

    module = DotProductAttention(
        num_attention_heads=case.heads,
        kv_channels=case.head_dim,
        num_gqa_groups=case.kv_heads,
        attention_dropout=0.0,
        qkv_format="bshd",
        attn_mask_type="causal_bottom_right" if case.causal else "no_mask",
    )
    return partial(module, q, k, v)


# --- the list


def _no_cuda() -> str | None:
    return None if torch.cuda.is_available() else "needs a CUDA GPU"


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # a parent package is missing
        return False


def _importable(*modules: str) -> Callable[[], str | None]:
    """For a peer in the first of these modules that is there: whether it is made for this machine's torch, too."""

    def unavailable() -> str | None:
        found = next(filter(_is_there, modules), None)
        if found is None:
            return f"{' or '.join(modules)} is not installed"
        if reason := _no_cuda():
            return reason
        try:
            importlib.import_module(found)
        except Exception as error:  # whatever a library raises whose binaries do not fit
            return f"{found} is installed, but its import fails: {type(error).__name__}: {' '.join(str(error).split())}"
        return None

    return unavailable


def versions() -> dict[str, str]:
    """Of the peers that are distributions of their own and installed."""
    found = {peer.name: peer.distribution and version_of(peer.distribution) for peer in PEERS.values()}
    return {name: version for name, version in found.items() if version}


_ALL = frozenset({"window", "softcap", "alibi", "sink"})
_ROWS = frozenset({"packed", "paged"})  # where a case's sequences may lie


def _by_ranks(case: Case, *tensors):
    raise RuntimeError("only suite parallel has the processes that this takes")


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "flashcore",
            "FlashCore, whatever backend the plan picks",
            partial(_flashcore, "auto"),
            features=_ALL | _ROWS,
        ),
        Peer(
            "flashcore-triton",
            "FlashCore's Triton backend",
            partial(_flashcore, "triton"),
            partial(_backend_unavailable, "triton"),
            partial(_backend_rejects, "triton"),
            features=_ALL | _ROWS,
        ),
        Peer(
            "flashcore-dense",
            "FlashCore on packed sequences of one length as a dense batch",
            _flashcore_dense,
            rejects=_dense_rejects,
            features=_ROWS,
        ),
        Peer(
            "cudnn",
            "SDPA through cuDNN",
            _sdpa,
            _no_cuda,
            _half_only,
            partial(_sdpa_kernel, "CUDNN_ATTENTION"),
            transposed=True,
        ),
        Peer(
            "fa2",
            "SDPA through FlashAttention-2",
            _fa2,
            _no_cuda,
            _half_only,
            partial(_sdpa_kernel, "FLASH_ATTENTION"),
            transposed=True,
            features=frozenset({"window"}),
        ),
        Peer(
            "fa2-varlen",
            "PyTorch's FlashAttention-2 on packed input",
            _fa2_varlen,
            _no_cuda,
            _fa2_varlen_rejects,
            features=frozenset({"packed"}),
        ),
        Peer(
            "math",
            "SDPA through separate matmuls and softmax",
            _sdpa,
            rejects=_math_rejects,
            context=partial(_sdpa_kernel, "MATH"),
            transposed=True,
        ),
        Peer(
            "efficient",
            "SDPA through its memory-efficient kernel",
            _sdpa,
            _no_cuda,
            _sdpa_rejects,
            partial(_sdpa_kernel, "EFFICIENT_ATTENTION"),
            transposed=True,
        ),
        Peer("sdpa", "SDPA as PyTorch dispatches it", _sdpa, rejects=_sdpa_rejects, transposed=True),
        Peer(
            "reference",
            "FlashCore's specification in plain PyTorch",
            partial(_flashcore, "reference"),
            features=_ALL | _ROWS,
        ),
        Peer("eager", "Transformers' eager attention", _eager, _no_transformers, _math_rejects),
        Peer("flex", "FlexAttention, compiled", _flex, _no_cuda, transposed=True, features=_ALL),
        Peer(
            "fa3",
            "FlashAttention-3",
            _fa3,
            _importable(*_FA3_MODULES),
            features=frozenset({"window", "softcap"}),
            distribution="flash_attn_3",
        ),
        Peer(
            "fa3-varlen",
            "FlashAttention-3 on packed input",
            _fa3_varlen,
            _fa3_varlen_unavailable,
            lambda case: "it has no gradients" if case.backward else None,
            features=_ALL - {"alibi"} | _ROWS,
        ),
        Peer(
            "fa4",
            "FlashAttention-4",
            _fa4,
            _importable("flash_attn.cute"),
            features=_ALL - {"alibi"},
            distribution="flash-attn-4",
        ),
        Peer(
            "xformers", "xFormers", _xformers, _importable("xformers"), _xformers_rejects, distribution="xformers"
        ),
        Peer(
            "flashinfer",
            "FlashInfer, ragged prefill",
            _flashinfer,
            _importable("flashinfer"),
            distribution="flashinfer-python",
        ),
        Peer(
            "te", "Transformer Engine", _te, _importable("transformer_engine"), distribution="transformer_engine"
        ),
        Peer("flashcore-matmul", "flashcore.matmul", gemm.flashcore, operation="gemm"),
        Peer("cublas", "torch.mm, and elementwise operations after it", gemm.cublas, operation="gemm"),
        Peer("ring", "FlashCore's ring over two GPUs", _by_ranks, operation="parallel"),
        Peer("ulysses", "FlashCore's Ulysses over two GPUs", _by_ranks, operation="parallel"),
        Peer("one-gpu", "FlashCore on the first of two GPUs", _by_ranks, operation="parallel"),
        Peer(
            "context-parallel", "PyTorch's context_parallel over two GPUs", _by_ranks,
            lambda: None if torch.cuda.device_count() > 1 else "needs two CUDA GPUs", operation="parallel",
        ),
    )
}
