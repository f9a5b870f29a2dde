"""The backward's tile table and its schedule: every pair of tiles once, sums in order, no CTA that waits for ever."""

import collections
import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashcore.backends.hopper.backward_configs import (
    BACKWARD_TABLE,
    BackwardConfig,
    choose_backward,
    deal_key_tiles,
    declared_backward_configs,
    declared_wide_configs,
    m_begin,
    m_blocks,
    m_end,
    n_blocks,
    section,
    walk,
    wide_rounds,
)
from flashcore.mask import CAUSAL, FULL, Mask
from flashcore.problem import AttentionProblem

PROBLEM = AttentionProblem(
    dtype="bfloat16", device="cuda", arch=(9, 0), sm_count=132, batch=2, seqlen_q=1024, seqlen_k=1024, heads_q=8,
    heads_k=2, head_dim=128, head_dim_v=128, mask=CAUSAL, scale=0.1,
)  # fmt: skip

problems = st.builds(
    lambda batch, q, k, heads_k, group, head_dim, mask: dataclasses.replace(
        PROBLEM, batch=batch, seqlen_q=q, seqlen_k=k, heads_k=heads_k, heads_q=heads_k * group, head_dim=head_dim,
        head_dim_v=head_dim, mask=mask,
    ),
    st.integers(1, 3), st.integers(1, 700), st.integers(1, 700), st.integers(1, 3), st.integers(1, 3),
    st.sampled_from([64, 128, 256]),
    st.one_of(
        st.sampled_from([FULL, CAUSAL]),
        st.builds(Mask, st.none() | st.integers(0, 400), st.none() | st.integers(0, 400)),
    ),
)  # fmt: skip


def test_declared_configs_are_feasible():
    for name, config in declared_backward_configs():
        assert config.infeasible() is None, name
    assert len(dict(declared_backward_configs())) == 6 * len(BACKWARD_TABLE)


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_head_dim_up_to_256_gets_a_declared_config(head_dim):
    config = choose_backward(dataclasses.replace(PROBLEM, head_dim=head_dim, head_dim_v=head_dim))
    assert config in [declared for _, declared in declared_backward_configs() + declared_wide_configs()]
    assert head_dim <= config.head_dim < head_dim + 64
    assert config.why


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(dtype="float32"), "float32"),
        (dict(head_dim=264, head_dim_v=264), "head_dim 264 > 256"),
        (dict(head_dim=20, head_dim_v=20), "head_dim 20 is not"),
    ],
)
def test_problems_that_the_kernels_do_not_take(change, reason):
    with pytest.raises(LookupError, match=reason):
        choose_backward(dataclasses.replace(PROBLEM, **change))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(dtype="float32"), "float32"),
        (dict(head_dim=96), "head_dim 96"),
        (dict(tile_m=128), "128 x 128"),
        (dict(stages=1), "1 stages"),
        (dict(stages=4), "bytes of shared memory"),
        (dict(dq_buffers=0), "no buffer"),
    ],
)
def test_infeasible(change, reason):
    good = BackwardConfig("bfloat16", 128, False, True, 64, 3, 1)
    assert good.infeasible() is None
    assert reason in dataclasses.replace(good, **change).infeasible()


@given(problems)
@settings(max_examples=100, deadline=None)
def test_pairs_of_tiles_that_see_each_other_are_walked_once(problem):
    config = choose_backward(problem)
    blocks, keys = m_blocks(config, problem), n_blocks(config, problem)
    seen = collections.Counter()
    for batch_head, n in deal_key_tiles(config, problem):
        steps = walk(config, problem, n)
        assert len(steps) == problem.group_size * (m_end(config, problem, n) - m_begin(config, problem, n))
        seen.update((batch_head, n, head, m) for head, m in steps)
    assert set(seen.values()) == {1}
    for m in range(blocks):
        queries = range(m * config.tile_m, min((m + 1) * config.tile_m, problem.seqlen_q))
        first, stop = problem.visible.kv_range(queries.start, queries.stop)
        turns = [n for n in range(keys) if (0, n, 0, m) in seen]
        first_turn = problem.visible.begin(queries.start) // config.tile_n
        assert turns == list(range(first_turn, first_turn + len(turns)))  # the counter starts at the first
        for n in range(keys):
            wanted = n * config.tile_n < stop and (n + 1) * config.tile_n > first
            for head in range(problem.group_size):
                assert ((0, n, head, m) in seen) == wanted
        # Tiles that nobody sees are those the last kernel sets to 0.
        assert (m < m_begin(config, problem, 0)) == (stop == 0)


@given(problems, st.integers(1, 9), st.randoms())
@settings(max_examples=100, deadline=None)
def test_sums_are_ordered_and_nobody_waits_for_ever(problem, sms, random):
    """CTAs start in order where one has ended, and are otherwise as slow or fast as chance has it."""
    config = choose_backward(problem)
    tiles = deal_key_tiles(config, problem)
    walks = ((batch_head, n, collections.deque(walk(config, problem, n))) for batch_head, n in tiles)
    todo = collections.deque(walk for walk in walks if walk[2])
    running, turns = [], collections.Counter()

    def turn(n, m):
        return n - problem.visible.begin(m * config.tile_m) // config.tile_n

    order = collections.defaultdict(list)
    while todo or running:
        while todo and len(running) < sms:
            running.append(todo.popleft())
        # Whose turn it is at their next sum.
        ready = [cta for cta in running if turns[cta[0], cta[2][0]] == turn(cta[1], cta[2][0][1])]
        assert ready, "all CTAs wait"
        cta = random.choice(ready)
        batch_head, n, steps = cta
        key = batch_head, steps.popleft()
        order[key].append(n)
        turns[key] += 1
        if not steps:
            running.remove(cta)
    assert all(added == list(range(added[0], added[-1] + 1)) for added in order.values())


def test_the_memory_for_ds_is_bounded():
    wide = dataclasses.replace(PROBLEM, head_dim=256, head_dim_v=256, heads_q=8, heads_k=8)
    for seqlen, heads, tiles in ((1024, 16, 16), (4096, 16, 64), (8192, 8, 128), (16384, 2, 256), (65536, 1, 128)):
        problem = dataclasses.replace(wide, seqlen_q=seqlen, seqlen_k=seqlen)
        config = choose_backward(problem)
        rounds = wide_rounds(config, problem)
        assert (len(rounds[0][0]), len(rounds[0][1])) == (heads, tiles)
        covered = collections.Counter((head, tile) for heads, tiles in rounds for head in heads for tile in tiles)
        assert set(covered.values()) == {1}
        assert len(covered) == problem.batch * problem.heads_k * n_blocks(config, problem)


def test_few_tiles_of_a_head_run_at_once():
    """The wait for the tile before costs a step a tile: with 16k keys one head has room in L2, with 1k all 16 do."""
    long = dataclasses.replace(PROBLEM, seqlen_q=32768, seqlen_k=32768, batch=1, heads_q=16, heads_k=16)
    short = dataclasses.replace(PROBLEM, seqlen_q=1024, seqlen_k=1024, batch=1, heads_q=16, heads_k=16)
    assert section(choose_backward(long), long) == 1
    assert section(choose_backward(short), short) == 16
