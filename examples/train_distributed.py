"""Train a small language model on sequences that lie on two processes, each with half of the tokens.

python examples/train_distributed.py                           two processes on this machine's CPU
torchrun --nproc-per-node 2 examples/train_distributed.py      a process for each of two GPUs, or on the CPU
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn

from flashcore import distributed

TEXT = "the quick brown fox jumps over the lazy dog. " * 40
PROCESSES, BATCH, SEQLEN, WIDTH, HEADS = 2, 8, 64, 64, 2
LAYOUT = "zigzag"  # the same work for all under a causal mask


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).unbind(2)  # of this process's tokens
        x = x + self.out(distributed.attention(q, k, v, causal=True, layout=LAYOUT).flatten(2))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """All of it but attention looks at one token at a time: it does not notice that it has only some."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, WIDTH), nn.Embedding(SEQLEN, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        where = distributed.positions(SEQLEN, layout=LAYOUT, device=tokens.device)
        return self.head(self.blocks(self.tokens(tokens) + self.positions(where)))


def train() -> None:
    """What each process does. Gradients are averaged over them as for data-parallel ones."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    torch.manual_seed(0)  # the same weights and batches everywhere
    letters = sorted(set(TEXT))
    data = torch.tensor([letters.index(letter) for letter in TEXT], device=device)
    model = nn.parallel.DistributedDataParallel(Model(len(letters)).to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(61):
        starts = torch.randint(len(data) - SEQLEN, (BATCH,)).tolist()
        inputs = torch.stack([data[start : start + SEQLEN] for start in starts])
        targets = torch.stack([data[start + 1 : start + SEQLEN + 1] for start in starts])
        inputs, targets = (distributed.shard(t, layout=LAYOUT) for t in (inputs, targets))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            dist.all_reduce(mean := loss.detach() / dist.get_world_size())
            if dist.get_rank() == 0:
                print(f"step {step:2}  loss {mean.item():.2f}", flush=True)


def start(rank: int, processes: int, rendezvous: str) -> None:
    if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", processes)):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
        backend = "nccl"
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
        backend = "gloo"
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=processes)
    try:
        train()
    finally:
        dist.destroy_process_group()


def main() -> None:
    if "RANK" in os.environ:  # torchrun has started this process and others
        start(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://")
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments = PROCESSES, f"file://{folder}/rendezvous"
        torch.multiprocessing.spawn(start, args=arguments, nprocs=PROCESSES)


if __name__ == "__main__":
    main()
