"""FlashCore in PyTorch's registry of flash attention implementations, which torch has from 2.10 on.

>>> from flashcore.integrations import torch_registry
>>> torch_registry.register()
>>> torch.nn.attention.activate_flash_attention_impl("flashcore")
>>> torch.nn.attention.activate_flash_attention_impl("FA4")  # or another: it takes FlashCore's place

While it is active, the operators of PyTorch's flash attention on GPUs are FlashCore's, in all threads and for whoever
calls them: the flash backend of ``scaled_dot_product_attention``, ``torch.nn.attention.varlen.varlen_attn`` with its
gradients, and over pages where torch has that, also in compiled and exported programs and in C++. What SDPA gives its
flash backend PyTorch decides, as before; ``torch.nn.attention.sdpa_kernel`` insists on it.

PyTorch's own implementation computes what it would compute for FlashCore, too (``flashcore.explain`` says which
backend), dropout, ALiBi slopes, fp8, and calls with ``num_splits``, which asks for a way of adding up that FlashCore
does not promise. Either takes the outputs of the other in its backward pass. FlashCore's backend ``"sdpa"`` is such a
caller of PyTorch's operators: on a GPU it is PyTorch's own only while nothing is active.

Outputs and gradients have the layouts that PyTorch promises for them, which are the inputs'. FlashCore's kernels write
(batch, seqlen, heads, head_dim): inputs that are such in memory cost no copy, and neither does ``transpose(1, 2)`` of
them. ``varlen_attn_out`` costs one. The LSE of a query that sees no key is +inf, as in PyTorch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps

import torch
import torch.nn.attention

from flashcore import calls
from flashcore import plan as planning
from flashcore.backends import ATTENTION, Run
from flashcore.errors import EnvironmentProblem, InvalidInputError, UnsupportedError
from flashcore.problem import LEAST_SCALE, AttentionProblem
from flashcore.sequences import Packed, Paged

__all__ = ["NAME", "register"]

NAME = "flashcore"

_KEY = "CUDA"  # of the tensors whose operators are replaced
_runs = calls.Runs()


def register() -> None:
    """Tell PyTorch the name ``"flashcore"``, which ``torch.nn.attention.activate_flash_attention_impl`` then takes.

    Needs no GPU and changes nothing by itself; call it as often as you like. To activate it where PyTorch has no CUDA
    changes nothing, either.

    :raises EnvironmentProblem: a torch without a registry.
    """
    if not hasattr(torch.nn.attention, "activate_flash_attention_impl") or not hasattr(torch.library, "get_kernel"):
        raise EnvironmentProblem(
            f"torch_registry: torch {torch.__version__} has no registry of flash attention implementations (2.10 has). "
            "Update it, or use flashcore.integrations.sdpa.replace_torch."
        )
    torch.nn.attention.register_flash_attention_impl(NAME, register_fn=_activate)


class _Active:
    """What PyTorch holds of an active implementation."""

    def __init__(self, library: torch.library.Library):
        self._library = library

    def remove(self) -> None:
        """Put PyTorch's own operators back."""
        self._library._destroy()


def _activate() -> _Active:
    library = torch.library.Library("aten", "IMPL")
    for name, function in _OPERATORS.items():
        # Torch has some in newer versions only, and all of them only if it is a build for CUDA.
        if hasattr(torch.ops.aten, name) and torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", _KEY):
            own = torch.library.get_kernel(f"aten::{name}", _KEY)
            library.impl(name, _or_pytorch(function, own), _KEY, with_keyset=True, allow_override=True)
    return _Active(library)


def _or_pytorch(function: Callable, own) -> Callable:
    """`function`, and PyTorch's own kernel where it returns None."""

    @wraps(function)
    def kernel(keys, *args, **kwargs):
        result = function(*args, **kwargs)
        return own.call_boxed(keys, *args, **kwargs) if result is None else result

    return kernel


# ---- the operators: each returns None where PyTorch is to compute it -----------------------------------------------


