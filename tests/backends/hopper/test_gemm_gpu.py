"""What only the matrix product on a Hopper GPU can show, beyond the named cases of tests/gemm_cases.py."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import flashcore
from flashcore.backends import hopper
from flashcore.gemm_problem import HALF_TYPES, GemmProblem
from tests.gemm_cases import CASES, product
from tests.poison import poisoned_outputs
from tests.tolerance import assert_as_good_as

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and hopper.unavailable() is not None, reason="no Hopper GPU"
    ),
]

pytest.importorskip("cuda.bindings", reason="needs cuda-bindings (extra cu13 or cu12)")

from flashcore.backends.hopper.gemm import GemmLauncher, rejects  # noqa: E402
from flashcore.backends.hopper.gemm_configs import TILES, candidate_parts, schedule  # noqa: E402

WAIT_LIMIT = 2_000_000  # a wait that would hang ends the kernel instead

# More tiles than SMs, fewer, a long reduction; one tile's pieces on one, two and many clusters.
SHAPES = [(4100, 4352, 1280), (2048, 9216, 1024), (300, 4096, 4096), (16, 4096, 11008), (129, 264, 4096)]


def operands(m, n, k, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(m + n + k)
    a = torch.randn(m, k, dtype=dtype, device="cuda", generator=generator)
    return a, torch.randn(n, k, dtype=dtype, device="cuda", generator=generator).t() * k**-0.5


def launcher(a, b, tile, *, out_dtype=None, which=-1) -> GemmLauncher | None:
    """A product whose last tiles are shared by a number of clusters, the candidate `which`; None if there is none."""
    problem = GemmProblem.from_tensors(a, b, out_dtype=out_dtype)
    config = replace(tile.config(problem), split=True, wait_limit=WAIT_LIMIT)
    parts = candidate_parts(problem, config)
    return GemmLauncher(problem, config, schedule(problem, config, parts[which])) if parts else None


@pytest.mark.filterwarnings("ignore:matmul.*is copied")
@pytest.mark.parametrize("case", [c for c in CASES if c.batch is None and c.dtype in HALF_TYPES], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t.tile_m}x{t.tile_n}")
def test_every_tile(tile, case):
    """Not only the one that the model of time chooses; on four SMs, so that a CTA has several tiles of some cases."""
    a, b, bias = case.inputs("cuda")
    problem = replace(GemmProblem.from_tensors(a, b, bias=bias, **case.options), sm_count=4)
    config = replace(tile.config(problem), wait_limit=WAIT_LIMIT)
    if reason := rejects(problem) or config.infeasible():
        pytest.skip(reason)
    with poisoned_outputs():
        out = GemmLauncher(problem, config, schedule(problem, config))(a, b, bias)
    exact, by_torch = (product(a, b, bias, case.activation, dtype) for dtype in (torch.float64, out.dtype))
    assert_as_good_as(by_torch, out, exact, case.name, factor=2)


@pytest.mark.parametrize("which", [0, -1], ids=["fewest", "most"])
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t.tile_m}x{t.tile_n}")
def test_shared_tiles(tile, shape, out_dtype, which):
    a, b = operands(*shape, torch.float16)
    launch = launcher(a, b, tile, out_dtype=out_dtype, which=which)
    if launch is None:
        pytest.skip("its tiles fill whole waves")
    with poisoned_outputs():
        out, again = launch(a, b, None), launch(a, b, None)
    assert torch.equal(out, again)
    by_torch = torch.mm(a, b) if out_dtype == a.dtype else torch.mm(a, b, out_dtype=out_dtype)
    # The tensor cores' sums err with the length of their chain, and PyTorch may cut the reduction into more parts.
    factor = 2 if out_dtype == a.dtype else 5
    assert_as_good_as(by_torch, out, a.double() @ b.double(), "out", factor=factor)


def test_shared_tiles_on_streams_that_run_at_once():
    """Each product leaves room for some clusters of the others only."""
    jobs = []
    for shape, tile in zip(SHAPES, (TILES[0], TILES[1], TILES[2], TILES[3], TILES[3]), strict=True):
        a, b = operands(*shape)
        launch = launcher(a, b, tile)
        jobs.append((launch, a, b, launch(a, b, None)))
    streams = [torch.cuda.Stream() for _ in jobs]
    torch.cuda.synchronize()
    for turn in range(20):
        outs = []
        for i in range(len(jobs)):
            for stream, (launch, a, b, expected) in zip(streams, jobs[i:] + jobs[:i], strict=True):
                with torch.cuda.stream(stream):
                    outs.append((launch(a, b, None), expected))
        torch.cuda.synchronize()
        assert all(torch.equal(out, expected) for out, expected in outs), turn


def test_shared_tiles_in_a_graph_beside_another_stream():
    a, b = operands(16, 4096, 11008)
    launch = launcher(a, b, TILES[3])
    expected = launch(a, b, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [launch(a, b, None) for _ in range(5)]
    side = torch.cuda.Stream()
    for _ in range(20):
        graph.replay()
        with torch.cuda.stream(side):
            other = launch(a, b, None)
        torch.cuda.synchronize()
        assert all(torch.equal(out, expected) for out in (*outs, other))


FIRST_USE_IN_BACKWARD = """
import torch, flashcore
x, w = (torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in ((64, 512), (256, 512)))
flashcore.linear(x, w).sum().backward()
for grad, expected in ((x.grad, w.detach().sum(0).expand(64, -1)), (w.grad, x.detach().sum(0).expand(256, -1))):
    assert (grad.float() - expected.float()).norm() < 1e-2 * expected.float().norm()
print("right")
"""


def test_the_first_backward_of_a_process():
    """It runs in a thread of autograd, which has no CUDA context of its own yet."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_USE_IN_BACKWARD], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "right", done.stderr


def test_gradients_of_a_linear_layer_whose_products_share_tiles():
    x, weight = (t.requires_grad_() for t in operands(16, 4096, 11008))
    plan = flashcore.explain_matmul(x, weight)
    assert plan.config.schedule.parts > 0
    dout = torch.randn(16, 4096, device="cuda", dtype=torch.bfloat16)
    grads = torch.autograd.grad(flashcore.linear(x, weight.t()), (x, weight), dout)
    exact = torch.autograd.grad(x.double() @ weight.double(), (x, weight), dout.double())
    by_torch = torch.autograd.grad(x @ weight, (x, weight), dout)
    for name, ours, theirs, truth in zip(("x", "weight"), grads, by_torch, exact, strict=True):
        assert_as_good_as(theirs, ours, truth.double(), name, factor=2)
