"""Where the sequences of a packed case lie: offsets, and K and V in shuffled pages."""

from __future__ import annotations

from itertools import accumulate

import torch

from flashcore.bench.cases import Case, PackedCase
from flashcore.sequences import Packed, Paged


def places(case: PackedCase, device: torch.device) -> dict[str, Packed | Paged]:
    """`queries` and `keys` of `attention`."""
    if case.page_size:
        keys = Paged(table(case, device), key_lengths(case, device), case.seqlen_k)
    else:
        keys = Packed(offsets(case, device, of_keys=True), case.seqlen_k)
    return {"queries": Packed(offsets(case, device), case.seqlen_q), "keys": keys}


def offsets(case: PackedCase, device: torch.device, of_keys: bool = False) -> torch.Tensor:
    """int32 (batch + 1,)."""
    lengths = (sequence[of_keys] for sequence in case.sequences)
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def key_lengths(case: PackedCase, device: torch.device) -> torch.Tensor:
    """int32 (batch,)."""
    return torch.tensor([keys for _, keys in case.sequences], dtype=torch.int32, device=device)


def table(case: PackedCase, device: torch.device) -> torch.Tensor:
    """int32 (batch, pages of the longest): all pages there are, shuffled; behind a sequence's last one, 0."""
    counts = [-(-keys // case.page_size) for _, keys in case.sequences]
    shuffled = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).int()
    rows = torch.nn.utils.rnn.pad_sequence(shuffled.split(counts), batch_first=True, padding_value=0)
    return rows.to(device)


def stored(case: Case, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """K and V as a case has them: as they are, or of a paged case in its pages, (pages, page_size, heads, head_dim).

    Rows of pages that no sequence has are 0: peers may multiply them by 0.
    """
    if not isinstance(case, PackedCase) or not case.page_size:
        return tensors
    names = table(case, torch.device("cpu"))
    rows = [
        own[i // case.page_size] * case.page_size + i % case.page_size
        for own, i in zip(names, (torch.arange(keys) for _, keys in case.sequences), strict=True)
    ]
    where = torch.cat(rows).to(tensors[0].device)
    caches = tuple(x.new_zeros(int(names.max()) + 1, case.page_size, *x.shape[1:]) for x in tensors)
    for cache, x in zip(caches, tensors, strict=True):
        cache.flatten(0, 1)[where] = x
    return caches
