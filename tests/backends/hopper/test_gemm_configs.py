"""The matrix product's table, its model of time and its schedule: arithmetic that needs no GPU."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashcore.backends.hopper import gemm_configs
from flashcore.backends.hopper.gemm_configs import TILES, choose_gemm, deal_units, schedule
from flashcore.gemm_problem import ACTIVATIONS, GemmProblem

SIZES = st.one_of(st.integers(1, 300), st.sampled_from((1024, 4096, 8192, 11008, 28672)))


def problem(m, n, k, *, batch=1, dtype="bfloat16", out_dtype=None, sm_count=132, **more) -> GemmProblem:
    return GemmProblem(dtype, out_dtype or dtype, "cuda", (9, 0), sm_count, batch, m, n, k, **more)


PROBLEMS = st.builds(
    problem,
    SIZES,
    SIZES.map(lambda n: n + n % 2),
    SIZES,
    batch=st.sampled_from((1, 1, 2, 7)),
    dtype=st.sampled_from(("bfloat16", "float16")),
    out_dtype=st.sampled_from((None, "float32")),
    sm_count=st.sampled_from((132, 114, 78)),
    a_mn_major=st.booleans(),
    b_mn_major=st.booleans(),
    bias=st.booleans(),
    activation=st.sampled_from((None, *ACTIVATIONS)),
)


@given(PROBLEMS)
@settings(deadline=None)
def test_every_problem_gets_a_feasible_config(given_problem):
    config, dealt = choose_gemm(given_problem)
    assert config.infeasible() is None
    assert config.split == (dealt.splits > 1)
    assert dealt.splits <= -(-given_problem.k // 64)
    assert 1 <= dealt.clusters <= given_problem.sm_count // config.cluster_size
    assert config.why


@given(PROBLEMS, st.sampled_from(TILES), st.integers(1, 8))
@settings(deadline=None)
def test_each_block_of_each_tile_is_computed_once_and_waits_only_for_earlier_units(
    given_problem, tile, splits
):
    config = tile.config(given_problem)
    k_blocks = -(-given_problem.k // 64)
    dealt = schedule(given_problem, config, min(splits, k_blocks))
    tiles = dealt.m_tiles * dealt.n_tiles * given_problem.batch
    if tiles > 3000:
        return
    order, seen = {}, {}
    for cluster in range(dealt.clusters):
        for position, (batch, m, n, begin, end, split) in enumerate(
            deal_units(given_problem, dealt, cluster)
        ):
            assert 0 <= batch < given_problem.batch
            assert 0 <= m < dealt.m_tiles
            assert 0 <= n < dealt.n_tiles
            assert begin < end
            seen.setdefault((batch, m, n), []).append((begin, end, split))
            order[batch, m, n, split] = position * dealt.clusters + cluster
    assert len(seen) == tiles
    for tile_index, parts in seen.items():
        parts.sort()
        assert parts[0][0] == 0
        assert parts[-1][1:] == (k_blocks, dealt.splits - 1)  # the last part finishes the tile
        assert all(before[1] == after[0] for before, after in itertools.pairwise(parts))
        if len(parts) > 1:
            units = [order[(*tile_index, split)] for _, _, split in parts]
            assert units == sorted(units)


def test_concurrent_tiles_form_a_compact_area():
    given_problem = problem(8192, 8192, 8192)
    dealt = schedule(given_problem, TILES[0].config(given_problem))
    wave = [deal_units(given_problem, dealt, cluster)[0] for cluster in range(dealt.clusters)]
    rows, columns = ({unit[i] for unit in wave} for i in (1, 2))
    assert len(rows) == 8
    assert len(columns) == 9


@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_few_rows_are_spread_over_the_machine(tokens):
    config, dealt = choose_gemm(problem(tokens, 4096, 11008))
    assert config.tile_m == 64
    assert dealt.clusters * config.cluster_size > 90
    assert dealt.splits > 1


def test_a_full_wave_is_not_split():
    _, dealt = choose_gemm(problem(4096, 4096, 4096))
    assert dealt.splits == 1


def test_a_long_reduction_leaves_no_partial_wave():
    given_problem = problem(8192, 8192, 237568)
    _, dealt = choose_gemm(given_problem)
    assert dealt.splits > 1
    assert dealt.rest(1) < dealt.clusters


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "dtype"),
        ({"tile_m": 192}, "tile_m"),
        ({"tile_n": 264}, "tile_n"),
        ({"tile_n": 96}, "chunks"),
        ({"tile_m": 512}, "accumulators"),
        ({"stages": 5}, "shared memory"),
        ({"tile_n": 64, "b_mn_major": True}, "share of b"),
    ],
)
def test_infeasible(changes, reason):
    config = TILES[0].config(problem(8192, 8192, 8192))
    assert reason in replace(config, **changes).infeasible()


def test_declared_configs_have_their_own_names():
    names = [name for name, _ in gemm_configs.declared_configs()]
    assert len(set(names)) == len(names)
