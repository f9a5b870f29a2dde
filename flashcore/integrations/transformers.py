"""FlashCore as an attention implementation of Hugging Face Transformers.

>>> import flashcore.integrations.transformers
>>> model = AutoModelForCausalLM.from_pretrained("...", attn_implementation="fcore")  # or model.set_attn_implementation

FlashCore computes what reaches it without a mask, and where the mask is a causal one or a sliding window's and nothing
else: prefill, also on top of a dynamic cache, decoding with a dynamic cache, training. Batches with padding, sequences
packed by ``position_ids`` alone, the steps of a static cache, masks of other kinds, and dropout go to PyTorch's SDPA
with the mask that Transformers makes for it; a FlashCoreWarning says so once. The mask says which keys are seen:
windows that it already hides are not applied once more.

Packed sequences are FlashCore's where ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_length_q`` and ``max_length_k`` come
with the call, as ``DataCollatorWithFlattening(return_flash_attn_kwargs=True)`` has them. As with flash-attn these alone
say which keys are seen, beside causality and the layer's window: no mask is looked at. With dropout or a position bias
they raise UnsupportedError.

What PyTorch's SDPA does not have is FlashCore's with any mask, which is added to the scores where it is none of the
above: softcap (Gemma 2) and sinks (gpt-oss). With dropout they raise UnsupportedError. Position biases (T5) are added
to the scores where they need no gradient, and go to PyTorch's SDPA as a mask where they do.

Models that look their attention layers up in a table of their own (Falcon, GPT-J, GPT-Neo, Bark, the vision encoder of
SAM, ...) never ask an attention function: they raise UnsupportedError when they are built.

A sliding window that no mask hides, masks of heads and ``output_attentions`` raise UnsupportedError.

Of a model that torch.compile traces as a whole, Transformers makes a mask for every call: compile its layers instead,
``for layer in model.model.layers: layer.compile()``. Packed sequences are FlashCore's in either; the mask that
Transformers makes beside their lengths, of which no mask function is told, takes memory and time all the same.

Transformers 4.57 makes more masks than 5: there a prompt on top of any cache, the prompt of a static one, and training
with neither a cache nor an attention mask go to PyTorch too.
"""

from __future__ import annotations

import sys
import warnings
from functools import cache, wraps

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from flashcore import api
from flashcore.backends.sdpa import scaled_dot_product_attention as torch_sdpa
from flashcore.errors import FlashCoreWarning, InvalidInputError, UnsupportedError
from flashcore.integrations.sdpa import computed
from flashcore.mask import CAUSAL, FULL, Mask
from flashcore.problem import check_tensors
from flashcore.score import LOOKUP_DTYPES, bias, chained
from flashcore.score import softcap as softcapped
from flashcore.sequences import Packed
from flashcore.watching import is_recorded, is_transformed, is_watched

try:
    from transformers.utils.output_capturing import _active_collector as _collector
except ImportError:
    _collector = None

__all__ = ["NAME", "attention_forward", "mask"]

# Transformers takes every name with "flash" in it for one of the flash-attn packages, and tries to import that.
NAME = "fcore"

