"""The forward kernel on emulated instructions (emulated.py): packed sequences."""

import ctypes
import math

import pytest
import torch

from flashcore.backends.hopper.attention import divisor
from flashcore.backends.hopper.configs import FORWARD_TABLE, choose_packed, tile_head_dim
from flashcore.backends.hopper.launch import diagonals
from flashcore.sequences import Packed
from tests.backends.hopper.emulated import built, maps
from tests.backends.hopper.test_decode_emulated import address, compiler, sequence_arguments
from tests.packed import PackedCase, assert_packed_forward

LN2 = math.log(2)

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++ with C++20's <barrier>")


def packed_forward(case: PackedCase, config=None, paired=False, grid=3, places=None, inputs=None):
    """(out, lse, q, k, v) of the emulated kernel. Everything that it writes is NaN before."""
    q, k, v = inputs or case.inputs()
    problem = case.problem()
    config = config or choose_packed(problem)
    out = torch.full(problem.out_shape, torch.nan, dtype=q.dtype)
    lse = torch.full(problem.lse_shape, torch.nan)
    places = places or case.packed()
    divisors = [ctypes.c_uint64(int(divisor(n))) for n in (problem.heads_q, problem.group_size, 1, 1)]
    extra = [] if problem.kernel_score.change is None else [ctypes.c_float(problem.scale)]
    options = case.options()
    exponent = problem.scale if problem.kernel_score.change is None else problem.kernel_score.factor
    if options["sink"] is not None:
        extra.append(address(options["sink"]))
    built(config).run(
        grid, maps((q, 64), (k, config.tile_n), (v, config.tile_n), (out, 64)), address(lse),
        ctypes.c_float(exponent / LN2), problem.batch, problem.heads_q, *divisors[:2], problem.seqlen_q,
        problem.seqlen_k, *map(int, diagonals(problem)), 0, divisors[2], int(paired), 0, divisors[3],
        *sequence_arguments(places, problem, problem.head_dim_v, out), *extra,
    )  # fmt: skip
    return out, lse, q, k, v


def check(case: PackedCase, **options):
    out, lse, q, k, v = packed_forward(case, **options)
    assert_packed_forward(case, out, lse, q, k, v)


LENGTHS = {
    "several": ((70, 1, 0, 130, 64), (90, 33, 40, 200, 64)),
    "empty_keys": ((20, 0, 70), (0, 0, 100)),
    "one": ((150,), (150,)),
}


@pytest.mark.parametrize(("head_dim", "causal"), [(64, True), (128, False)])
@pytest.mark.parametrize("name", LENGTHS)
def test_packed(head_dim, name, causal):
    check(PackedCase("", *LENGTHS[name], head_dim=head_dim, causal=causal, before=2, after=3))


@pytest.mark.parametrize("heads", [(3, 1), (4, 2)])
def test_units_of_two_tiles(heads):
    case = PackedCase("", (300, 70, 0, 513), (300, 100, 5, 513), heads_q=heads[0], heads_k=heads[1], causal=True)
    check(case, paired=True)


@pytest.mark.parametrize("window", [(40, 0), (0, 0), (100, 30), (None, 20)], ids=str)
def test_windows(window):
    check(PackedCase("", (300, 1, 33), (300, 200, 70), window=window, causal=window[1] == 0))


@pytest.mark.parametrize(("unused", "causal"), [((5, 0, 17), True), ((0, 64, 3), False)])
def test_rows_that_are_not_used(unused, causal):
    check(PackedCase("", (65, 0, 33), (128, 5, 40), unused=unused, causal=causal, before=1))


def test_sinks_and_scales():
    check(PackedCase("", (65, 3), (70, 10), sink=True, causal=True))
    check(PackedCase("", (65, 3), (70, 10), scale=-0.3))


@pytest.mark.parametrize(
    "row", [row for row in FORWARD_TABLE if row.key_parts == 1], ids=lambda row: f"{row.head_dim}-{row.consumers}"
)
def test_every_tile(row):
    case = PackedCase("", (150, 70), (150, 200), heads_q=2, heads_k=1, head_dim=row.head_dim, causal=True)
    assert tile_head_dim(row.head_dim) == row.head_dim
    check(case, config=row.config("bfloat16", True, packed=True))


def test_numbers_beyond_the_tensor():
    """An offset past its end is its end, and a sequence that is longer than the bound is cut off there."""
    case = PackedCase("", (40, 30), (40, 30), causal=True)
    places = case.packed()
    places["queries"].offsets[-1] += 20
    places["keys"].offsets[-1] += 5
    out, lse, q, k, v = packed_forward(case, places=places)
    assert_packed_forward(case, out, lse, q, k, v)

    short = PackedCase("", (40, 30), (40, 30), unused=(8, 0))
    whole = PackedCase("", (48, 30), (48, 30))
    q, k, v = whole.inputs()
    cut = {side: Packed(rows.offsets, 40) for side, rows in whole.packed().items()}
    out, lse, q, k, v = packed_forward(short, places=cut, inputs=(q, k, v))
    assert_packed_forward(short, out, lse, q, k, v)
