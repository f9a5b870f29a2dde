"""``flashcore explain-matmul``: the plan for a matrix product."""

from __future__ import annotations

from typing import Annotated

import typer

from flashcore.cli.console import sizes
from flashcore.cli.hypothetical import arch_of, dtype_of


def explain_matmul(
    shape: Annotated[str, typer.Option(help="m,n,k of (m, k) @ (k, n); swiglu makes n / 2 columns")],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32 or float64")] = "bfloat16",
    out_dtype: Annotated[str | None, typer.Option(help="float32, or as the inputs by default")] = None,
    activation: Annotated[str | None, typer.Option(help="gelu, silu or swiglu")] = None,
    bias: Annotated[bool, typer.Option(help="Add a bias.")] = False,
    weight: Annotated[bool, typer.Option(help="b is the transpose of a linear layer's (n, k) weight.")] = False,
    arch: Annotated[
        str | None, typer.Option(help="Plan for a GPU of this compute capability, such as 9.0, with all libraries.")
    ] = None,
) -> None:
    """Print the plan for a matrix product: backend, tile config and schedule. No tensor is made."""
    from flashcore.gemm_problem import GemmProblem
    from flashcore.plan import plan

    m, n, k = sizes(shape, "m,n,k")
    problem = GemmProblem.hypothetical(
        m,
        n,
        k,
        dtype=dtype_of(dtype),
        arch=arch_of(arch),
        out_dtype=dtype_of(out_dtype, "--out-dtype") if out_dtype else None,
        bias=bias,
        activation=activation,
        weight=weight,
    )
    print(plan(problem, anywhere=arch is not None))
