"""PyTorch's ``scaled_dot_product_attention`` with FlashCore behind it.

Three ways to it:

- ``flashcore.scaled_dot_product_attention`` has PyTorch's signature, layout and meaning.
- ``with flashcore.integrations.sdpa.replace_torch(): ...`` puts it in the place of
  ``torch.nn.functional.scaled_dot_product_attention``, for programs that cannot be changed.
- :func:`explain` says for one call who computes it, how and why.

A call that FlashCore cannot express goes to PyTorch as it came. The others are :func:`flashcore.attention`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch.jit._builtins import _register_builtin
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from flashcore import api
from flashcore.backends.sdpa import scaled_dot_product_attention as torch_sdpa
from flashcore.errors import InvalidInputError
from flashcore.plan import Plan
from flashcore.problem import check_tensors
from flashcore.watching import is_recorded, is_transformed, is_watched, keeps_lengths

__all__ = ["Choice", "explain", "replace_torch", "scaled_dot_product_attention"]

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_is_function_mode_enabled = torch._C._is_torch_function_mode_enabled


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, computed by FlashCore where it can.

    Everything is as PyTorch documents it: (batch, heads, seqlen, head_dim) tensors, a causal mask that is aligned to
    the TOP LEFT (:func:`flashcore.attention` aligns it to the bottom right), a boolean `attn_mask` that is True where
    a key is seen, dropout whenever `dropout_p` is positive.

    PyTorch computes calls with an attn_mask, with dropout, causal ones with more queries than keys, inside of
    ``torch.func``'s transforms, forward-mode differentiation, a ``TorchFunctionMode`` (but for
    ``torch.set_default_device``) and TorchScript, and inputs that FlashCore does not know; :func:`explain` tells.
    ``torch.nn.attention.sdpa_kernel`` reaches only those. What FlashCore computes has no second derivative.
    """
    out = computed(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if out is not None:
        return out.transpose(1, 2)
    return torch_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def computed(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa) -> torch.Tensor | None:
    """The same, but (batch, seqlen, heads, head_dim) and contiguous; None where PyTorch is to compute it."""
    if _declines(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa) is None:
        try:
            return _attend(api.attention, query, key, value, is_causal, scale)
        except InvalidInputError:
            pass  # perhaps PyTorch knows better; else its error is the one that the caller expects
    return None


_register_builtin(scaled_dot_product_attention, "aten::scaled_dot_product_attention")  # what TorchScript makes of it


@dataclass(frozen=True)
class Choice:
    """Who computes a call: FlashCore by `plan`, or PyTorch because FlashCore `declined`. One of the two is None."""

    plan: Plan | None
    declined: str | None

    def __str__(self) -> str:
        return f"PyTorch: {self.declined}" if self.plan is None else f"FlashCore:\n{self.plan}"


def explain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Choice:
    """What :func:`scaled_dot_product_attention` would do with these arguments, and why. Launches nothing."""
    reason = _declines(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if reason is None:
        try:
            return Choice(_attend(api.explain, query, key, value, is_causal, scale), None)
        except InvalidInputError as error:
            reason = str(error)
    return Choice(None, reason)


class replace_torch:
    """Make ``torch.nn.functional.scaled_dot_product_attention`` FlashCore's, in all threads, from now on.

    Use it in a ``with`` statement, or call it once at the top of a program. Leaving the block, or :meth:`restore`, puts
    back what was there before. Blocks may be nested, entered again, and left by several threads in any order: as long
    as one of them lasts, the function is FlashCore's.

    It reaches whatever looks the name up when it calls: Transformers' ``sdpa``, diffusers' default, timm,
    ``torch.nn.MultiheadAttention``. It does not reach a program that imported the function by its name
    (``from torch.nn.functional import scaled_dot_product_attention``) earlier, C++ and TorchScript code, exported
    programs, and the inference path of ``torch.nn.TransformerEncoderLayer``, which is one C++ operator.
    """

    _lock = threading.RLock()
    _active: ClassVar[list[list]] = []  # [whose, what was there before], in the order in which they came

    def __init__(self) -> None:
        self._entered = False
        self._replace()

    def restore(self) -> None:
        """Put back what was there before. Does nothing the second time."""
        while self._put_back():
            pass

    def __enter__(self) -> replace_torch:
        with self._lock:
            if self._entered or not any(owner is self for owner, _ in self._active):
                self._replace()
            self._entered = True
        return self

    def __exit__(self, *_) -> None:
        self._put_back()

    def _replace(self) -> None:
        with self._lock:
            self._active.append([self, F.scaled_dot_product_attention])
            F.scaled_dot_product_attention = scaled_dot_product_attention

    def _put_back(self) -> bool:
        """End the latest replacement of this object; False if there is none."""
        with self._lock:
            mine = [i for i, (owner, _) in enumerate(self._active) if owner is self]
            if not mine:
                return False
            _, before = self._active.pop(mine[-1])
            if mine[-1] == len(self._active):
                F.scaled_dot_product_attention = before
            elif self._active[mine[-1]][1] is scaled_dot_product_attention:  # who came next found ours, not another's
                self._active[mine[-1]][1] = before
            return True


def _declines(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa) -> str | None:
    """Why ``flashcore.attention`` cannot express this call; None if it can, provided that its arguments are valid."""
    if attn_mask is not None:
        return "attn_mask is not None: arbitrary masks and biases"
    if is_watched() and is_transformed(query, key, value):
        return "a transform of torch.func, or forward-mode differentiation"
    if dropout_p:
        return f"dropout_p={dropout_p}: dropout"
    if _is_function_mode_enabled() and any(type(m) is not DeviceContext for m in _get_current_function_mode_stack()):
        return "a TorchFunctionMode, which is to see PyTorch's own call"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if type(tensor) not in _PLAIN:
            return f"{name} is a {type(tensor).__name__}, no plain torch.Tensor"
        if tensor.is_nested:
            return f"{name} is a nested tensor"
        if tensor.dim() != 4:
            return f"{name} has {tensor.dim()} dimensions: only (batch, heads, seqlen, head_dim)"
    if query.shape[1] != key.shape[1] and not enable_gqa:
        return f"{query.shape[1]} query heads and {key.shape[1]} key heads without enable_gqa=True"
    if is_causal and query.shape[2] > key.shape[2]:
        return f"is_causal=True with more queries than keys ({query.shape[2]} > {key.shape[2]})"
    if is_causal and keeps_lengths():
        return "is_causal=True under torch.jit.trace: which keys it hides depends on the lengths"
    if is_recorded():  # an operator's error cannot be caught while it is traced
        try:
            check_tensors(*(t.transpose(1, 2) for t in (query, key, value)))
        except InvalidInputError:
            return "inputs that FlashCore does not know"
    return None


def _attend(function, query, key, value, is_causal, scale):
    """`function` of FlashCore's for SDPA's tensors. A mask aligned to the top left hides all keys past the queries."""
    if is_causal and key.shape[2] > query.shape[2]:
        key, value = (t[:, :, : query.shape[2]] for t in (key, value))
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return function(q, k, v, causal=is_causal, scale=scale)
