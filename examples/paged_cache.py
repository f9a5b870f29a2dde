"""Serve requests from a cache in pages: prompts and single tokens in one call, and a request that joins later.

Each request owns pages of a pool, in any order, as a table says. A step writes the new keys and values where the table
has room for them, and attends once for all requests.
"""

from itertools import accumulate

import torch

import flashcore

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
PAGE_SIZE, PAGES, MOST = 16, 24, 96  # of the pool; the longest that a request may become
# New tokens of each request in each step: two prompts, then single tokens, while a third prompt comes in two chunks.
STEPS = [(40, 21, 0), (1, 1, 30), (1, 1, 15), *[(1, 1, 1)] * 12]
REQUESTS = len(STEPS[0])


def serve(q: list[torch.Tensor], k: list[torch.Tensor], v: list[torch.Tensor]) -> list[torch.Tensor]:
    """What each request's queries see: lists of a tensor (tokens, heads, head_dim) for each request."""
    k_cache, v_cache = torch.zeros(2, PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM, device=DEVICE, dtype=DTYPE)
    table = torch.randperm(PAGES)[: REQUESTS * (MOST // PAGE_SIZE)].view(REQUESTS, -1).int().to(DEVICE)
    lengths = torch.zeros(REQUESTS, dtype=torch.int32, device=DEVICE)  # the kernels read them there, the host never
    done = [0] * REQUESTS
    outputs = [[] for _ in range(REQUESTS)]
    for new in STEPS:
        parts = [slice(begin, begin + n) for begin, n in zip(done, new, strict=True)]
        packed_q, packed_k, packed_v = (
            torch.cat([x[part] for x, part in zip(of_requests, parts, strict=True)]) for of_requests in (q, k, v)
        )
        offsets = torch.tensor([0, *accumulate(new)], dtype=torch.int32, device=DEVICE)
        flashcore.append(k_cache, v_cache, packed_k, packed_v, lengths, table=table, offsets=offsets)
        lengths += offsets.diff()

        # Causal masks are aligned to the bottom right: a chunk sees its past, and a prompt not its future.
        out = flashcore.attention(
            packed_q, k_cache, v_cache, causal=True,
            queries=flashcore.Packed(offsets, longest=max(new)), keys=flashcore.Paged(table, lengths, longest=MOST),
        )  # fmt: skip
        for output, part in zip(outputs, out.split(new), strict=True):
            output.append(part)
        done = [part.stop for part in parts]
    return [torch.cat(output) for output in outputs]


def main() -> None:
    torch.manual_seed(0)
    totals = [sum(new) for new in zip(*STEPS, strict=True)]
    q, k, v = (  # as a model makes them
        [torch.randn(n, heads, HEAD_DIM, device=DEVICE, dtype=DTYPE) for n in totals]
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    outputs = serve(q, k, v)
    furthest = 0.0
    for output, *own in zip(outputs, q, k, v, strict=True):
        alone = flashcore.attention(*(x[None] for x in own), causal=True)[0]
        furthest = max(furthest, (output - alone).abs().max().item())
    print(f"{REQUESTS} requests in {len(STEPS)} steps differ from each alone, in one call, by at most {furthest:.1e}")


if __name__ == "__main__":
    main()
