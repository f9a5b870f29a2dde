"""The named cases of the matrix product, run on every device there is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

GUARD = 512  # elements of NaN before and after each operand


@dataclass(frozen=True)
class GemmCase:
    """One product and how its operands lie in memory; NaN fills whatever is not theirs."""

    name: str
    m: int = 128
    n: int = 128
    k: int = 128
    batch: int | None = None
    a_layout: str = "rows"
    b_layout: str = "columns"  # as the transposed weight of a linear layer
    dtype: str = "bfloat16"
    out_dtype: str | None = None
    bias: bool = False
    activation: str | None = None

    @property
    def columns(self) -> int:
        """Of b."""
        return 2 * self.n if self.activation == "swiglu" else self.n

    def inputs(
        self, device: str = "cpu", seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """a, b and bias: the same numbers on every device. The product's elements are of order 1."""
        generator = torch.Generator().manual_seed(seed)
        dtype = getattr(torch, self.dtype)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        batch = 1 if self.batch is None else self.batch
        a = place(draw(batch, self.m, self.k).to(dtype), self.a_layout, device)
        b = place((draw(batch, self.k, self.columns) * self.k**-0.5).to(dtype), self.b_layout, device)
        if self.batch is None:
            a, b = a[0], b[0]
        bias = draw(self.columns).to(dtype).to(device) if self.bias else None
        return a, b, bias

    @property
    def options(self) -> dict:
        return {
            "out_dtype": getattr(torch, self.out_dtype) if self.out_dtype else None,
            "activation": self.activation,
        }

    def __str__(self) -> str:
        return self.name


def place(matrix: torch.Tensor, layout: str, device: str) -> torch.Tensor:
    """Copy a (batch, rows, columns) tensor to `device` so that it lies there as `layout` says; "shared" is 2-D."""
    batch, rows, columns = matrix.shape
    if layout == "shared":
        return place(matrix[:1], "rows", device)[0]
    if layout == "expanded":
        return place(matrix[:1], "rows", device).expand(matrix.shape)
    strides, shift = {
        "rows": ((rows * columns, columns, 1), 0),
        "columns": ((rows * columns, 1, rows), 0),
        "padded_rows": ((rows * (columns + 24), columns + 24, 1), 0),
        "padded_columns": ((columns * (rows + 8), 1, rows + 8), 8),
        "interleaved": ((columns, batch * columns, 1), 0),  # the batch lies between rows and columns
        "misaligned": ((rows * columns, columns, 1), 1),
        "strided": ((rows * columns * 2, columns * 2, 2), 0),
    }[layout]
    span = 1 + sum((size - 1) * stride for size, stride in zip(matrix.shape, strides, strict=True))
    storage = torch.full((max(span, 0) + shift + 2 * GUARD,), torch.nan, dtype=matrix.dtype, device=device)
    return storage.as_strided(matrix.shape, strides, GUARD + shift).copy_(matrix)


def product(a, b, bias, activation: str | None, dtype: torch.dtype) -> torch.Tensor:
    """The textbook formula in `dtype`."""
    sums = a.to(dtype) @ b.to(dtype)
    if bias is not None:
        sums = sums + bias.to(dtype)
    if activation == "gelu":
        return F.gelu(sums, approximate="tanh")
    if activation == "silu":
        return F.silu(sums)
    if activation == "swiglu":
        gate, factor = sums.chunk(2, dim=-1)
        return F.silu(gate) * factor
    return sums


TAILS = (1, 2, 7, 8, 15, 31, 63, 64, 65, 127, 128, 129)
LAYOUTS = ("rows", "columns")
STRIDED = ("padded_rows", "padded_columns", "misaligned", "strided")

CASES: tuple[GemmCase, ...] = (
    # Every tail once in each dimension; each combination of memory directions.
    *(
        GemmCase(f"tails_{m}x{n}x{k}_{a}_{b}", m, n, k, a_layout=a, b_layout=b)
        for i, (m, n, k) in enumerate(zip(TAILS, TAILS[5:] + TAILS[:5], TAILS[9:] + TAILS[:9], strict=True))
        for a, b in ((LAYOUTS[i % 2], LAYOUTS[i // 2 % 2]),)
    ),
    *(GemmCase(f"{a}_{b}", 200, 264, 328, a_layout=a, b_layout=b) for a in LAYOUTS for b in LAYOUTS),
    *(GemmCase(f"a_{layout}", 136, 200, 72, a_layout=layout, dtype="float16") for layout in STRIDED),
    *(GemmCase(f"b_{layout}", 136, 200, 72, b_layout=layout, dtype="float16") for layout in STRIDED),
    # Sizes: several tiles, few rows, long sums.
    GemmCase("many_tiles", 700, 1100, 200),
    GemmCase("few_rows", 16, 1032, 520),
    GemmCase("one_row", 1, 520, 264),
    GemmCase("long_sum", 128, 256, 5000, b_layout="rows"),
    GemmCase("one_by_one", 1, 1, 1),
    # Outputs.
    GemmCase("float32_output", 129, 264, 200, out_dtype="float32"),
    GemmCase("float32_output_unaligned", 129, 131, 200, dtype="float16", out_dtype="float32"),
    GemmCase("float32", 65, 33, 70, dtype="float32"),
    GemmCase("float64", 65, 33, 70, dtype="float64", bias=True, activation="gelu"),
    # Epilogues.
    *(
        GemmCase(f"{activation or 'bias'}_{dtype}_{out or 'same'}", 130, 136, 96, dtype=dtype, out_dtype=out, bias=True,
                 activation=activation)
        for activation in (None, "gelu", "silu", "swiglu")
        for dtype, out in (("bfloat16", None), ("float16", None), ("bfloat16", "float32"))
    ),
    GemmCase("swiglu_without_bias", 70, 200, 136, activation="swiglu", b_layout="rows"),
    GemmCase("bias_odd", 65, 33, 40, bias=True),
    GemmCase("swiglu_odd", 65, 33, 40, bias=True, activation="swiglu"),
    # Batches.
    GemmCase("batch", 65, 136, 72, batch=3),
    GemmCase("batch_other_layouts", 72, 136, 64, batch=3, a_layout="columns", b_layout="rows", out_dtype="float32"),
    GemmCase("batch_interleaved", 65, 136, 72, batch=3, a_layout="interleaved", b_layout="interleaved"),
    GemmCase("batch_expanded_b", 65, 136, 72, batch=3, b_layout="expanded"),
    GemmCase("batch_one_matrix_b", 65, 136, 72, batch=3, b_layout="shared", bias=True, activation="swiglu"),
    GemmCase("batch_one_matrix_b_not_folded", 65, 136, 72, batch=3, a_layout="interleaved", b_layout="shared"),
    GemmCase("batch_one_matrix_a", 65, 136, 72, batch=3, a_layout="shared"),
    # Nothing to multiply.
    GemmCase("no_rows", m=0),
    GemmCase("no_columns", n=0),
    GemmCase("no_batch", batch=0),
)  # fmt: skip
