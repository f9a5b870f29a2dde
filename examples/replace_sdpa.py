"""Put FlashCore behind PyTorch's scaled_dot_product_attention, in a program that is not changed otherwise."""

import torch
import torch.nn.functional as F

from flashcore.integrations import sdpa

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def layer(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Somebody else's code: causal self-attention of x (batch, seqlen, width) with itself."""
    qkv = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(qkv, qkv, qkv, is_causal=True).transpose(1, 2).flatten(2)


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 256, 256, device=DEVICE)
    before = layer(x, heads=4)
    with sdpa.replace_torch():  # or once, at the top of the program: sdpa.replace_torch()
        after = layer(x, heads=4)
    print(f"the results differ by at most {(after - before).abs().max().item():.1e}")

    # Who computes a call, and why:
    q = torch.randn(2, 4, 256, 64, device=DEVICE)
    print(sdpa.explain(q, q, q, is_causal=True))
    print(sdpa.explain(q, q, q, dropout_p=0.1))


if __name__ == "__main__":
    main()