# Models that Transformers keeps from SDPA for its lack of sinks only.
_WITH_SINKS = ("gpt_oss", "granite_swa", "granitemoe_swa")


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
    :param sliding_window: how many keys the mask shows a query.
    :param softcap: scores become ``softcap * tanh(score / softcap)``.
    :param s_aux: sinks (heads,): ``exp(sink)`` joins the softmax's denominator.
    :param position_bias: (1 or batch, heads, seqlen, seqlen_k), added to the scores.
    :returns: out (batch, seqlen, heads, head_dim), contiguous, and None for the weights.
    :raises UnsupportedError: for what FlashCore does not have yet, rather than a wrong result.
    """
    _refuse("head_mask", head_mask, "masks of heads")
    _refuse("output_attentions", kwargs.get("output_attentions") or None, "attention weights")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if kwargs.get("cu_seq_lens_q") is not None:
        _refuse("dropout", dropout or None, "dropout in packed sequences")
        _refuse("position_bias", position_bias, "position biases of packed sequences")
        lengths = (kwargs.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"))
        return _packed(query, key, value, *lengths, is_causal, scaling, sliding_window, softcap, s_aux), None
    if attention_mask is None and sliding_window is not None and key.shape[2] > sliding_window:
        _refuse("sliding_window", f"{sliding_window} < {key.shape[2]} keys", "sliding windows without a mask of them")
    is_causal = query.shape[2] > 1 and attention_mask is None and is_causal  # as Transformers' "sdpa" has it

    if softcap is not None or s_aux is not None:
        _refuse("dropout", dropout or None, "dropout, and PyTorch's SDPA no softcap and no sinks")
        return _scored(query, key, value, attention_mask, is_causal, scaling, sliding_window, softcap, s_aux,
                       position_bias), None  # fmt: skip
    plain = dropout == 0 and type(query) is torch.Tensor and _decides_for_this_call(query, key, value)
    if position_bias is not None:
        if plain and position_bias.dtype in LOOKUP_DTYPES and not _is_learned(position_bias):
            return _scored(query, key, value, attention_mask, is_causal, scaling, sliding_window, None, None,
                           position_bias), None  # fmt: skip
        _warn_that_pytorch_computes("a position bias with a gradient, in float64, with dropout or when traced")
        attention_mask, is_causal = _added(position_bias.to(query.dtype), attention_mask, is_causal, query, key), False
    elif plain and (shown := _shown(attention_mask, is_causal, query, key, sliding_window)) is not None:
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        try:
            if is_recorded():  # an operator's error cannot be caught while it is traced
                check_tensors(q, k, v)
            return api.attention(q, k, v, **_arguments(shown), scale=scaling), None
        except InvalidInputError:
            pass  # PyTorch may know better
    if attention_mask is not None:
        _refuse("output_attentions", _wants_weights(), "attention weights")
        if position_bias is None:
            _warn_that_pytorch_computes("an attention mask: padding, packed position_ids or a static cache")
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


def _scored(
    query, key, value, attention_mask, is_causal, scaling, sliding_window, softcap, s_aux, position_bias
) -> torch.Tensor:
    """Attention with softcap, sinks or a position bias. A mask that is no :class:`Mask` is added to the scores."""
    if attention_mask is not None:
        _refuse("output_attentions", _wants_weights(), "attention weights")
    shown = _shown(attention_mask, is_causal, query, key, sliding_window)
    added = position_bias
    if shown is None:
        shown, start = FULL, query.new_zeros(1, 1, 1, 1) if position_bias is None else position_bias
        added = _added(start, attention_mask, is_causal, query, key)
    score = chained(None if softcap is None else softcapped(softcap), None if added is None else bias(added))
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return api.attention(q, k, v, **_arguments(shown), scale=scaling, score=score, sink=_sinks(s_aux, query))


def _sinks(s_aux: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """The sinks, in a dtype that they may have beside the queries."""
    return s_aux if s_aux is None or s_aux.dtype in (torch.float32, query.dtype) else s_aux.float()


def _packed(
    query, key, value, offsets_q, offsets_k, longest_q, longest_k, is_causal, scaling, sliding_window, softcap, s_aux
) -> torch.Tensor:
    """Attention of the sequences that all rows of the batch hold, one after the other."""
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    queries, keys = _places("q", offsets_q, longest_q, q), _places("k", offsets_k, longest_k, k)
    left = None if sliding_window is None or keys.longest <= sliding_window else sliding_window - 1
    out = api.attention(
        q, k, v, causal=is_causal, window=None if left is None else (left, 0 if is_causal else left), scale=scaling,
        score=None if softcap is None else softcapped(softcap), sink=_sinks(s_aux, query), queries=queries, keys=keys,
    )  # fmt: skip
    return out.unflatten(0, (query.shape[0], -1))


def _places(side: str, offsets: object, longest: object, rows: torch.Tensor) -> Packed:
    """Where the sequences lie. A length that a GPU would have to be asked for is at most that of all together."""
    if not isinstance(offsets, torch.Tensor):
        _refuse(f"cu_seq_lens_{side}", type(offsets).__name__, "packed sequences without offsets of both sides")
    if not isinstance(longest, int):
        longest = rows.shape[0] if longest is None or longest.is_cuda else int(longest)
    return Packed(offsets.to(torch.int32), longest)


def _decides_for_this_call(query, key, value) -> bool:
    """Whether what is seen, and that nobody transforms it, may be decided now: what Dynamo records has guards."""
    return not is_watched() or (torch.compiler.is_dynamo_compiling() and not is_transformed(query, key, value))


def _shown(attention_mask, is_causal, query, key, sliding_window) -> Mask | None:
    """What is seen, aligned to the bottom right; None where no :class:`Mask` says it."""
    if attention_mask is None:  # SDPA aligns `is_causal` to the top left
        return FULL if not is_causal else CAUSAL if query.shape[2] == key.shape[2] else None
    own = getattr(attention_mask, "flashcore_mask", None)
    if own is None or attention_mask.shape[2:] != (query.shape[2], key.shape[2]):
        return None
    if own.left is not None and sliding_window != own.left + 1:
        return None  # chunks of keys have the same size in the layer's mask, but are no window
    return own if own.of(query.shape[2], key.shape[2]).bounded_left else CAUSAL


def _arguments(shown: Mask) -> dict:
    """The arguments of ``flashcore.attention`` that show this."""
    return {"causal": shown.right == 0, "window": None if shown.left is None else (shown.left, shown.right)}


def _added(start, attention_mask, is_causal, query, key) -> torch.Tensor:
    """What is added to scores: `start` where a key is seen, a number like -inf elsewhere, as in eager attention."""
    if attention_mask is None and is_causal:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        attention_mask = attention_mask[None, None]
    if attention_mask is None:
        return start
    if attention_mask.dtype != torch.bool:
        return start + attention_mask
    return torch.where(attention_mask, start, torch.finfo(start.dtype).min)


def _is_learned(tensor: torch.Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def mask(*args, **kwargs) -> torch.Tensor | None:
    """The mask that Transformers makes for SDPA, marked where it is one of ``flashcore.attention``'s own masks.

    :raises UnsupportedError: for models that do not ask an attention function, but would do something with this mask.
    """
    if (reason := _rejects(type(kwargs.get("config")))) is not None:
        raise UnsupportedError(f'attn_implementation="{NAME}": {reason}. Use attn_implementation="eager".')
    _refuse("output_attentions", _wants_weights(), "attention weights")
    made = sdpa_mask(*args, **kwargs)
    if made is not None and not _is_traced_or_captured() and (own := _own_mask(**kwargs)) is not None:
        made.flashcore_mask = own  # whoever derives another mask from this one gets one without the mark
    return made


def _own_mask(
    q_length=None,
    kv_length=None,
    q_offset=None,
    kv_offset=0,
    attention_mask=None,
    local_size=None,
    allow_is_causal_skip=False,
    **_,
) -> Mask | None:
    """The mask, aligned to the bottom right, if it is causal or a window of `local_size` keys, and nothing else.

    So it is for a prompt, also on top of a dynamic cache. The offset of a static cache is a tensor, and keys follow the
    last query. What Transformers attends to in chunks of `local_size` looks the same here, and not to the layer.
    """
    if (
        allow_is_causal_skip  # "rely on is_causal": no packed sequences, no mask function of the model's own
        and isinstance(q_offset, int)
        and q_offset + q_length == kv_offset + kv_length
        # One that is shorter than the cache hides the keys that it leaves out.
        and (
            attention_mask is None
            or (attention_mask.shape[-1] >= kv_offset + kv_length and bool(attention_mask.all()))
        )
    ):
        return CAUSAL if local_size is None or kv_offset + kv_length <= local_size else Mask(local_size - 1, 0)
    return None


def _is_traced_or_captured() -> bool:
    """Whether to ask for a tensor's values is to stop, or to decide for other values than these."""
    return is_recorded() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


