"""What is to be computed, every dimension named. Validation of inputs happens here and nowhere else."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, NoReturn

import torch

from flashcore.errors import FlashCoreWarning, InvalidInputError, UnsupportedError
from flashcore.mask import CAUSAL, FULL, Mask, Visible
from flashcore.score import PLAIN, SCORE, Score
from flashcore.score import check as check_score
from flashcore.sequences import DENSE, Dense, Packed, PackedSpec, Paged, PagedSpec

DTYPES = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
    torch.float64: "float64",
}
DEVICES = ("cuda", "cpu")
# From here on kernels fold the scale into the exponent. They divide by it: a smaller one's quotients could overflow.
LEAST_SCALE = 1e-20
# Kernels count positions in 32 bits, and round up to whole tiles: no backend with kernels of its own takes more.
LONGEST = 2**31 - 2**16
_DENSE, _PACKED = "(batch, seqlen, heads, head_dim)", "(total, heads, head_dim)"
_PAGED = "(pages, page_size, heads, head_dim)"
# More than models have: so many heads of at most so many positions are rather positions of heads.
MANY_HEADS = 128


@dataclass(frozen=True)
class AttentionProblem:
    """``softmax(scale * q k^T + mask) v`` for one set of shapes. Hashable: plans are memoised by it.

    Tensors are (batch, seqlen, heads, head_dim), those of packed sequences (total, heads, head_dim), paged keys and
    values (pages, page_size, heads, head_dim); ``heads_q`` is a multiple of ``heads_k``, and query head ``h`` reads
    key/value head ``h // group_size``.
    """

    operation: ClassVar[str] = "attention"

    dtype: str  # "bfloat16", "float16", "float32" or "float64": of q, k, v and the output
    device: str  # "cuda" or "cpu"
    arch: tuple[int, int] | None  # compute capability, such as (9, 0); None on the CPU and on AMD's GPUs
    sm_count: int  # streaming multiprocessors; 0 on the CPU
    batch: int
    seqlen_q: int  # of packed sequences the longest that may come
    seqlen_k: int
    heads_q: int
    heads_k: int
    head_dim: int  # of q and k
    head_dim_v: int  # of v and the output
    mask: Mask  # which keys a query sees, aligned to the bottom right
    scale: float  # finite, may be zero or negative
    score: Score = PLAIN  # what becomes of scaled scores; sinks
    needs_grad: bool = False
    return_lse: bool = False
    partial: bool = False  # a part of the queries' keys: see backends.FEATURES
    queries: Dense | PackedSpec = DENSE  # where their rows lie
    keys: Dense | PackedSpec | PagedSpec = DENSE

    @classmethod
    def from_tensors(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
        scale: float | None = None,
        score: Score = PLAIN,
        extras: tuple[torch.Tensor, ...] = (),
        return_lse: bool = False,
        queries: Packed | None = None,
        keys: Packed | Paged | None = None,
    ) -> AttentionProblem:
        """Check the arguments of ``flashcore.attention`` and name their dimensions.

        :param extras: the tensors that the specs bring, in the order of :attr:`tensors`; those of `score` will do.
        :raises InvalidInputError: naming the argument, the rule it breaks and what to do.
        :raises UnsupportedError: one side alone is packed, or paged keys are to have gradients.
        """
        packed, paged = queries is not None or keys is not None, isinstance(keys, Paged)
        check_tensors(q, k, v, packed=packed, paged=paged)
        for name, flag in {"causal": causal, "return_lse": return_lse}.items():
            if not isinstance(flag, bool):
                raise InvalidInputError(f"attention: {name} must be True or False (given {flag!r}).")

        mask = checked_mask(causal, window)
        heads_q, head_dim = q.shape[-2:]
        heads_k, head_dim_v = v.shape[-2:]
        if packed:
            check_packed(queries, keys, q)
            rows_q, rows_k = q.shape[:-2], k.shape[:-2]
            places = {"queries": queries.of(*rows_q), "keys": keys.of(*rows_k)}
            batch, seqlen_q, seqlen_k = queries.batch, queries.bound(*rows_q), keys.bound(*rows_k)
        else:
            (batch, seqlen_q), seqlen_k, places = q.shape[:2], k.shape[1], {}
            if heads_k > MANY_HEADS >= max(seqlen_q, seqlen_k):
                _warn_of_the_layout()
        check_score(score, extras[len(extras) - len(score.tensors) :], q, seqlen_k, batch if packed else None)
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, *extras))
        if paged and needs_grad:
            refuse_gradients_of_pages()
        arch, sm_count = _gpu(q.device) if q.device.type == "cuda" else (None, 0)
        return cls(
            dtype=DTYPES[q.dtype],
            device=q.device.type,
            arch=arch,
            sm_count=sm_count,
            batch=batch,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            heads_q=heads_q,
            heads_k=heads_k,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            mask=mask,
            scale=checked_scale(scale, head_dim),
            score=score,
            needs_grad=needs_grad,
            return_lse=return_lse,
            **places,
        )

    @classmethod
    def hypothetical(
        cls,
        q_shape: Sequence[int],
        k_shape: Sequence[int],
        v_shape: Sequence[int] | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        arch: tuple[int, int] | None = None,
        needs_grad: bool = False,
        **options,
    ) -> AttentionProblem:
        """The problem of tensors that need not exist, checked as :meth:`from_tensors` checks those that do.

        Shapes are (batch, seqlen, heads, head_dim), v's as k's by default; ``options`` are those of
        :meth:`from_tensors`. On this machine's device, or on a GPU of compute capability ``arch``.

        :raises InvalidInputError: as :meth:`from_tensors`, or a tensor of such a shape could not exist.
        """
        shapes = {"q": q_shape, "k": k_shape, "v": k_shape if v_shape is None else v_shape}
        tensors = (stand_in(f"attention: {name}", shape, dtype, arch) for name, shape in shapes.items())
        problem = cls.from_tensors(*tensors, **options)
        return replace(problem, needs_grad=needs_grad, **({} if arch is None else gpu_of(arch)))

    def scaled(self, scale: float | None) -> AttentionProblem:
        """The same problem with another scale; None: with the default one."""
        scale = self.head_dim**-0.5 if scale is None else float(scale)
        return self if scale == self.scale else replace(self, scale=scale)

    @property
    def of_any_scale(self) -> AttentionProblem:
        """The problem that stands for those that differ in the size of a positive scale: they are planned alike."""
        return self.scaled(None) if self.scale >= LEAST_SCALE else self

    @property
    def group_size(self) -> int:
        """Query heads per key/value head: 1 for multi-head, ``heads_q`` for multi-query attention."""
        return self.heads_q // self.heads_k

    @property
    def needs_lse(self) -> bool:
        """Whether a backend without native gradients must write the LSE: for the caller or for the backward pass."""
        return self.return_lse or self.needs_grad

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to multiply: the output has no elements, or no query has a key."""
        if not self.packed:
            return self.batch == 0 or self.seqlen_q == 0 or self.seqlen_k == 0
        # With sinks the LSE of a query without a key depends on whether some sequence owns it.
        no_keys = self.score.sink is None and (self.seqlen_k == 0 or self.keys.total == 0)
        return self.batch == 0 or self.seqlen_q == 0 or self.queries.total == 0 or no_keys

    @property
    def packed(self) -> bool:
        """Whether the sequences are packed: queries, and keys unless they are paged; or neither."""
        return isinstance(self.queries, PackedSpec)

    @property
    def paged(self) -> bool:
        """Whether keys and values lie in pages."""
        return isinstance(self.keys, PagedSpec)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that come after q, k and v, in their order: those that specs bring."""
        places = (f"{name}_{side}" for side, rows in (("q", self.queries), ("k", self.keys)) for name in rows.tensors)
        return (*places, *self.score.tensors)

    def split(self, extras: Sequence[torch.Tensor]) -> tuple[Packed, Packed | Paged, Sequence[torch.Tensor]]:
        """The tensors after q, k and v, where sequences are packed: queries, keys, and those that the score brings."""
        keys, score = len(self.queries.tensors), len(self.queries.tensors) + len(self.keys.tensors)
        of_queries = self.queries.bind(self.seqlen_q, *extras[:keys])
        return of_queries, self.keys.bind(self.seqlen_k, *extras[keys:score]), extras[score:]

    @property
    def causal(self) -> bool:
        """Whether the mask is the causal one and no window."""
        return self.mask == CAUSAL

    @property
    def visible(self) -> Visible:
        """The mask of these lengths."""
        return self.mask.of(self.seqlen_q, self.seqlen_k)

    @property
    def kernel_score(self) -> Score:
        """What a kernel that wants a positive scale does to its scores: a scale that is not one is a change too."""
        structure = self.score.structure
        if structure.change is None and not self.scale >= LEAST_SCALE:
            return replace(structure, change=SCORE)
        return structure

    @property
    def features(self) -> frozenset[str]:
        """What a backend must name in its FEATURES to get this problem."""
        has = {
            "window": self.mask not in (FULL, CAUSAL),
            "score": self.score.change is not None,
            "sink": self.score.sink is not None,
            "head_dim_v": self.head_dim_v != self.head_dim,
            "partial": self.partial,
            "packed": self.packed,
            "paged": self.paged,
        }
        return frozenset(name for name, there in has.items() if there)

    @property
    def q_shape(self) -> tuple[int, ...]:
        return *self.queries.shape(self.batch, self.seqlen_q), self.heads_q, self.head_dim

    @property
    def k_shape(self) -> tuple[int, ...]:
        return *self.keys.shape(self.batch, self.seqlen_k), self.heads_k, self.head_dim

    @property
    def v_shape(self) -> tuple[int, ...]:
        return *self.k_shape[:-1], self.head_dim_v

    @property
    def out_shape(self) -> tuple[int, ...]:
        return *self.q_shape[:-1], self.head_dim_v

    @property
    def lse_shape(self) -> tuple[int, ...]:
        *batch, rows = self.queries.shape(self.batch, self.seqlen_q)
        return *batch, self.heads_q, rows

    def __str__(self) -> str:
        where = self.device if self.arch is None else f"sm_{self.arch[0]}{self.arch[1]} ({self.sm_count} SMs)"
        flags = "" if self.mask == FULL else f", {self.mask}"
        flags += "" if self.score == PLAIN else f", {self.score}"
        flags += "".join(f", {name}" for name in ("partial", "needs_grad", "return_lse") if getattr(self, name))
        shapes = f"q {self.q_shape}, k {self.k_shape}, v {self.v_shape}"
        if self.packed:
            pages = " in pages" if self.paged else ""
            shapes += f", {self.batch} sequences of up to {self.seqlen_q} queries and {self.seqlen_k} keys{pages}"
        return f"{self.dtype} on {where}, {shapes}, scale {self.scale:.6g}{flags}"


def check_tensors(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, packed: bool = False, paged: bool = False
) -> None:
    """Check what ``flashcore.attention`` demands of its tensors. Works while they are traced.

    :raises InvalidInputError: naming the argument, the rule it breaks and what to do.
    """
    layout = _PACKED if packed else _DENSE
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, tensor, _PAGED if paged and name != "q" else layout)
    _check_agreement(q, k, v, paged)


def _check_tensor(name: str, tensor: torch.Tensor, layout: str) -> None:
    """What each of q, k, v must be, whatever the others are."""
    if not isinstance(tensor, torch.Tensor):
        raise InvalidInputError(f"attention: {name} must be a torch.Tensor (given {type(tensor).__name__}).")
    if any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__):  # its class is slow to import
        raise UnsupportedError(
            f"attention: {name} is a DTensor (supported: plain tensors). Pass to_local() where batch or heads are "
            "sharded; where the sequence is, use flashcore.distributed."
        )
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise InvalidInputError(
            f"attention: {name} must be a dense tensor (given a {kind} one). Convert it first."
        )
    if tensor.dtype not in DTYPES:
        raise InvalidInputError(
            f"attention: {name} has dtype {_short(tensor.dtype)} (supported: {', '.join(DTYPES.values())}). "
            "Cast it first."
        )
    if tensor.device.type not in DEVICES:
        raise InvalidInputError(
            f"attention: {name} is on {tensor.device} (supported: {', '.join(DEVICES)}). Move it first."
        )
    if tensor.dim() != len(layout.split(", ")):
        kind = {_PACKED: " of packed sequences", _PAGED: " of paged sequences"}.get(layout, "")
        raise InvalidInputError(
            f"attention: {name}{kind} must have {len(layout.split(', '))} dimensions, {layout} "
            f"(given {tensor.dim()}: {tuple(tensor.shape)})."
        )
    heads, head_dim = tensor.shape[-2:]
    if heads == 0 or head_dim == 0:
        what = "heads" if heads == 0 else "head_dim"
        raise InvalidInputError(
            f"attention: {name} has {what}=0 (supported: 1 or more; given {tuple(tensor.shape)}). "
            "Only batch and seqlen may be 0."
        )


def _check_agreement(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, paged: bool) -> None:
    """What q, k and v must have in common."""
    shapes = f"given q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dtype == k.dtype == v.dtype:
        raise InvalidInputError(
            f"attention: q, k and v must have one dtype (given q {_short(q.dtype)}, k {_short(k.dtype)}, "
            f"v {_short(v.dtype)}). Cast them to one."
        )
    if not q.device == k.device == v.device:
        raise InvalidInputError(
            f"attention: q, k and v must be on one device (given q {q.device}, k {k.device}, v {v.device}). "
            "Move them to one."
        )
    if paged:
        if k.shape[:2] != v.shape[:2]:
            raise InvalidInputError(f"attention: k and v must have as many pages, of one size ({shapes}).")
        if (size := k.shape[1]) != 1 and (size == 0 or size % 16):
            raise InvalidInputError(
                f"attention: a page must have 1 row or a multiple of 16 (given {size}: k {tuple(k.shape)}). The layout "
                f"is {_PAGED}: are page_size and heads swapped? transpose(1, 2) copies nothing."
            )
    elif not q.shape[:-3] == k.shape[:-3] == v.shape[:-3]:
        raise InvalidInputError(
            f"attention: q, k and v must have one batch size ({shapes}). Expand the smaller ones: it copies nothing."
        )
    if k.shape[-3] != v.shape[-3]:
        raise InvalidInputError(f"attention: k and v must have one seqlen ({shapes}).")
    if k.shape[-2] != v.shape[-2]:
        raise InvalidInputError(f"attention: k and v must have the same number of heads ({shapes}).")
    if q.shape[-1] != k.shape[-1]:
        raise InvalidInputError(f"attention: q and k must have one head_dim ({shapes}). Only v's may differ.")
    heads_q, heads_k = q.shape[-2], k.shape[-2]
    if heads_q % heads_k:
        raise InvalidInputError(
            f"attention: heads_q={heads_q} is not a multiple of heads_k={heads_k} ({shapes}). "
            "The layout is (batch, seqlen, heads, head_dim): are seqlen and heads swapped?"
        )


@cache
def _warn_of_the_layout() -> None:
    """Once: it may be what is meant."""
    message = (
        f"attention: more than {MANY_HEADS} heads, and no more than {MANY_HEADS} positions: are the two swapped? "
        "flashcore.attention takes (batch, seqlen, heads, head_dim), flashcore.scaled_dot_product_attention "
        "(batch, heads, seqlen, head_dim). transpose(1, 2) copies nothing."
    )
    warnings.warn(message, FlashCoreWarning, stacklevel=2)


def check_out(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *extras: torch.Tensor) -> None:
    """Check the tensor that a caller brings for the output. Works while it is traced.

    :raises InvalidInputError: it is not what the output would be.
    :raises UnsupportedError: there are gradients.
    """
    shape = *q.shape[:-1], v.shape[-1]
    if (
        not isinstance(out, torch.Tensor) or out.shape != shape or out.dtype != q.dtype or out.device != q.device
        or not out.is_contiguous()
    ):  # fmt: skip
        given = type(out).__name__
        if isinstance(out, torch.Tensor):
            given = f"{_short(out.dtype)} {tuple(out.shape)} on {out.device}, strides {out.stride()}"
        raise InvalidInputError(
            f"attention: out must be {_short(q.dtype)} {tuple(shape)} on {q.device}, contiguous (given {given})."
        )
    if torch.is_grad_enabled() and any(t.requires_grad for t in (out, q, k, v, *extras)):
        raise UnsupportedError(
            "attention: out= has no gradients, and an input or out itself requires one. Call it under torch.no_grad(), "
            "or leave out= out."
        )


def check_out_of_kernels(out: torch.Tensor) -> None:
    """:raises InvalidInputError: kernels cannot write there."""
    if out.is_cuda and (out.data_ptr() % 16 or out.is_neg()):
        given = "a negated view" if out.is_neg() else f"one at an address of {out.data_ptr() % 16} modulo 16"
        raise InvalidInputError(
            f"attention: out must be aligned to 16 bytes, and no negated view (given {given}). Leave it out, and copy "
            "what is returned."
        )


def refuse_gradients_of_pages() -> NoReturn:
    raise UnsupportedError(
        "attention: paged keys have no backward pass, and an input requires a gradient. Call it under torch.no_grad(), "
        "or detach() the inputs."
    )


def check_packed(queries: Packed | None, keys: Packed | Paged | None, q: torch.Tensor) -> None:
    """What packed queries, and packed or paged keys, must have in common.

    :raises InvalidInputError: they have not.
    :raises UnsupportedError: only one side is packed.
    """
    for name, given in (("queries", queries), ("keys", keys)):
        if given is None:
            raise UnsupportedError(
                f"attention: {name} are dense and the others packed, which is not supported. Pass {name}=Packed(...): "
                "of a dense tensor its offsets are torch.arange(batch + 1) * seqlen, and it is seen as (total, ...)."
            )
        if not isinstance(given, (Packed, Paged) if name == "keys" else Packed):
            kinds = "flashcore.Packed, flashcore.Paged" if name == "keys" else "flashcore.Packed"
            raise InvalidInputError(f"attention: {name} must be {kinds} or None (given {given!r}).")
        if (device := given.tensors[0].device) != q.device:
            what = "table and lengths" if isinstance(given, Paged) else "offsets"
            raise InvalidInputError(
                f"attention: {what} of the {name} are on {device}, q on {q.device}. Move them there."
            )
    if queries.batch != keys.batch:
        raise InvalidInputError(
            f"attention: queries and keys must be of one number of sequences (given {queries.batch} and {keys.batch})."
        )


def checked_mask(causal: bool, window: tuple[int | None, int | None] | None) -> Mask:
    """The mask of these arguments. Raises InvalidInputError if `window` is no window."""
    left = right = None
    if window is not None:
        sides = window if isinstance(window, (tuple, list)) else ()
        if len(sides) != 2 or any(
            side is not None and (isinstance(side, bool) or not isinstance(side, int) or side < 0) for side in sides
        ):
            raise InvalidInputError(
                f"attention: window must be (left, right), each None or a number of keys from 0 on (given {window!r}). "
                "A causal window of n keys is causal=True, window=(n - 1, 0)."
            )
        left, right = sides
    return Mask(left, 0 if causal else right)


def checked_scale(scale: float | None, head_dim: int) -> float:
    """The scale, or its default. Raises InvalidInputError if it is no finite number."""
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise InvalidInputError(
            f"attention: scale must be a number or None (given {type(scale).__name__}). Call .item() on a tensor."
        )
    if not math.isfinite(scale):
        raise InvalidInputError(f"attention: scale={scale} is not finite. Leave it out for head_dim ** -0.5.")
    return float(scale)


def stand_in(name: str, shape: Sequence[int], dtype: torch.dtype, arch: tuple[int, int] | None) -> torch.Tensor:
    """A tensor of this shape whose elements are one: it takes no memory. On the GPU if there is one and no ``arch``."""
    if math.prod(max(1, size) for size in shape) * dtype.itemsize >= 2**63:
        raise InvalidInputError(f"{name} of shape {tuple(shape)} is larger than any memory (2**63 bytes).")
    device = "cuda" if arch is None and torch.cuda.is_available() else "cpu"
    return torch.empty(1, dtype=dtype, device=device).expand(*shape)


def gpu_of(arch: tuple[int, int]) -> dict:
    """A problem's fields on a GPU of this compute capability that need not be here."""
    return {"device": "cuda", "arch": arch, "sm_count": 132}  # multiprocessors of the H100 SXM and the H200


@cache
def _gpu(device: torch.device) -> tuple[tuple[int, int] | None, int]:
    properties = torch.cuda.get_device_properties(device)
    arch = None if torch.version.hip else (properties.major, properties.minor)
    return arch, properties.multi_processor_count


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
