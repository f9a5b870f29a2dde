"""The matrix product's table, its model of time and its schedule: arithmetic that needs no GPU."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashcore.backends.hopper import gemm_configs
from flashcore.backends.hopper.gemm_configs import TILES, candidate_parts, choose_gemm, deal_units, schedule
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
    assert config.split == (dealt.parts > 0)
    assert dealt.parts <= dealt.clusters
    assert 1 <= dealt.clusters <= given_problem.sm_count // config.cluster_size
    assert config.why


@given(PROBLEMS, st.sampled_from(TILES), st.floats(0, 1))
@settings(deadline=None)
def test_each_block_of_each_tile_is_computed_once_and_finished_by_the_highest_cluster(
    given_problem, tile, which
):
    config = tile.config(given_problem)
    k_blocks = -(-given_problem.k // 64)
    parts = (0, *candidate_parts(given_problem, config))
    dealt = schedule(given_problem, config, parts[int(which * (len(parts) - 1))])
    tiles = dealt.m_tiles * dealt.n_tiles * given_problem.batch
    if tiles > 3000:
        return
    seen = {}
    for cluster in range(dealt.clusters):
        handed_over = 0
        for position, (batch, m, n, begin, end) in enumerate(deal_units(given_problem, dealt, cluster)):
            assert 0 <= batch < given_problem.batch
            assert 0 <= m < dealt.m_tiles
            assert 0 <= n < dealt.n_tiles
            assert begin < end
            seen.setdefault((batch, m, n), []).append((cluster, position, begin, end))
            handed_over += end < k_blocks
        assert handed_over <= 1  # a cluster has room for one partial result
    assert len(seen) == tiles
    for pieces in seen.values():
        pieces.sort()
        assert len({cluster for cluster, *_ in pieces}) == len(pieces)
        # Clusters without a gap, in order of k: the last one finds the others by counting down.
        assert pieces[0][2] == 0
        assert pieces[-1][3] == k_blocks
        for before, after in itertools.pairwise(pieces):
            assert after[0] == before[0] + 1
            assert after[2] == before[3]


@given(PROBLEMS, st.sampled_from(TILES), st.integers(1, 132))
@settings(deadline=None)
def test_a_product_of_which_few_clusters_run_at_a_time_comes_to_an_end(given_problem, tile, room):
    """Two products that share the GPU: only the first clusters run, the next one starts when one has finished."""
    config = tile.config(given_problem)
    parts = candidate_parts(given_problem, config)
    if not parts:
        return
    k_blocks = -(-given_problem.k // 64)
    dealt = schedule(given_problem, config, parts[-1])
    shared = lambda units: [unit for unit in units if unit[4] - unit[3] < k_blocks]  # noqa: E731
    queues = {c: shared(deal_units(given_problem, dealt, c)) for c in range(dealt.clusters)}
    running, waiting, handed_over = list(queues)[:room], list(queues)[room:], {}
    while running:
        finished = []
        for cluster in running:
            units = queues[cluster]
            while units:
                *tile_index, begin, end = units[0]
                tile_index = tuple(tile_index)
                if end == k_blocks and handed_over.get(tile_index, 0) < begin:
                    break  # waits for the rest of its tile
                if end < k_blocks:
                    handed_over[tile_index] = handed_over.get(tile_index, 0) + end - begin
                units.pop(0)
            if not units:
                finished.append(cluster)
        assert finished, "all wait for clusters that cannot start"
        running = [c for c in running if c not in finished]
        while waiting and len(running) < room:
            running.append(waiting.pop(0))
    assert not waiting


def test_concurrent_tiles_form_a_compact_area():
    given_problem = problem(8192, 8192, 8192)
    dealt = schedule(given_problem, TILES[1].config(given_problem))
    wave = [deal_units(given_problem, dealt, cluster)[0] for cluster in range(dealt.clusters)]
    rows, columns = ({unit[i] for unit in wave} for i in (1, 2))
    assert len(rows) == 8
    assert len(columns) == 9


@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_few_rows_are_spread_over_the_machine(tokens):
    config, dealt = choose_gemm(problem(tokens, 4096, 11008))
    assert config.tile_m == 64
    assert dealt.clusters * config.cluster_size > 90
    assert dealt.parts > 0


def test_a_full_wave_is_not_split():
    _, dealt = choose_gemm(problem(4096, 4096, 4096))
    assert dealt.parts == 0


def test_a_long_reduction_leaves_no_partial_wave():
    given_problem = problem(8192, 8192, 237568)
    _, dealt = choose_gemm(given_problem)
    assert dealt.parts == dealt.clusters
    assert 0 < dealt.rest(1) < dealt.clusters


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
    config = TILES[1].config(problem(8192, 8192, 8192))
    assert reason in replace(config, **changes).infeasible()


def test_declared_configs_have_their_own_names():
    names = [name for name, _ in gemm_configs.declared_configs()]
    assert len(set(names)) == len(names)