def _sdpa_forward(
    query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None, **others
):  # fmt: skip
    """Of (batch, heads, seqlen, head_dim) tensors. `is_causal` is aligned to the bottom right, as in flash-attn."""
    if dropout_p or return_debug_mask or _any(others):
        return None
    result = _attend(*_swapped(query, key, value), is_causal, None, scale, {})
    if result is None:
        return None
    out, lse = result
    lengths = query.shape[2], key.shape[2]
    return _laid_out_as(query, out.transpose(1, 2)), lse, None, None, *lengths, *_of_dropout(query)


def _sdpa_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, philox_seed,
    philox_offset, *, scale=None, **others,
):  # fmt: skip
    if dropout_p or _any(others):
        return None
    tensors = _swapped(query, key, value, out, grad_out)
    grads = _differentiate(*tensors[:4], logsumexp, tensors[4], is_causal, None, scale, {})
    if grads is None:
        return None
    return tuple(_laid_out_as(t, grad.transpose(1, 2)) for t, grad in zip((query, key, value), grads, strict=True))


def _flash_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None, block_table=None, num_splits=None, **others,
):  # fmt: skip
    """Of (batch, seqlen, heads, head_dim) or, with `cum_seq_q`, (total, heads, head_dim) tensors."""
    if dropout_p or return_debug_mask or num_splits or _any(others):
        return None
    places = _places(cum_seq_q, cum_seq_k, max_q, max_k, seqused_k, block_table)
    if places is None:
        return None
    window = _window(window_size_left, window_size_right, max_q, max_k)
    result = _attend(query, key, value, is_causal, window, scale, places)
    if result is None:
        return None
    out, lse = result
    return _laid_out_as(query, out), lse, *_of_dropout(query)


def _flash_forward_into(out, query, *args, **kwargs):
    """The same into `out`: the LSE alone is returned."""
    if (out.shape, out.dtype) != (query.shape, query.dtype):
        return None
    result = _flash_forward(query, *args, **kwargs)
    if result is None:
        return None
    out.copy_(result[0])
    return result[1]


def _flash_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, *, scale=None, window_size_left=None, window_size_right=None, **others,
):  # fmt: skip
    if dropout_p or _any(others):
        return None
    places = _places(cum_seq_q, cum_seq_k, max_q, max_k)
    if places is None:
        return None
    window = _window(window_size_left, window_size_right, max_q, max_k)
    grads = _differentiate(query, key, value, out, logsumexp, grad_out, is_causal, window, scale, places)
    return grads and tuple(_laid_out_as(t, grad) for t, grad in zip((query, key, value), grads, strict=True))


_OPERATORS = {
    "_scaled_dot_product_flash_attention": _sdpa_forward,
    "_scaled_dot_product_flash_attention_backward": _sdpa_backward,
    "_flash_attention_forward": _flash_forward,
    "_flash_attention_forward_no_dropout_inplace": _flash_forward_into,
    "_flash_attention_backward": _flash_backward,
}


# ---- their arguments ------------------------------------------------------------------------------------------------


def _any(others: dict) -> bool:
    """Whether there is an argument of another version's, or one that FlashCore has no use for (ALiBi slopes)."""
    return any(value is not None for value in others.values())


