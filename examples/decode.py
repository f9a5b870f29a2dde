"""Decode with a cache: a prompt at once, then one query at a time over the keys and values so far."""

import torch

import flashcore

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
BATCH, PROMPT, STEPS, HEADS, KV_HEADS, HEAD_DIM = 2, 48, 16, 8, 2, 64


def main() -> None:
    torch.manual_seed(0)
    total = PROMPT + STEPS
    q = torch.randn(BATCH, total, HEADS, HEAD_DIM, device=DEVICE, dtype=DTYPE)
    k, v = torch.randn(
        2, BATCH, total, KV_HEADS, HEAD_DIM, device=DEVICE, dtype=DTYPE
    )  # as a model makes them
    k_cache, v_cache = torch.zeros_like(k), torch.zeros_like(v)
    parts, filled = [], 0
    while filled < total:
        new = PROMPT if filled == 0 else 1
        rows = slice(filled, filled + new)
        k_cache[:, rows], v_cache[:, rows] = k[:, rows], v[:, rows]
        filled += new
        # The filled part of the cache is a view: nothing is copied. The mask is aligned to the bottom right, so that
        # the last query sees every key and causal=True is right for the prompt and for the steps.
        parts.append(flashcore.attention(q[:, rows], k_cache[:, :filled], v_cache[:, :filled], causal=True))
    out = torch.cat(parts, dim=1)

    whole = flashcore.attention(q, k, v, causal=True)
    print(f"{STEPS} steps differ from one call by at most {(out - whole).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
