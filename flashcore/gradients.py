"""PyTorch's backward passes, for backends that have none of their own where no other backend's can follow them.

Each takes what a backend's ``backward`` takes, without the config, and returns ``(dq, dk, dv)``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from flashcore import backends
from flashcore.backends import sdpa
from flashcore.problem import AttentionProblem


def torch_flash_rejects(problem: AttentionProblem) -> str | None:
    """The one feature of this problem that PyTorch's flash backward lacks; None if it can."""
    if problem.device != "cuda" or torch.version.hip:
        return "a tensor that is not on an NVIDIA GPU"
    if problem.arch < (8, 0):
        return f"compute capability {problem.arch[0]}.{problem.arch[1]} < 8.0"
    if problem.dtype not in ("bfloat16", "float16"):
        return f"dtype {problem.dtype}"
    if problem.head_dim != problem.head_dim_v:
        return f"head_dim_v {problem.head_dim_v} != head_dim {problem.head_dim}"
    if problem.head_dim % 8:
        return f"head_dim {problem.head_dim}, not a multiple of 8"
    limit = 256 if problem.arch in ((8, 0), (9, 0), (10, 0)) else 192
    if problem.head_dim > limit:
        return f"head_dim {problem.head_dim} > {limit}"
    if problem.causal and problem.seqlen_q != problem.seqlen_k:
        return "causal with seqlen_q != seqlen_k"
    if problem.features:
        return backends.FEATURES[min(problem.features)]
    if problem.scale <= 0:
        return f"scale {problem.scale:g} <= 0"
    return None


def torch_flash(
    problem: AttentionProblem, q, k, v, out, lse, dout, dlse
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """PyTorch's flash-attention backward, fed with the output and LSE of whichever forward ran."""
    generator = torch.empty(0, dtype=torch.int64, device=q.device)  # its seed and offset, for dropout: unused
    grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *(sdpa.readable(t).transpose(1, 2) for t in (dout, q, k, v, out)),
        lse,
        None,  # cum_seq_q and cum_seq_k: all sequences have one length
        None,
        problem.seqlen_q,
        problem.seqlen_k,
        0.0,  # dropout_p
        problem.causal,
        generator,
        generator,
        scale=problem.scale,
    )
    dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
    return dq, dk, dv


def recompute(
    backend: str, problem: AttentionProblem, q, k, v, out, lse, dout, dlse, *extras
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run a backend made of torch operations, on record this time, and let autograd differentiate it."""
    module = backends.load(backend)
    with _on_record():
        inputs = [t.detach().requires_grad_() for t in (q, k, v)]
        out, _ = module.forward(problem, module.configure(problem), *inputs, *extras)
        dq, dk, dv = torch.autograd.grad(out, inputs, dout)
    return dq, dk, dv


@contextlib.contextmanager
def _on_record() -> Iterator[None]:
    """Autograd on, whoever calls: a dispatch mode (a FLOP counter, opcheck) runs operators with its keys excluded."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def of_sinks(
    sink: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor | None = None
) -> torch.Tensor:
    """The gradient of the sinks (heads_q,): a sink is a key whose value is 0."""
    delta = (out.float() * dout.float()).sum(dim=-1).transpose(1, 2)  # (B, Hq, Sq)
    if dlse is not None:
        delta = delta - dlse
    probability = (sink.float()[:, None] - lse).exp()
    return -(probability * delta).sum(dim=(0, 2)).to(sink.dtype)
