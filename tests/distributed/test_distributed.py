"""Attention over several ranks, on a CPU: what they compute (ranks.py), one test for each group size and check."""

import json
import time
from itertools import combinations

import pytest
import torch
import torch.distributed
import torch.multiprocessing

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this PyTorch has no torch.distributed with Gloo", allow_module_level=True)

from tests.distributed import ranks


def spawn(function, count, *arguments):
    """Processes forked from a server that has imported everything once."""
    torch.multiprocessing.set_forkserver_preload([ranks.__name__])
    return torch.multiprocessing.start_processes(
        function, args=arguments, nprocs=count, start_method="forkserver", join=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where eight ranks leave what they found."""
    folder = tmp_path_factory.mktemp("world")
    world = spawn(ranks.work, ranks.WORLD, str(folder))
    while not world.join():
        pass
    return folder


@pytest.fixture(scope="module")
def verdicts(folder):
    return [json.loads((folder / f"verdicts-{rank}.json").read_text()) for rank in range(ranks.WORLD)]


@pytest.mark.parametrize(
    ("size", "name"), [(size, name) for name, (_, sizes) in ranks.CHECKS.items() for size in sizes]
)
def test_ranks(size, name, verdicts):
    for rank in ranks.GROUPS[size]:
        verdict = verdicts[rank][f"{size}/{name}"]
        assert not verdict, f"rank {rank}:\n{verdict}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ordered_bits_do_not_depend_on_the_ranks(dtype, folder):
    found = {path.name: torch.load(path) for path in folder.glob(f"ordered-*-{dtype}.pt")}
    assert len(found) == 8
    for (one, results), (other, others) in combinations(found.items(), 2):
        for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), results, others, strict=True):
            assert torch.equal(a, b), f"{name} of {one} and {other}"


@pytest.mark.parametrize("fault", ["dies", "stays_away"])
def test_a_missing_rank_is_an_error_on_all_others(fault, tmp_path):
    started = time.monotonic()
    world = spawn(ranks.survive, 3, str(tmp_path), fault)
    while not world.join():
        pass
    verdicts = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert all(verdict.startswith("raised") for verdict in verdicts), verdicts
    assert time.monotonic() - started < 60
