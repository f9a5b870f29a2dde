"""Who looks at a call: what records operators, and what differentiates or batches them. Neither sees a kernel."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

_is_compiling = torch.compiler.is_compiling
_tracing_state = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack


def is_watched() -> bool:
    """Whether it is worth asking the others: whether a call may have to be more than a launch."""
    return (
        _is_compiling() or _tracing_state() is not None or _dispatch_modes() > 0
        or _transform() is not None or forward_ad._current_level >= 0
    )  # fmt: skip


def is_recorded() -> bool:
    """Whether operators are recorded or answered by somebody else: torch.compile, torch.export, ``torch.jit.trace``,
    or a dispatch mode, such as ``make_fx``, fake tensors or a FLOP counter."""
    return _is_compiling() or _tracing_state() is not None or _dispatch_modes() > 0


def is_transformed(*tensors: torch.Tensor | None) -> bool:
    """Whether one of the tensors is wrapped by ``torch.func`` (grad, vjp, vmap, ...) or has a tangent."""
    return any(isinstance(tensor, torch.Tensor) and _is_transformed(tensor) for tensor in tensors)


def _is_transformed(tensor: torch.Tensor) -> bool:
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def answers_itself(tensor: object) -> bool:
    """Whether it is a tensor whose type answers operators itself, perhaps without memory: a fake, distributed one."""
    return isinstance(tensor, torch.Tensor) and type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
