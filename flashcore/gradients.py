"""Gradients of what a score brings, from what attention's backward pass has anyway."""

from __future__ import annotations

import torch


def of_results(
    out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor | None, dlse: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(dout, dlse) as a backward pass takes them: `dout` is always there, though the loss may depend on the LSE alone.

    An LSE of -inf is that of a query without keys, a constant: its gradient is 0, whatever came of merging it.
    """
    dout = torch.zeros_like(out) if dout is None else dout
    return dout, dlse if dlse is None else dlse.masked_fill(lse.isneginf(), 0.0)


def of_sinks(
    sink: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor | None = None
) -> torch.Tensor:
    """The gradient of the sinks (heads_q,): a sink is a key whose value is 0."""
    if out.dim() == 3:  # packed sequences: (total, Hq, Dv) and (Hq, total)
        out, lse, dout, dlse = (t if t is None else t[None] for t in (out, lse, dout, dlse))
    exact = torch.promote_types(out.dtype, torch.float32)
    delta = (out.to(exact) * dout.to(exact)).sum(dim=-1).transpose(1, 2)  # (B, Hq, Sq)
    if dlse is not None:
        delta = delta - dlse
    # A row without keys whose sink is -inf as well has no probabilities, not NaN.
    probability = (sink.to(exact)[:, None] - lse).exp().masked_fill(lse.isneginf(), 0.0)
    return -(probability * delta).sum(dim=(0, 2)).to(sink.dtype)
