"""``flashcore explain``: the plan for a call of attention."""

from __future__ import annotations

from typing import Annotated

import typer

from flashcore.cli.console import ATTENTION, sizes
from flashcore.cli.hypothetical import arch_of, dtype_of


def explain(
    shape: Annotated[str, typer.Option(help=ATTENTION)],
    causal: Annotated[bool, typer.Option(help="Hide the future.")] = False,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32 or float64")] = "bfloat16",
    scale: Annotated[float | None, typer.Option(help="Of the scores; head_dim ** -0.5 by default.")] = None,
    grad: Annotated[bool, typer.Option(help="As if an input required a gradient.")] = False,
    lse: Annotated[bool, typer.Option(help="As if the LSE were asked for.")] = False,
    backend: Annotated[str, typer.Option(help="auto, or a backend's name")] = "auto",
    arch: Annotated[
        str | None, typer.Option(help="Plan for a GPU of this compute capability, such as 9.0, with all libraries.")
    ] = None,
) -> None:
    """Print the plan for a call of attention: backend, tile config, backward pass, and why not the others.

    No tensor is made and nothing is launched. With --arch no GPU is needed either.
    """
    from flashcore.plan import plan
    from flashcore.problem import AttentionProblem

    batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim = sizes(shape, ATTENTION)
    problem = AttentionProblem.hypothetical(
        (batch, seqlen_q, heads_q, head_dim),
        (batch, seqlen_k, heads_k, head_dim),
        dtype=dtype_of(dtype),
        arch=arch_of(arch),
        causal=causal,
        scale=scale,
        needs_grad=grad,
        return_lse=lse,
    )
    print(plan(problem, backend, anywhere=arch is not None))
