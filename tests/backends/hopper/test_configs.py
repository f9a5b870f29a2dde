"""The tile table: every row feasible, every problem finds one, every tile is dealt out once."""

import dataclasses

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashcore.backends import hopper
from flashcore.backends.hopper.attention import divisor
from flashcore.backends.hopper.configs import (
    FORWARD_TABLE,
    ForwardConfig,
    blocks_per_cta,
    choose_forward,
    deal_tiles,
    deal_window_tiles,
    dealt_blocks,
    declared_configs,
    row_head_dim,
    tile_blocks,
    window_ramp,
)
from flashcore.mask import CAUSAL, FULL, Mask
from flashcore.problem import AttentionProblem

PROBLEM = AttentionProblem(
    dtype="bfloat16", device="cuda", arch=(9, 0), sm_count=132, batch=2, seqlen_q=1024, seqlen_k=1024, heads_q=8,
    heads_k=2, head_dim=128, head_dim_v=128, mask=CAUSAL, scale=0.1,
)  # fmt: skip


def test_declared_configs_are_feasible():
    for name, config in declared_configs():
        assert config.infeasible() is None, name


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", range(8, 257, 8))
@pytest.mark.parametrize("seqlen", [1, 512, 1024, 2048, 4096, 131072])
def test_every_accepted_problem_gets_a_declared_config(head_dim, seqlen, causal):
    problem = dataclasses.replace(
        PROBLEM, head_dim=head_dim, head_dim_v=head_dim, seqlen_q=seqlen, seqlen_k=seqlen,
        mask=CAUSAL if causal else FULL,
    )
    assert hopper.rejects(problem) is None
    config = choose_forward(problem)
    row = row_head_dim(head_dim, head_dim)
    as_declared = dataclasses.replace(config, head_dim=row, head_dim_v=row)
    assert as_declared in [declared for _, declared in declared_configs()]
    assert config.head_dim >= head_dim
    assert config.bounded_right == problem.visible.bounded_right
    assert config.why


@pytest.mark.parametrize("row", FORWARD_TABLE, ids=lambda row: f"{row.head_dim}-{row.consumers}x{row.tile_n}")
def test_no_row_is_dead(row):
    """Some problem gets this row: none before it takes them all."""
    problems = [
        dataclasses.replace(
            PROBLEM, head_dim=row.head_dim, head_dim_v=row.head_dim, batch=batch, seqlen_q=n, seqlen_k=n,
            mask=CAUSAL if causal else FULL,
        )
        for batch in (1, 8)
        for n in (64, 512, 1024, 2048, 4096, 16384)
        for causal in (False, True)
    ]
    assert any(choose_forward(problem) == row.config("bfloat16", problem.causal) for problem in problems)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tile_n": 120}, "tile_n 120"),
        ({"head_dim": 120}, "head_dim 120"),
        ({"head_dim": 272}, "head_dim 272"),
        ({"stages": 8}, "shared memory"),
        ({"stages": 2}, "2 stages"),
        ({"stages": 3, "q_buffers": 1}, "3 stages"),
        ({"consumers": 1, "stages": 4}, "turns"),
        ({"dtype": "float32"}, "float32"),
    ],
)
def test_infeasible_says_why(changes, reason):
    config = ForwardConfig("bfloat16", 128, 128, False, False, 128, 2, 5, 2, True)
    assert config.infeasible() is None
    assert reason in dataclasses.replace(config, **changes).infeasible()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"arch": (8, 0)}, "(8, 0)"),
        ({"dtype": "float32"}, "float32"),
        ({"head_dim": 264, "head_dim_v": 264}, "264 > 256"),
        ({"head_dim": 36, "head_dim_v": 36}, "multiple of 8"),
        ({"head_dim_v": 260}, "head_dim_v 260"),
        ({"batch": 2**20, "seqlen_q": 2**18}, "query tiles"),
    ],
)
def test_rejects_names_the_one_feature(changes, reason):
    assert hopper.rejects(PROBLEM) is None
    assert reason in hopper.rejects(dataclasses.replace(PROBLEM, **changes))


