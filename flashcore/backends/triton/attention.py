"""Host side of the Triton backend: tensors and a config -> kernel launches on the current stream.

What follows from the problem and its config is worked out once (`prepare_forward`, `prepare_backward`); a call looks at
nothing but the strides and addresses of its tensors. See launch.py for how a kernel is started.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import triton

from flashcore.backends.triton.attention_bwd import attention_bwd_dkdv, attention_bwd_dq
from flashcore.backends.triton.attention_fwd import attention_fwd, combine
from flashcore.backends.triton.configs import Tile, TritonConfig, heads_per_section, padded_head_dim
from flashcore.backends.triton.launch import Launch
from flashcore.problem import AttentionProblem

LOG2E = math.log2(math.e)

Tensor = torch.Tensor
Forward = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]


def forward(
    problem: AttentionProblem, config: TritonConfig, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """out (B, Sq, Hq, D) in q's dtype and lse (B, Hq, Sq) float32, both contiguous."""
    return prepare_forward(problem.of_any_scale, config)(q, k, v, problem.scale)


def backward(
    problem: AttentionProblem, config: TritonConfig, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv), contiguous, in the inputs' dtype. ``out`` and ``lse`` are what a forward returned: contiguous."""
    return prepare_backward(problem.of_any_scale, config)(q, k, v, out, lse, dout, problem.scale)


