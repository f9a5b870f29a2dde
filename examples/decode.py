"""Decode with a cache: a prompt at once, then one query at a time over the keys and values so far.

Three ways: the program counts how much is filled, or a tensor on the device does, as CUDA graphs and sequences of
different lengths need it, and then the cache may be in pages, too.
"""

import torch

import flashcore
from flashcore.compat.flash_attn import flash_attn_with_kvcache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
BATCH, PROMPT, STEPS, HEADS, KV_HEADS, HEAD_DIM = 2, 48, 16, 8, 2, 64
TOTAL, PAGE = PROMPT + STEPS, 16
PARTS = [slice(0, PROMPT), *(slice(i, i + 1) for i in range(PROMPT, TOTAL))]


def by_views(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k_cache, v_cache = torch.zeros_like(k), torch.zeros_like(v)
    parts = []
    for rows in PARTS:
        k_cache[:, rows], v_cache[:, rows] = k[:, rows], v[:, rows]
        # The filled part of the cache is a view: nothing is copied. The mask is aligned to the bottom right, so that
        # the last query sees every key and causal=True is right for the prompt and for the steps.
        filled = slice(rows.stop)
        parts.append(flashcore.attention(q[:, rows], k_cache[:, filled], v_cache[:, filled], causal=True))
    return torch.cat(parts, dim=1)


def by_lengths(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k_cache, v_cache = torch.zeros_like(k), torch.zeros_like(v)
    lengths = torch.zeros(BATCH, dtype=torch.int32, device=DEVICE)  # never read back: each sequence could have its own
    parts = []
    for rows in PARTS:
        new = k[:, rows], v[:, rows]  # appended by the call
        parts.append(
            flash_attn_with_kvcache(q[:, rows], k_cache, v_cache, *new, cache_seqlens=lengths, causal=True)
        )
        lengths += rows.stop - rows.start
    return torch.cat(parts, dim=1)


def by_pages(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    pages = -(-TOTAL // PAGE)  # of each sequence
    k_cache, v_cache = torch.zeros(2, BATCH * pages, PAGE, KV_HEADS, HEAD_DIM, device=DEVICE, dtype=DTYPE)
    table = torch.randperm(BATCH * pages, device=DEVICE).int().view(BATCH, pages)
    lengths = torch.zeros(BATCH, dtype=torch.int32, device=DEVICE)
    call = {"cache_seqlens": lengths, "block_table": table, "causal": True}
    parts = []
    for rows in PARTS:
        parts.append(flash_attn_with_kvcache(q[:, rows], k_cache, v_cache, k[:, rows], v[:, rows], **call))
        lengths += rows.stop - rows.start
    return torch.cat(parts, dim=1)


def main() -> None:
    torch.manual_seed(0)
    q = torch.randn(BATCH, TOTAL, HEADS, HEAD_DIM, device=DEVICE, dtype=DTYPE)  # as a model makes them
    k, v = torch.randn(2, BATCH, TOTAL, KV_HEADS, HEAD_DIM, device=DEVICE, dtype=DTYPE)
    whole = flashcore.attention(q, k, v, causal=True)
    furthest = max((way(q, k, v) - whole).abs().max().item() for way in (by_views, by_lengths, by_pages))
    print(f"{STEPS} steps, counted here or on the device, or in pages, differ from one call by at most {furthest:.1e}")


if __name__ == "__main__":
    main()
