"""What all operations do with a call: cast it, remember how its kind is run, run it on its GPU, or record it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch

from flashcore.problem import DEVICES

MAX_RUNS = 4096

# What the parameters are called elsewhere -> what to write here.
_ELSEWHERE = {
    "is_causal": "causal=",
    "softmax_scale": "scale=",
    "sm_scale": "scale=",
    "window_size": "window=, with None for -1",
    "softcap": "score=flashcore.softcap(...)",
    "alibi_slopes": "score=flashcore.alibi(...)",
    "attn_mask": "score=flashcore.bias(...) for a bias",
    "s_aux": "sink=",
    "learnable_sink": "sink=",
    "return_attn_probs": "return_lse=",
    "return_softmax_lse": "return_lse=",
    "enable_gqa": "nothing: k and v may have fewer heads",
}


def unknown_keywords(function: Callable, unknown: dict[str, Any]) -> str:
    """Python's message about a keyword argument that `function` does not have, and what to write instead."""
    name = next(iter(unknown))
    parameters = [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    hint = _ELSEWHERE.get(name) or f"one of {', '.join(parameters)}"
    return f"{function.__name__}() got an unexpected keyword argument {name!r}: here it is {hint}"


class Runs:
    """How to run each kind of call met so far: at most :data:`MAX_RUNS`, those in use among them.

    They are kept in two generations. A caller looks into :attr:`recent` itself, which is the hot path; when it is full,
    it becomes the older generation, and what is used again comes back.
    """

    def __init__(self) -> None:
        self.recent: dict[Hashable, Any] = {}
        self._older: dict[Hashable, Any] = {}

    def recall(self, key: Hashable) -> Any | None:
        """How to run a kind that is not a recent one; None if it is new."""
        run = self._older.get(key)
        return None if run is None else self.remember(key, run)

    def remember(self, key: Hashable, run: Any) -> Any:
        if len(self.recent) >= MAX_RUNS // 2:
            self._older = dict(self.recent)
            self.recent.clear()
        self.recent[key] = run
        return run

    def clear(self) -> None:
        self.recent.clear()
        self._older = {}

    def __len__(self) -> int:
        return len(self.recent) + len(self._older)


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors as autocast wants them: where it is enabled, all but float64 ones in its dtype."""
    return tuple(map(_autocast_one, tensors))


def _autocast_one(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor) or tensor.device.type not in DEVICES:
        return tensor  # validation has a word on it
    device = tensor.device.type
    if (
        not torch.is_autocast_enabled(device)
        or tensor.dtype is torch.float64
        or not tensor.is_floating_point()
    ):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def operators():
    """The operators for those who record calls or answer them, defined when they are first asked for.

    The one import that points upwards: ``flashcore.ops`` is made of what asks for it.
    """
    from flashcore import ops

    return ops


def on_its_device(tensor: torch.Tensor, run: Callable) -> Callable:
    """`run`, whose first argument lies on `tensor`'s device, with that as the current GPU where there are several."""
    return partial(_on_device, run) if tensor.is_cuda and torch.cuda.device_count() > 1 else run


def _on_device(run: Callable, tensor: torch.Tensor, *others, **named):
    """Run with the tensor's GPU as the current one, as kernels and their stream need it."""
    if torch.cuda.current_device() == tensor.device.index:
        return run(tensor, *others, **named)
    with torch.cuda.device(tensor.device):
        return run(tensor, *others, **named)
