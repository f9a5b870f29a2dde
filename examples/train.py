"""Train a small language model on text that it can learn by heart, with attention in bfloat16 where there is a GPU."""

import torch
import torch.nn.functional as F
from torch import nn

import flashcore

TEXT = "the quick brown fox jumps over the lazy dog. " * 40
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # (batch, seqlen, 3, heads, head_dim): q, k and v are views of one tensor, and are read where they are.
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + self.out(flashcore.attention(q, k, v, causal=True).flatten(2))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self, vocabulary: int, seqlen: int, width: int = 64, heads: int = 2, layers: int = 2):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(seqlen, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.blocks(self.tokens(tokens) + self.positions(positions)))


def main() -> None:
    torch.manual_seed(0)
    letters = sorted(set(TEXT))
    data = torch.tensor([letters.index(letter) for letter in TEXT], device=DEVICE)
    batch, seqlen = 8, 64
    model = Model(len(letters), seqlen).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(61):
        starts = torch.randint(len(data) - seqlen, (batch,)).tolist()
        inputs = torch.stack([data[start : start + seqlen] for start in starts])
        targets = torch.stack([data[start + 1 : start + seqlen + 1] for start in starts])
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step:2}  loss {loss.item():.2f}")


if __name__ == "__main__":
    main()
