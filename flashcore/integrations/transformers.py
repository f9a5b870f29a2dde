"""FlashCore as an attention implementation of Hugging Face Transformers.

>>> import flashcore.integrations.transformers
>>> model = AutoModelForCausalLM.from_pretrained("...", attn_implementation="fcore")  # or model.set_attn_implementation

FlashCore computes what reaches it without a mask: prefill, also on top of a dynamic cache, decoding with a dynamic
cache, training. Batches with padding, packed sequences, the steps of a static cache, and dropout go to PyTorch's SDPA
with the mask that Transformers makes for it; a FlashCoreWarning says so once. Sliding windows that hide keys, softcap,
sinks, position biases, masks of heads, ``cu_seq_lens`` and ``output_attentions`` raise UnsupportedError.

Of a model that torch.compile traces as a whole, Transformers makes a mask for every call: compile its layers instead,
``for layer in model.model.layers: layer.compile()``.

Transformers 4.57 makes more masks than 5: there a prompt on top of any cache, the prompt of a static one, and training
with neither a cache nor an attention mask go to PyTorch too.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from flashcore import api
from flashcore.backends.sdpa import scaled_dot_product_attention as torch_sdpa
from flashcore.errors import FlashCoreWarning, InvalidInputError, UnsupportedError
from flashcore.integrations.sdpa import computed
from flashcore.watching import is_recorded, is_watched

try:
    from transformers.utils.output_capturing import _active_collector as _collector
except ImportError:
    _collector = None

__all__ = ["NAME", "attention_forward", "mask"]

# Transformers takes every name with "flash" in it for one of the flash-attn packages, and tries to import that.
NAME = "fcore"


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    head_mask: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """What a model's attention layer calls, with query (batch, heads, seqlen, head_dim), key and value ungrouped.

    :param attention_mask: what :func:`mask` returned, or the model's own.
    :returns: out (batch, seqlen, heads, head_dim), contiguous, and None for the weights.
    :raises UnsupportedError: for what FlashCore does not have yet, rather than a wrong result.
    """
    _refuse("softcap", softcap, "softcapped scores")
    _refuse("s_aux", s_aux, "attention sinks")
    _refuse("position_bias", position_bias, "position biases")
    _refuse("head_mask", head_mask, "masks of heads")
    _refuse(
        "cu_seq_lens_q", kwargs.get("cu_seq_lens_q"), "packed sequences by cu_seq_lens; position_ids will do"
    )
    _refuse("output_attentions", kwargs.get("output_attentions") or None, "attention weights")
    if sliding_window is not None and key.shape[2] > sliding_window:
        _refuse("sliding_window", f"{sliding_window} < {key.shape[2]} keys", "sliding windows")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_causal = query.shape[2] > 1 and attention_mask is None and is_causal  # as Transformers' "sdpa" has it

    if dropout == 0 and not is_watched() and type(query) is torch.Tensor:
        own_mask = _is_bottom_right_causal(attention_mask, query, key)
        if own_mask or (attention_mask is None and (not is_causal or query.shape[2] == key.shape[2])):
            q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            try:
                return api.attention(q, k, v, causal=own_mask or is_causal, scale=scaling), None
            except InvalidInputError:
                pass  # PyTorch may know better
    if attention_mask is not None:
        _refuse("output_attentions", _wants_weights(), "attention weights")
        _warn_that_pytorch_computes("an attention mask: padding, packed sequences or a static cache")
        groups = query.shape[1] // key.shape[1]
        if groups > 1:  # with a mask and grouped heads SDPA would take its unfused path
            key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    elif dropout:
        _warn_that_pytorch_computes("dropout")
    out = computed(query, key, value, attention_mask, dropout, is_causal, scaling, enable_gqa=True)
    if out is None:
        out = torch_sdpa(
            query, key, value, attention_mask, dropout, is_causal, scale=scaling, enable_gqa=True
        ).transpose(1, 2)
    return out.contiguous(), None


def mask(*args, **kwargs) -> torch.Tensor | None:
    """The mask that Transformers makes for SDPA, marked where it is ``flashcore.attention``'s own causal mask.

    :raises UnsupportedError: for models that do not ask an attention function, but would do something with this mask.
    """
    if (reason := _rejects(type(kwargs.get("config")))) is not None:
        raise UnsupportedError(f'attn_implementation="{NAME}": {reason}. Use attn_implementation="eager".')
    _refuse("output_attentions", _wants_weights(), "attention weights")
    made = sdpa_mask(*args, **kwargs)
    if made is not None and not _is_traced_or_captured() and _sees_all_keys(**kwargs):
        made.flashcore_causal = True  # whoever derives another mask from this one gets one without the mark
    return made


def _sees_all_keys(
    q_length=None,
    kv_length=None,
    q_offset=None,
    kv_offset=0,
    attention_mask=None,
    local_size=None,
    allow_is_causal_skip=False,
    **_,
) -> bool:
    """Whether the mask is causal and nothing else, and its last query sees every key.

    So it is for a prompt on top of a dynamic cache. The offset of a static cache is a tensor, and keys follow the last.
    """
    return (
        allow_is_causal_skip  # "rely on is_causal": no packed sequences, no mask function of the model's own
        and isinstance(q_offset, int)
        and q_offset + q_length == kv_offset + kv_length
        and (local_size is None or kv_offset + kv_length <= local_size)
        # One that is shorter than the cache hides the keys that it leaves out.
        and (
            attention_mask is None
            or (attention_mask.shape[-1] >= kv_offset + kv_length and bool(attention_mask.all()))
        )
    )


def _is_traced_or_captured() -> bool:
    """Whether to ask for a tensor's values is to stop, or to decide for other values than these."""
    return is_recorded() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _rejects(config_type: type) -> str | None:
    """Why a model of this configuration cannot use other attention than its own; None if it can, or is unknown."""
    model = transformers.MODEL_MAPPING.get(config_type, None)
    if getattr(model, "_supports_sdpa", True):
        return None
    return f"{model.__name__} has attention of its own only, in Transformers"


def _wants_weights() -> bool | None:
    """Whether attention weights are collected from layers that are not told of it. Transformers 4.57 tells them all."""
    if _collector is None or torch.compiler.is_compiling():
        return None
    return "attentions" in (_collector.get() or ()) or None


def _is_bottom_right_causal(
    attention_mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
) -> bool:
    marked = getattr(attention_mask, "flashcore_causal", False)
    return marked and attention_mask.shape[2:] == (query.shape[2], key.shape[2])


def _refuse(argument: str, given: object, feature: str) -> None:
    if given is not None:
        what = f"{argument} ({given})" if isinstance(given, (int, float, str)) else argument
        raise UnsupportedError(
            f'attn_implementation="{NAME}": {what} is not supported: FlashCore does not have {feature} yet. '
            'Use attn_implementation="sdpa" or "eager" for this model.'
        )


def _warn_that_pytorch_computes(what: str) -> None:
    if not torch.compiler.is_compiling():
        _warn_once(what)


@cache
def _warn_once(what: str) -> None:
    message = f'attn_implementation="{NAME}": PyTorch\'s SDPA computes calls with {what}, which FlashCore does not have'
    warnings.warn(message, FlashCoreWarning, stacklevel=2)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, mask)