@given(
    m_blocks=st.integers(1, 40), heads=st.integers(1, 60), sms=st.integers(1, 132), data=st.data()
)  # fmt: skip
def test_causal_tiles_are_dealt_out_once(m_blocks, heads, sms, data):
    ctas = min(sms, m_blocks * heads)
    paired = data.draw(st.integers(0, heads // 2)) * 2
    dealt = [tile for cta in range(ctas) for tile in deal_tiles(m_blocks, heads, paired, ctas, cta)]
    assert sorted(dealt) == [(head, block) for head in range(heads) for block in range(m_blocks)]
    blocks = numpy.array(data.draw(st.lists(st.integers(1, 500), min_size=m_blocks, max_size=m_blocks)))
    expected = [
        sum(blocks[m] for _, m in deal_tiles(m_blocks, heads, paired, ctas, cta)) for cta in range(ctas)
    ]
    assert dealt_blocks(blocks, heads, paired, ctas).tolist() == expected


@given(m_blocks=st.integers(1, 40), heads=st.integers(1, 20), sms=st.integers(1, 132), data=st.data())
def test_tiles_of_a_window_are_dealt_out_once(m_blocks, heads, sms, data):
    ramp = data.draw(st.integers(0, m_blocks))
    dealt = [tile for cta in range(sms) for tile in deal_window_tiles(m_blocks, heads, ramp, sms, cta)]
    assert sorted(dealt) == [(head, block) for head in range(heads) for block in range(m_blocks)]


@pytest.mark.parametrize("window", [128, 1024, 4096])
def test_units_of_a_window_cost_the_same(window):
    problem = dataclasses.replace(PROBLEM, seqlen_q=8192, seqlen_k=8192, mask=Mask(window - 1, 0))
    config = choose_forward(problem)
    blocks, ramp = tile_blocks(config, problem), window_ramp(config, problem)
    pairs = [blocks[i] + blocks[ramp - 1 - i] for i in range(ramp // 2)]
    assert set(blocks[ramp:]) <= {max(blocks), max(blocks) - 1}
    assert all(abs(pair - max(blocks)) <= 2 for pair in pairs)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("seqlen", [512, 1024, 2048, 4096, 8192, 16384])
def test_causal_work_is_balanced(head_dim, seqlen):
    """No CTA has much more than its share of blocks: the last one to end decides the time."""
    problem = dataclasses.replace(
        PROBLEM, head_dim=head_dim, head_dim_v=head_dim, batch=16384 // seqlen, heads_q=2048 // head_dim,
        heads_k=2048 // head_dim, seqlen_q=seqlen, seqlen_k=seqlen,
    )  # fmt: skip
    blocks = blocks_per_cta(choose_forward(problem), problem)
    assert len(blocks) == 132
    assert sum(blocks) / 132 >= 0.94 * max(blocks)


@given(d=st.integers(1, 2**31 - 1), n=st.integers(0, 2**31 - 1), near=st.integers(-1, 1))
def test_divisor(d, n, near):
    """The multiplication that stands for a division on the device, here in unbounded integers."""
    packed = int(divisor(d))
    multiplier, shift = packed & 0xFFFFFFFF, packed >> 32
    for value in (n, min(2**31 - 1, max(0, n // d * d + near))):
        high = value * multiplier >> 32
        assert high + value < 2**32  # no overflow in 32 bits
        assert (high + value) >> shift == value // d


@pytest.mark.parametrize("causal", [False, True])
@given(seqlen_q=st.integers(1, 700), seqlen_k=st.integers(1, 700), data=st.data())
def test_blocks_cover_what_is_visible(causal, seqlen_q, seqlen_k, data):
    """The blocks of the tiles reach every key that their rows see, and the last tile ends with the last row."""
    row = data.draw(st.sampled_from(FORWARD_TABLE))
    problem = dataclasses.replace(PROBLEM, seqlen_q=seqlen_q, seqlen_k=seqlen_k, mask=CAUSAL if causal else FULL)
    config = row.config("bfloat16", causal)
    blocks = tile_blocks(config, problem)
    shift = len(blocks) * config.tile_m - -(-seqlen_q // 64) * 64 if causal else 0
    assert 0 <= shift < config.tile_m
    for query in range(seqlen_q):
        visible = min(seqlen_k, query + 1 + seqlen_k - seqlen_q) if causal else seqlen_k
        assert blocks[(query + shift) // config.tile_m] * config.tile_n >= visible


@pytest.mark.parametrize(
    ("shape", "one_tile"),
    [((1, 8, 512, 64), True), ((2, 32, 1, 128), True), ((1, 16, 1024, 128), True), ((8, 16, 512, 64), False)],
)
@pytest.mark.parametrize("causal", [False, True])
def test_one_tile_only_where_every_tile_has_a_cta(shape, one_tile, causal):
    batch, heads, seqlen, head_dim = shape
    problem = dataclasses.replace(
        PROBLEM, batch=batch, heads_q=heads, heads_k=heads, seqlen_q=seqlen, seqlen_k=seqlen, head_dim=head_dim,
        head_dim_v=head_dim, mask=CAUSAL if causal else FULL,
    )  # fmt: skip
    config = choose_forward(problem)
    assert config.one_tile == (batch * heads * -(-seqlen // config.tile_m) <= problem.sm_count)
    assert causal or config.one_tile == one_tile
