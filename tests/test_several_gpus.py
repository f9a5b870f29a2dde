"""Several GPUs: in one process, by one thread or more, and as ranks of torch.distributed."""

import threading

import pytest
import torch
import torch.distributed
import torch.nn.functional as F

import flashcore
from flashcore.integrations import sdpa
from tests.cases import BY_NAME
from tests.tolerance import assert_forward, assert_gradients

two_gpus = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.filterwarnings("ignore::flashcore.errors.FlashCoreWarning"),
]


def normal(*shape, device, dtype=torch.bfloat16):
    """The same numbers on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def attention(device, seqlen_q=129, function=flashcore.attention, **options):
    q, k, v = normal(3, 2, 8, 129, 64, device=device).transpose(2, 3).unbind(0)
    return function(q[:, -seqlen_q:], k, v, causal=True, **options)


def gradient(device):
    qkv = normal(2, 129, 3, 8, 64, device=device).requires_grad_()
    (grad,) = torch.autograd.grad(flashcore.attention(*qkv.unbind(2), causal=True).square().sum(), qkv)
    return grad


def drop_in(device):
    with sdpa.replace_torch():
        return F.scaled_dot_product_attention(*normal(3, 2, 8, 129, 64, device=device).unbind(0))


CALLS = {
    "forward": attention,
    "decoding": lambda device: attention(device, seqlen_q=1),
    "triton": lambda device: attention(device, backend="triton"),
    "sdpa": lambda device: attention(device, backend="sdpa"),
    "gradient": gradient,
    "drop_in": drop_in,
    "linear": lambda device: flashcore.linear(*normal(2, 256, 256, device=device).unbind(0)),
    "compiled": lambda device: attention(device, function=torch.compile(flashcore.attention, fullgraph=True)),
}


class TestOneProcess:
    pytestmark = two_gpus

    @pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
    def test_the_current_gpu_does_not_matter(self, call):
        """Nor does it change; and GPUs of one kind give the same bits."""
        expected = call("cuda:0").cpu()
        for current in (0, 1):
            with torch.cuda.device(current):
                for device in ("cuda:1", "cuda:0", "cuda:1"):
                    result = call(device)
                    assert result.device == torch.device(device)
                    assert torch.cuda.current_device() == current
                    assert torch.equal(result.cpu(), expected), f"on {device} while {current} is current"

    @pytest.mark.parametrize("name", ["forward", "decoding", "triton", "linear"])
    def test_threads_with_a_gpu_each(self, name):
        """Each thread's first use of CUDA is the call on a GPU that is not current in it."""
        call, results, start = CALLS[name], {}, threading.Barrier(4)
        expected = call("cuda:0").cpu()

        def work(number):
            start.wait()
            results[number] = [call(f"cuda:{(number + i) % 2}").cpu() for i in range(8)]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(results) == list(range(4))
        assert all(torch.equal(result, expected) for of_one in results.values() for result in of_one)

    @pytest.mark.parametrize("name", ["forward", "decoding", "linear"])
    def test_graph_on_the_other_gpu(self, name):
        call = CALLS[name]
        expected = call("cuda:0").cpu()
        with torch.cuda.device(1):
            inputs = torch.zeros(3, 2, 8, 129, 64, device="cuda", dtype=torch.bfloat16)
            matrices = torch.zeros(2, 256, 256, device="cuda", dtype=torch.bfloat16)

            def run():
                if name == "linear":
                    return flashcore.linear(*matrices.unbind(0))
                q, k, v = inputs.transpose(2, 3).unbind(0)
                return flashcore.attention(q[:, -1:] if name == "decoding" else q, k, v, causal=True)

            run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.Stream()):  # by default one of the first capture's GPU
                out = run()
        inputs.copy_(normal(*inputs.shape, device="cuda:1"))
        matrices.copy_(normal(*matrices.shape, device="cuda:1"))
        torch.cuda.synchronize(1)
        with torch.cuda.device(1):
            graph.replay()
        assert torch.equal(out.cpu(), expected)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_right_on_the_other_gpu(self, compiled):
        function = torch.compile(flashcore.attention, fullgraph=True) if compiled else flashcore.attention
        q, k, v = (t.requires_grad_() for t in BY_NAME["causal_129"].inputs("cuda:1"))
        out = function(q, k, v, causal=True)
        assert torch.cuda.current_device() == 0
        assert_forward(out.detach(), None, q, k, v, causal=True)
        out.sum().backward()
        assert_gradients((q.grad, k.grad, v.grad), q, k, v, torch.ones_like(out), causal=True)


class Layer(torch.nn.Module):
    """Causal self-attention of 4 heads between two linear maps."""

    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(64, 3 * 256)
        self.out = torch.nn.Linear(256, 64)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 4, 64)).unbind(2)
        return self.out(flashcore.attention(q, k, v, causal=True).flatten(2))


RANKS = 2


def train_as_a_rank(rank: int, transport: str, directory: str) -> None:
    """One step of data-parallel training on this rank's half of a batch: as one process with all of it."""
    device, dtype, tolerance = torch.device("cpu"), torch.float32, 1e-5
    if transport == "nccl":
        device, dtype, tolerance = torch.device("cuda", rank), torch.bfloat16, 2e-2
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        transport, init_method=f"file://{directory}/rendezvous", rank=rank, world_size=RANKS
    )
    try:
        torch.manual_seed(0)
        alone = Layer().to(device, dtype)
        layer = Layer().to(device, dtype)
        layer.load_state_dict(alone.state_dict())
        parallel = torch.nn.parallel.DistributedDataParallel(layer)
        x = normal(2 * RANKS, 65, 64, device=device, dtype=dtype)
        parallel(x.chunk(RANKS)[rank]).square().mean().backward()
        alone(x).square().mean().backward()
        for (name, parameter), expected in zip(layer.named_parameters(), alone.parameters(), strict=True):
            error = (parameter.grad - expected.grad).norm() / expected.grad.norm()
            assert error < tolerance, f"rank {rank}, gradient of {name}: relative error {error:.3g}"
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("transport", ["gloo", pytest.param("nccl", marks=two_gpus)])
def test_ranks_train_together(transport, tmp_path, monkeypatch):
    """From a cold cache that they share."""
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(tmp_path / "cache"))
    torch.multiprocessing.spawn(train_as_a_rank, args=(transport, str(tmp_path)), nprocs=RANKS)
