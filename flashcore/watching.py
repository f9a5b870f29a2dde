"""Who looks at a call: what records operators, and what differentiates or batches them. Neither sees a kernel."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

_is_compiling = torch.compiler.is_dynamo_compiling  # an export without Dynamo is a dispatch mode
_is_tracing = torch._C._is_tracing
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
_transforms = torch._C._are_functorch_transforms_active


def is_watched() -> bool:
    """Whether it is worth asking the others: whether a call may have to be more than a launch."""
    return (  # spelled out: every call asks
        _is_compiling() or _is_tracing() or _dispatch_modes() > 0 or _transforms()
        or forward_ad._current_level >= 0
    )  # fmt: skip


def is_transformed(*tensors: torch.Tensor | None) -> bool:
    """Whether ``torch.func`` transforms what happens here (grad, vjp, vmap, ...), or a tensor has a tangent.

    Ask this first: an operator in a recording loses tangents.
    """
    if _transforms():
        return True
    return forward_ad._current_level >= 0 and any(
        isinstance(tensor, torch.Tensor) and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def is_recorded() -> bool:
    """Whether operators are recorded or answered by somebody else: torch.compile, torch.export, ``torch.jit.trace``,
    or a dispatch mode, such as ``make_fx``, fake tensors or a FLOP counter."""
    return _is_compiling() or _is_tracing() or _dispatch_modes() > 0


def is_batched(tensor: torch.Tensor | None) -> bool:
    """Whether it stands for a batch of tensors without memory of its own: an output's gradient, where autograd is told
    ``is_grads_batched=True``. PyTorch's fallback takes an operator of such tensors apart; a kernel it cannot."""
    return tensor is not None and not _is_compiling() and _is_legacy_batched(tensor)


def keeps_lengths() -> bool:
    """Whether what is decided by a length now is decided for all: ``torch.jit.trace``."""
    return not _is_compiling() and _is_tracing()


def answers_itself(tensor: object) -> bool:
    """Whether it is a tensor whose type answers operators itself, perhaps without memory: a fake, distributed one."""
    return isinstance(tensor, torch.Tensor) and type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
