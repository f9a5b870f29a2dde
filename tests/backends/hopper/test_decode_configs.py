"""Which problems the decoding kernel serves, and in clusters of which size."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashcore.backends import hopper
from flashcore.backends.hopper.configs import ForwardConfig
from flashcore.backends.hopper.decode_configs import (
    CLUSTERS,
    DecodeConfig,
    choose_cluster,
    choose_decode,
    declared_configs,
)
from flashcore.mask import CAUSAL, FULL
from flashcore.problem import AttentionProblem

PROBLEM = AttentionProblem(
    dtype="bfloat16", device="cuda", arch=(9, 0), sm_count=132, batch=8, seqlen_q=1, seqlen_k=8192, heads_q=32,
    heads_k=8, head_dim=128, head_dim_v=128, mask=FULL, scale=0.1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "served"),
    [
        ({}, True),
        ({"dtype": "float16", "mask": CAUSAL}, True),
        ({"seqlen_q": 2}, True),
        ({"seqlen_q": 3}, False),
        ({"seqlen_q": 8, "heads_k": 32}, True),
        ({"heads_k": 2}, False),
        ({"head_dim": 8, "head_dim_v": 8}, True),
        ({"head_dim": 136, "head_dim_v": 136}, False),
    ],
)
def test_whom_it_serves(changes, served):
    problem = dataclasses.replace(PROBLEM, **changes)
    config = choose_decode(problem)
    assert (config is not None) == served
    if served:
        assert (config.dtype, config.head_dim) == (problem.dtype, problem.head_dim)
        assert config.why
    assert isinstance(hopper.configure(problem), DecodeConfig if served else ForwardConfig)


# What measured best of all sizes, or within 3 % of it: docs/log/0018.
@pytest.mark.parametrize(
    ("batch", "seqlen_k", "heads_k", "head_dim", "cluster"),
    [
        (1, 512, 8, 128, 4),
        (1, 2112, 8, 128, 8),
        (1, 8192, 8, 128, 16),
        (1, 32768, 2, 128, 16),
        (1, 2112, 32, 128, 4),
        (8, 512, 8, 128, 2),
        (8, 8192, 8, 128, 2),
        (16, 4096, 8, 128, 1),
        (24, 4096, 8, 128, 2),
        (40, 2048, 8, 128, 2),
        (64, 4096, 8, 128, 1),
        (8, 8192, 16, 64, 2),
        (1, 8192, 8, 64, 16),
        (64, 4096, 16, 64, 1),
    ],
)
def test_cluster(batch, seqlen_k, heads_k, head_dim, cluster):
    problem = dataclasses.replace(
        PROBLEM, batch=batch, seqlen_k=seqlen_k, heads_q=4 * heads_k, heads_k=heads_k, head_dim=head_dim,
        head_dim_v=head_dim,
    )  # fmt: skip
    assert choose_cluster(problem) == cluster
    assert choose_decode(problem).cluster == cluster


@given(batch=st.integers(1, 4096), heads_k=st.integers(1, 128), seqlen_k=st.integers(1, 2**20), sms=st.integers(1, 200))
def test_most_ctas_have_keys(batch, heads_k, seqlen_k, sms):
    problem = dataclasses.replace(
        PROBLEM, batch=batch, heads_q=heads_k, heads_k=heads_k, seqlen_k=seqlen_k, sm_count=sms
    )
    cluster = choose_cluster(problem)
    assert cluster in CLUSTERS
    assert cluster // 2 * DecodeConfig.warps * 16 < seqlen_k  # half as many would not have had a warp for each block


def test_clusters_share_a_kernel():
    assert {DecodeConfig("bfloat16", 128, 128, size).variant for size in CLUSTERS} == {
        DecodeConfig("bfloat16", 128, 128)
    }


def test_declared_configs():
    assert len(dict(declared_configs())) == len(declared_configs())
    assert [config.head_dim for _, config in declared_configs([64, 256])] == [64, 64]
