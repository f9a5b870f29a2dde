"""The MLP of Llama-like models: the two products before SwiGLU and the activation are one kernel on Hopper GPUs."""

import torch
import torch.nn.functional as F
from torch import nn

import flashcore

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


class SwigluMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``, with the weights of gate and up in one tensor."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)  # the gate's rows, and after them up's
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = flashcore.matmul(x.flatten(0, -2), self.gate_up.weight.t(), activation="swiglu")
        return flashcore.linear(rows, self.down.weight).view(x.shape)


def main() -> None:
    torch.manual_seed(0)
    mlp = SwigluMLP(256, 704).to(DEVICE, DTYPE)
    x = torch.randn(4, 32, 256, device=DEVICE, dtype=DTYPE, requires_grad=True)
    out = mlp(x)
    out.sum().backward()

    gate, up = F.linear(x, mlp.gate_up.weight).chunk(2, dim=-1)
    separate = F.linear(F.silu(gate) * up, mlp.down.weight)
    print(f"differs from separate operations by at most {(out - separate).abs().max().item():.1e}")
    print(flashcore.explain_matmul(x.flatten(0, -2), mlp.gate_up.weight.t(), activation="swiglu"))


if __name__ == "__main__":
    main()
