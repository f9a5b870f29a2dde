"""Train a small language model on documents of different lengths, packed: no padding, and none sees its neighbours."""

import torch
import torch.nn.functional as F
from torch import nn

import flashcore

DOCUMENTS = [
    "the quick brown fox jumps over the lazy dog.",
    "pack my box with five dozen liquor jugs.",
    "how vexingly quick daft zebras jump!",
    "sphinx of black quartz, judge my vow: it is the twenty-sixth in a row, and none of them was kept for long.",
    "jackdaws love my big sphinx of quartz.",
]
LONGEST = 128  # of a document, and more than any has
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor, documents: flashcore.Packed) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(1)  # (total, heads, head_dim) each
        x = x + self.out(flashcore.attention(q, k, v, causal=True, queries=documents, keys=documents).flatten(1))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self, vocabulary: int, width: int = 64, heads: int = 2, layers: int = 2):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(LONGEST, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, documents: flashcore.Packed) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x, documents)
        return self.head(x)


def pack(documents: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, flashcore.Packed]:
    """Inputs, their places in their documents, what comes next, and where the documents lie."""
    inputs, targets = torch.cat([d[:-1] for d in documents]), torch.cat([d[1:] for d in documents])
    lengths = [len(d) - 1 for d in documents]
    positions = torch.cat([torch.arange(n) for n in lengths])
    offsets = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    # The kernels read the offsets on the device. One bound for all steps: a plan, or a captured graph, serves them all.
    packed = flashcore.Packed(offsets.to(DEVICE), longest=LONGEST)
    return inputs.to(DEVICE), positions.to(DEVICE), targets.to(DEVICE), packed


def main() -> None:
    torch.manual_seed(0)
    letters = sorted(set("".join(DOCUMENTS)))
    documents = [torch.tensor([letters.index(letter) for letter in text]) for text in DOCUMENTS]
    model = Model(len(letters)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(31):
        chosen = torch.randint(len(documents), (4,)).tolist()
        inputs, positions, targets, packed = pack([documents[i] for i in chosen])
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = F.cross_entropy(model(inputs, positions, packed), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:2}  loss {loss.item():.2f}")


if __name__ == "__main__":
    main()
