"""What all operations do with a call: remember how its kind is run, and run it on its GPU."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch

MAX_RUNS = 4096


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


def on_its_device(tensor: torch.Tensor, run: Callable) -> Callable:
    """`run`, whose first argument lies on `tensor`'s device, with that as the current GPU where there are several."""
    return partial(_on_device, run) if tensor.is_cuda and torch.cuda.device_count() > 1 else run


def _on_device(run: Callable, tensor: torch.Tensor, *others):
    """Run with the tensor's GPU as the current one, as kernels and their stream need it."""
    if torch.cuda.current_device() == tensor.device.index:
        return run(tensor, *others)
    with torch.cuda.device(tensor.device):
        return run(tensor, *others)