@torch.compiler.assume_constant_result  # the first look imports the model's module, which cannot be traced
def _rejects(config_type: type) -> str | None:
    """Why a model of this configuration cannot use other attention than its own; None if it can, or is unknown."""
    model = transformers.MODEL_MAPPING.get(config_type, None)
    if getattr(config_type, "model_type", None) in _WITH_SINKS or getattr(model, "_supports_sdpa", True):
        return None
    return f"{model.__name__} has attention of its own only, in Transformers"


class _NoLayer:
    """What models that look their attention layers up by the implementation's name find under FlashCore's."""

    def __init__(self, *_, **__):
        raise UnsupportedError(
            f'attn_implementation="{NAME}": this model has a table of attention layers, and asks no attention function '
            'of Transformers. Use "eager", or what else the table has, for it, or for that part of it: '
            f'attn_implementation={{"": "{NAME}", "vision_config": "eager"}}.'
        )


def _tables(model: type) -> list[dict]:
    """The tables of attention layers, by the implementation's name, beside a model's class and its bases."""
    modules = [sys.modules[name] for name in {base.__module__ for base in model.__mro__} if name in sys.modules]
    tables = [value for module in modules for value in vars(module).values() if isinstance(value, dict)]
    layers = [table.get("eager") for table in tables]
    is_layer = [isinstance(layer, type) and issubclass(layer, torch.nn.Module) for layer in layers]
    return [table for table, found in zip(tables, is_layer, strict=True) if found]


def _prepared_for_us(check):
    """`check`, which Transformers asks for each model's attention implementation before it builds the layers."""

    @wraps(check)
    def get_correct_attn_implementation(self, requested_attention, *args, **kwargs):
        if requested_attention == NAME:
            for table in _tables(type(self)):
                table.setdefault(NAME, _NoLayer)
        return check(self, requested_attention, *args, **kwargs)

    return get_correct_attn_implementation


def _wants_weights() -> bool | None:
    """Whether attention weights are collected from layers that are not told of it. Transformers 4.57 tells them all."""
    if _collector is None or torch.compiler.is_compiling():
        return None
    return "attentions" in (_collector.get() or ()) or None


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


PreTrainedModel.get_correct_attn_implementation = _prepared_for_us(PreTrainedModel.get_correct_attn_implementation)
AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, mask)