def _swapped(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Heads and positions."""
    return tuple(t.transpose(1, 2) for t in tensors)


def _places(cum_seq_q, cum_seq_k, max_q, max_k, seqused_k=None, block_table=None) -> dict[str, Packed | Paged] | None:
    """Where packed sequences lie, nothing if they are dense; None if this is neither."""
    if cum_seq_q is None and cum_seq_k is None:
        return {} if seqused_k is None and block_table is None else None
    try:
        if block_table is None:
            return {"queries": Packed(cum_seq_q, max_q), "keys": Packed(cum_seq_k, max_k, seqused_k)}
        if cum_seq_k is None:
            return {"queries": Packed(cum_seq_q, max_q), "keys": Paged(block_table, seqused_k, max_k)}
    except InvalidInputError:
        pass  # PyTorch has its own words for it
    return None


def _window(left: int | None, right: int | None, longest_q: int, longest_k: int) -> tuple | None:
    """A window as ``flashcore.attention`` has it, without the sides that hide nothing of such lengths."""
    left = None if left is None or not 0 <= left < longest_k - 1 else left
    right = None if right is None or right < 0 or 0 < right >= longest_q - 1 else right
    return None if left is None and right is None else (left, right)


def _of_dropout(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The state of a generator that nobody asked, what is unused, and no mask for debugging."""
    options = {"dtype": torch.uint64, "device": query.device}
    return torch.empty(2, **options), torch.empty((), **options), query.new_empty(0)


def _laid_out_as(like: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """`result` with the strides of ``empty_like(like)``, which compiled programs rely on."""
    if result.stride() == like.stride():
        return result
    target = torch.empty_like(like)
    return result if result.stride() == target.stride() else target.copy_(result)


# ---- the calls ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    """How a kind of call is run, by FlashCore's own kernels."""

    run: Run
    sees_nothing: bool  # whether there may be queries without a key


def _attend(q, k, v, is_causal, window, scale, places) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(out, lse) as PyTorch's flash attention has them, but for the layout; None if PyTorch is to compute it."""
    extras = tuple(t for rows in places.values() for t in rows.tensors)
    choice = _choose(False, q, k, v, is_causal, window, scale, places, extras)
    if not choice:
        return None
    out, lse = choice.run(q, k, v, scale, *extras)
    if choice.sees_nothing:
        lse.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=math.inf)
    return out, lse


def _differentiate(q, k, v, out, lse, dout, is_causal, window, scale, places) -> tuple[torch.Tensor, ...] | None:
    """(dq, dk, dv) but for the layout; None if PyTorch is to compute them. A row with an LSE of +inf has none."""
    extras = tuple(t for rows in places.values() for t in rows.tensors)
    choice = _choose(True, q, k, v, is_causal, window, scale, places, extras)
    return choice and choice.run(q, k, v, out.contiguous(), lse.contiguous(), dout, None, scale, *extras)


def _choose(backward, q, k, v, is_causal, window, scale, places, extras) -> _Choice | None:
    """How FlashCore's kernels run a kind of call, remembered; None if they do not."""
    key = (
        backward, q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, is_causal, window,
        scale is None or LEAST_SCALE <= scale <= sys.float_info.max or scale,
        tuple(rows.kind for rows in places.values()), tuple(t.device for t in extras), planning.active_override.get(),
    )  # fmt: skip
    found = _runs.recent.get(key)
    if found is None:
        found = _runs.recall(key)
    if found is None:
        found = _runs.remember(key, _new_choice(backward, q, k, v, is_causal, window, scale, places, extras) or False)
    return found or None


@torch.no_grad()  # who needs a gradient asks for it later
def _new_choice(backward, q, k, v, is_causal, window, scale, places, extras) -> _Choice | None:
    if q.shape[-1] != v.shape[-1]:  # which PyTorch refuses, and shapes the output for
        return None
    try:
        problem = AttentionProblem.from_tensors(
            q, k, v, causal=is_causal, window=window, scale=scale, extras=extras, **places, return_lse=not backward
        )
        plan = planning.prepared_plan(replace(problem, needs_grad=backward))
    except (InvalidInputError, UnsupportedError):
        return None
    if backward:
        plan = planning.recorded_backward(plan)
    if not _is_own(plan.backend):
        return None
    return _Choice(calls.on_its_device(q, plan.run), problem.packed or problem.visible.empty_rows > 0)


def _is_own(backend: str) -> bool:
    """Whether its kernels are FlashCore's. PyTorch's would come back here, and need no detour."""
    if backend == ATTENTION.empty:
        return True
    return backend in ATTENTION.providers and not ATTENTION.load(backend).NATIVE_GRAD
