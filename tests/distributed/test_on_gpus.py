"""Attention over two ranks with a GPU each, by NCCL: what they compute (gpu_ranks.py), one test for each check."""

import json

import pytest
import torch
import torch.distributed
import torch.multiprocessing

if not torch.distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

from tests.distributed import gpu_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < gpu_ranks.RANKS, reason="needs two GPUs"),
]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    torch.multiprocessing.spawn(gpu_ranks.work, args=(str(folder),), nprocs=gpu_ranks.RANKS)
    return [json.loads((folder / f"verdicts-{rank}.json").read_text()) for rank in range(gpu_ranks.RANKS)]


@pytest.mark.parametrize("name", gpu_ranks.CHECKS)
def test_ranks(name, verdicts):
    for rank, found in enumerate(verdicts):
        assert not found[name], f"rank {rank}:\n{found[name]}"
