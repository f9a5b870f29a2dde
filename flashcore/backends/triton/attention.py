"""Host side of the Triton backend: tensors and a config -> kernel launches on the current stream."""

from __future__ import annotations

import math

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from flashcore.backends.triton.attention_bwd import attention_bwd_dkdv, attention_bwd_dq
from flashcore.backends.triton.attention_fwd import attention_fwd, combine
from flashcore.backends.triton.configs import Tile, TritonConfig, heads_per_section, padded_head_dim
from flashcore.problem import AttentionProblem

LOG2E = math.log2(math.e)


def forward(
    problem: AttentionProblem, config: TritonConfig, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, Sq, Hq, D) in q's dtype and lse (B, Hq, Sq) float32, both contiguous."""
    out = torch.empty(problem.out_shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(problem.lse_shape, dtype=torch.float32, device=q.device)
    tile, splits = config.forward, config.splits
    if splits > 1:
        target = torch.empty((splits, *problem.out_shape), dtype=torch.float32, device=q.device)
        target_lse = torch.empty((splits, *problem.lse_shape), dtype=torch.float32, device=q.device)
    else:
        target, target_lse = out[None], lse

    block_d = padded_head_dim(problem.head_dim)
    members = problem.group_size if config.pack_gqa else 1
    batch_heads = problem.batch * problem.heads_q // members
    tiles = triton.cdiv(problem.seqlen_q * members, tile.tile_m)
    tma = tile.tma and addressable(k) and addressable(v)
    keys, values = (descriptor(t, tile.tile_n, block_d) if tma else t for t in (k, v))
    sign = (problem.scale > 0) - (problem.scale < 0)
    attention_fwd[(tiles * batch_heads, splits)](
        q, keys, values, target, target_lse, q.stride(), k.stride(), v.stride(), target.stride()[:4],
        abs(problem.scale) * LOG2E if sign else 1.0, batch_heads, heads_per_section(problem, batch_heads),
        problem.seqlen_q, problem.seqlen_k, problem.heads_k,
        GROUP=problem.group_size, PACK=config.pack_gqa, CAUSAL=problem.causal, SIGN=sign,
        HEAD_DIM=problem.head_dim, BLOCK_D=block_d, TMA=tma, Q_REGS=tile.q_registers, **_constants(tile),
    )  # fmt: skip
    if splits > 1:
        rows = lse.numel()
        combine[(rows,)](
            target, target_lse, out, lse, rows, problem.seqlen_q, problem.heads_q, splits,
            BLOCK_S=min(16, triton.next_power_of_2(splits)), HEAD_DIM=problem.head_dim, BLOCK_D=block_d, num_warps=1,
        )  # fmt: skip
    return out, lse


def backward(
    problem: AttentionProblem,
    config: TritonConfig,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), contiguous, in the inputs' dtype. ``out`` and ``lse`` are what a forward returned: contiguous."""
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    stats = empty_stats(problem, config, q)
    launch_dq(problem, config.dq, q, k, v, out, dout, lse, stats, dq)
    launch_dkdv(problem, config.dkdv, q, k, v, dout, stats, dk, dv)
    return dq, dk, dv


def empty_stats(problem: AttentionProblem, config: TritonConfig, like: torch.Tensor) -> torch.Tensor:
    """The workspace that the first backward kernel fills for the second: (2, B, Hq, rows), rows in whole tiles."""
    rows = _round_up(problem.seqlen_q, math.lcm(config.dq.tile_m, config.dkdv.tile_m))
    shape = (2, problem.batch, problem.heads_q, rows)
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def launch_dq(problem: AttentionProblem, tile: Tile, q, k, v, out, dout, lse, stats, dq) -> None:
    """Fill dq and stats."""
    block_d = padded_head_dim(problem.head_dim)
    rows, heads = stats.shape[3], problem.batch * problem.heads_q
    tma = tile.tma and addressable(k) and addressable(v)
    keys, values = (descriptor(t, tile.tile_n, block_d) if tma else t for t in (k, v))
    attention_bwd_dq[(rows // tile.tile_m * heads,)](
        q, keys, values, out, dout, lse, stats, dq,
        q.stride(), k.stride(), v.stride(), out.stride(), dout.stride(),
        problem.scale, heads, heads_per_section(problem, heads),
        problem.seqlen_q, problem.seqlen_k, problem.heads_k, rows,
        GROUP=problem.group_size, CAUSAL=problem.causal, HEAD_DIM=problem.head_dim, BLOCK_D=block_d, TMA=tma,
        **_constants(tile),
    )  # fmt: skip


def launch_dkdv(problem: AttentionProblem, tile: Tile, q, k, v, dout, stats, dk, dv) -> None:
    """Fill dk and dv from the stats that launch_dq wrote."""
    block_d = padded_head_dim(problem.head_dim)
    rows, heads = stats.shape[3], problem.batch * problem.heads_k
    tma = tile.tma and addressable(q) and addressable(dout)
    queries, douts = (descriptor(t, tile.tile_m, block_d) if tma else t for t in (q, dout))
    attention_bwd_dkdv[(triton.cdiv(problem.seqlen_k, tile.tile_n) * heads,)](
        queries, k, v, douts, stats, dk, dv,
        q.stride(), k.stride(), v.stride(), dout.stride(), dk.stride(),
        problem.scale, heads, heads_per_section(problem, heads),
        problem.seqlen_q, problem.seqlen_k, problem.heads_k, rows,
        GROUP=problem.group_size, CAUSAL=problem.causal, HEAD_DIM=problem.head_dim, BLOCK_D=block_d, TMA=tma,
        **_constants(tile),
    )  # fmt: skip


def addressable(tensor: torch.Tensor) -> bool:
    """Whether the copy engine can read the tensor where it is: 16-byte aligned, last dimension dense, no stride 0."""
    size = tensor.element_size()
    strides = [
        stride * size for stride, n in zip(tensor.stride()[:3], tensor.shape[:3], strict=True) if n > 1
    ]
    return (
        tensor.stride(3) == 1
        and tensor.data_ptr() % 16 == 0
        and all(0 < stride < 2**40 and stride % 16 == 0 for stride in strides)
    )


def descriptor(tensor: torch.Tensor, rows: int, block_d: int) -> TensorDescriptor:
    """A descriptor of (batch, heads, seqlen, head_dim) that reads tiles of `rows` x `block_d` of one head."""
    batch, seqlen, heads, head_dim = tensor.shape
    size = 16 // tensor.element_size()
    # The stride of a dimension of size 1 means nothing, but must be valid.
    strides = [tensor.stride(i) if tensor.shape[i] > 1 else _round_up(head_dim, size) for i in (0, 2, 1)]
    return TensorDescriptor(tensor, [batch, heads, seqlen, head_dim], [*strides, 1], [1, 1, rows, block_d])


def _constants(tile: Tile) -> dict[str, int | bool]:
    return {
        "TILE_M": tile.tile_m, "TILE_N": tile.tile_n, "LOOKAHEAD": tile.lookahead,
        "num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers,
    }  # fmt: skip


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
