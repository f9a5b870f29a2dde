"""When a result is right: FlashAttention's rule.

The largest error against float64 may be at most twice the error that PyTorch's own operations make in the same dtype,
plus a little that is derived from the data. Infinities and NaNs are compared first: by position, not by distance.

The truth here is :func:`attention_math`, written without any of FlashCore, so that the reference backend is held to
the same rule as the others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

FORWARD_FACTOR = 2.0
BACKWARD_FACTOR = 3.0  # FlashAttention's, for gradients
LSE_RELATIVE = 1e-5  # float32 scores, and the hardware's approximate exp2 and log2


def attention_math(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    scale: float | None,
    dtype: torch.dtype | None = None,
    window: tuple[int | None, int | None] | None = None,
    score: Callable | None = None,
    sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in `dtype`, by default that of q, one textbook operation after the other. Differentiable.

    :param score: a function of the scaled scores and of index tensors.
    :returns: out (B, Sq, Hq, Dv) and lse (B, Hq, Sq) in that dtype; a query without a key gives 0 and -inf,
        or its sink.
    """
    dtype = dtype or q.dtype
    seqlen_q, seqlen_k, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    q, k, v = (t.to(dtype).transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scores = q @ (k * (q.shape[-1] ** -0.5 if scale is None else scale)).transpose(-1, -2)
    query, key = (torch.arange(n, device=q.device) for n in (seqlen_q, seqlen_k))
    if score is not None:
        batch, head = (torch.arange(n, device=q.device) for n in scores.shape[:2])
        scores = score(scores, batch[:, None, None, None], head[:, None, None], query[:, None], key).to(dtype)
    left, right = window or (None, None)
    distance = key - (query[:, None] + seqlen_k - seqlen_q)  # to the right
    hidden = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device)
    if causal or right is not None:
        hidden |= distance > (0 if causal else right)
    if left is not None:
        hidden |= distance < -left
    scores = torch.where(hidden, -torch.inf, scores)
    if sink is not None:  # one more key, whose value is 0
        scores = torch.cat([scores, sink.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
        v = torch.nn.functional.pad(v, (0, 0, 0, 1))
    if scores.shape[-1] == 0:
        return (scores @ v).transpose(1, 2), q.new_full(q.shape[:3], -torch.inf)
    empty = (scores == -torch.inf).all(dim=-1)
    probabilities = torch.where(empty[..., None], 0.0, scores.softmax(dim=-1))
    lse = torch.where(empty, -torch.inf, scores.logsumexp(dim=-1))
    return (probabilities @ v).transpose(1, 2), lse


def assert_forward(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    **features,
) -> None:
    """Assert that `out`, and `lse` unless it is None, are attention of q, k and v."""
    with torch.no_grad():
        exact, exact_lse = attention_math(q, k, v, causal=causal, scale=scale, dtype=torch.float64, **features)
        torch_out, _ = attention_math(q, k, v, causal=causal, scale=scale, **features)
    assert out.dtype == q.dtype, f"out is {out.dtype}, q is {q.dtype}"
    assert out.is_contiguous(), f"out has strides {out.stride()}"
    # A score's rounding error grows with the score, and moves a value's weight by as much.
    summands = _largest(v) * max(1.0, _largest(exact_lse))
    assert_as_good_as(torch_out, out, exact, "out", factor=FORWARD_FACTOR, summands=summands)
    if lse is not None:
        assert lse.dtype == torch.float32, f"lse is {lse.dtype}"
        assert lse.is_contiguous(), f"lse has strides {lse.stride()}"
        assert_same_specials(lse, exact_lse, "lse")
        error = _largest(lse.double() - exact_lse)
        allowed = LSE_RELATIVE * max(1.0, _largest(exact_lse))
        assert error <= allowed, f"lse: error {error:.3g}, allowed {allowed:.3g}"


def assert_gradients(
    grads: tuple[torch.Tensor, ...],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    **features,
) -> None:
    """Assert that `grads` are the gradients of attention with respect to q, k and v for the output gradient `dout`."""
    exact = _gradients(q, k, v, dout, torch.float64, causal=causal, scale=scale, **features)
    by_torch = _gradients(q, k, v, dout, q.dtype, causal=causal, scale=scale, **features)
    for name, like, grad, reference, truth in zip(
        ("dq", "dk", "dv"), (q, k, v), grads, by_torch, exact, strict=True
    ):
        assert grad.dtype == like.dtype, f"{name} is {grad.dtype}, its tensor {like.dtype}"
        assert_as_good_as(reference, grad, truth, name, factor=BACKWARD_FACTOR)


def assert_as_good_as(
    by_torch: torch.Tensor,
    result: torch.Tensor,
    exact: torch.Tensor,
    what: str,
    *,
    factor: float,
    summands: float = 0.0,
) -> None:
    """Assert that `result` is at most `factor` times as far from `exact` as `by_torch` is, plus a rounding or two.

    :param summands: the magnitude at which the float32 accumulator rounds, where that exceeds the result's.
    """
    assert result.shape == exact.shape, (
        f"{what} has shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
    )
    assert_same_specials(result, exact, what)
    error = _largest(result.double() - exact)
    torch_error = _largest(by_torch.double() - exact)

    largest = _largest(exact)
    rounding = (
        torch.finfo(result.dtype).eps / 2 * largest
    )  # of the result; PyTorch may be lucky on a few elements
    rounded = exact.to(result.dtype)
    slack = 2 * _largest(
        (rounded + 0.3 - 0.3 - rounded).double()
    )  # FlashAttention's: rounding at magnitude 0.3
    if result.dtype is torch.float64:  # the truth is no better: both sum with float64's error, over tens of rows
        slack += 32 * torch.finfo(torch.float64).eps * max(largest, summands)
    else:
        slack += 4 * torch.finfo(torch.float32).eps * max(largest, summands)

    allowed = factor * max(torch_error, rounding) + slack
    assert error <= allowed, (
        f"{what}: error {error:.3g}, allowed {allowed:.3g} = {factor:g} x PyTorch's {torch_error:.3g} + {slack:.3g}"
    )


def assert_same_specials(result: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    """Assert that NaN, inf and -inf are where they should be, and nowhere else."""
    for name, test in {"NaN": torch.isnan, "inf": torch.isposinf, "-inf": torch.isneginf}.items():
        wrong = test(result) != test(exact)
        if wrong.any():
            index = tuple(wrong.nonzero()[0].tolist())
            raise AssertionError(
                f"{what}: {name} in the wrong places: {int(wrong.sum())} of {wrong.numel()} elements, the first at "
                f"{index}: {result[index].item()}, expected {exact[index].item()}"
            )


def _gradients(q, k, v, dout, dtype, **options) -> tuple[torch.Tensor, ...]:
    inputs = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        out, _ = attention_math(*inputs, **options)
    return torch.autograd.grad(out, inputs, dout.to(dtype))


def _largest(values: torch.Tensor) -> float:
    """The largest finite magnitude; the others were compared by position."""
    finite = values[values.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0