@lru_cache(maxsize=1024)
def prepare_forward(problem: AttentionProblem, config: TritonConfig) -> Forward:
    """`forward` as a callable (q, k, v, scale) -> (out, lse), for all scales of the problem's sign."""
    tile, splits = config.forward, config.splits
    block_d = padded_head_dim(problem.head_dim)
    members = problem.group_size if config.pack_gqa else 1
    batch_heads = problem.batch * problem.heads_q // members
    tiles = triton.cdiv(problem.seqlen_q * members, tile.tile_m)
    sign = (problem.scale > 0) - (problem.scale < 0)
    out_shape, lse_shape = problem.out_shape, problem.lse_shape
    strides_out = (math.prod(out_shape), *_strides(out_shape)[:3])
    launch = Launch(
        attention_fwd, (tiles * batch_heads, splits, 1),
        (
            batch_heads, heads_per_section(problem, batch_heads), problem.seqlen_q, problem.seqlen_k,
            problem.heads_k,
        ),
        dict(
            GROUP=problem.group_size, PACK=config.pack_gqa, CAUSAL=problem.causal, SIGN=sign,
            HEAD_DIM=problem.head_dim, BLOCK_D=block_d, TILE_M=tile.tile_m, TILE_N=tile.tile_n,
            LOOKAHEAD=tile.lookahead, TMA=tile.tma, Q_REGS=tile.q_registers,
        ),
        _options(tile), ((1, 2), tile.tile_n, block_d),
    )  # fmt: skip

    def scale_log2(scale: float) -> float:
        return abs(float(scale)) * LOG2E if sign else 1.0

    def unsplit(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out = torch.empty(out_shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
        launch((q, k, v, out, lse), (q.stride(), k.stride(), v.stride(), strides_out), scale_log2(scale))
        return out, lse

    if splits == 1:
        return unsplit

    rows = math.prod(lse_shape)
    merge = Launch(
        combine, (rows, 1, 1), (rows, problem.seqlen_q, problem.heads_q, splits),
        dict(BLOCK_S=min(64, triton.next_power_of_2(splits)), HEAD_DIM=problem.head_dim, BLOCK_D=block_d),
        dict(num_warps=1 if splits <= 16 else 4),
    )  # fmt: skip

    def split(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        device = q.device
        parts = torch.empty((splits, *out_shape), dtype=torch.float32, device=device)
        parts_lse = torch.empty((splits, *lse_shape), dtype=torch.float32, device=device)
        launch((q, k, v, parts, parts_lse), (q.stride(), k.stride(), v.stride(), strides_out), scale_log2(scale))
        out = torch.empty(out_shape, dtype=q.dtype, device=device)
        lse = torch.empty(lse_shape, dtype=torch.float32, device=device)
        merge((parts, parts_lse, out, lse), ())
        return out, lse

    return split


@lru_cache(maxsize=1024)
def prepare_backward(problem: AttentionProblem, config: TritonConfig) -> Backward:
    """`backward` as a callable (q, k, v, out, lse, dout, scale) -> (dq, dk, dv)."""
    stats_shape = stats_shape_of(problem, config)
    rows = stats_shape[3]
    launch_dq = prepare_dq(problem, config.dq, rows)
    if config.dv is None:
        passes = [prepare_dkdv(problem, config.dkdv, rows)]
    else:
        passes = [
            prepare_dkdv(problem, config.dkdv, rows, dv=False),
            prepare_dkdv(problem, config.dv, rows, dk=False),
        ]

    def run(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, scale: float):
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        stats = torch.empty(stats_shape, dtype=torch.float32, device=q.device)
        launch_dq(q, k, v, out, dout, lse, stats, dq, scale)
        for launch in passes:
            launch(q, k, v, dout, stats, dk, dv, scale)
        return dq, dk, dv

    return run


def stats_shape_of(problem: AttentionProblem, config: TritonConfig) -> tuple[int, int, int, int]:
    """Of the workspace that the first backward kernel fills for the others: (2, B, Hq, rows), rows in whole tiles."""
    tiles = [tile.tile_m for tile in (config.dq, config.dkdv, config.dv) if tile is not None]
    return 2, problem.batch, problem.heads_q, _round_up(problem.seqlen_q, math.lcm(*tiles))


def prepare_dq(problem: AttentionProblem, tile: Tile, rows: int) -> Callable[..., None]:
    """A callable (q, k, v, out, dout, lse, stats, dq, scale) that fills dq and stats, (2, B, Hq, `rows`)."""
    block_d = padded_head_dim(problem.head_dim)
    heads = problem.batch * problem.heads_q
    launch = Launch(
        attention_bwd_dq, (rows // tile.tile_m * heads, 1, 1),
        (
            heads, heads_per_section(problem, heads), problem.seqlen_q, problem.seqlen_k, problem.heads_k, rows,
        ),
        dict(
            GROUP=problem.group_size, CAUSAL=problem.causal, HEAD_DIM=problem.head_dim, BLOCK_D=block_d,
            TILE_M=tile.tile_m, TILE_N=tile.tile_n, LOOKAHEAD=tile.lookahead, TMA=tile.tma,
        ),
        _options(tile), ((1, 2), tile.tile_n, block_d),
    )  # fmt: skip

    def run(q, k, v, out, dout, lse, stats, dq, scale) -> None:
        strides = (q.stride(), k.stride(), v.stride(), out.stride(), dout.stride())
        launch((q, k, v, out, dout, lse, stats, dq), strides, float(scale))

    return run


def prepare_dkdv(
    problem: AttentionProblem, tile: Tile, rows: int, dk: bool = True, dv: bool = True
) -> Callable[..., None]:
    """A callable (q, k, v, dout, stats, dk, dv, scale) that fills dk, dv or both from the stats of dq's kernel."""
    block_d = padded_head_dim(problem.head_dim)
    heads = problem.batch * problem.heads_k
    launch = Launch(
        attention_bwd_dkdv, (triton.cdiv(problem.seqlen_k, tile.tile_n) * heads, 1, 1),
        (
            heads, heads_per_section(problem, heads), problem.seqlen_q, problem.seqlen_k, problem.heads_k, rows,
        ),
        dict(
            GROUP=problem.group_size, CAUSAL=problem.causal, HEAD_DIM=problem.head_dim, BLOCK_D=block_d,
            TILE_M=tile.tile_m, TILE_N=tile.tile_n, LOOKAHEAD=tile.lookahead, TMA=tile.tma, DK=dk, DV=dv,
        ),
        _options(tile), ((0, 3), tile.tile_m, block_d),
    )  # fmt: skip

    def run(q, k, v, dout, stats, dk, dv, scale) -> None:
        strides = (q.stride(), k.stride(), v.stride(), dout.stride(), dk.stride())
        launch((q, k, v, dout, stats, dk, dv), strides, float(scale))

    return run


def _options(tile: Tile) -> dict[str, int | None]:
    return {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers}


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
