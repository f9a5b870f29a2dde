"""Host side of the Triton backend: tensors and a config -> kernel launches on the current stream.

What follows from the problem and its config is worked out once (`prepare_forward`, `prepare_backward`); a call looks at
nothing but the scale and the strides and addresses of its tensors. See launch.py for how a kernel is started. `extras`
are the tensors that the problem names: those that say where packed sequences lie, those that its score looks up, sinks.

Kernels see packed sequences as a batch of one: tensors get a dimension here, and results lose it. Pages have as many
dimensions as a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton

from flashcore.backends.triton import score
from flashcore.backends.triton.attention_bwd import attention_bwd_dkdv, attention_bwd_dq
from flashcore.backends.triton.attention_fwd import attention_fwd, combine
from flashcore.backends.triton.configs import Tile, TritonConfig, heads_per_section, padded_head_dim
from flashcore.backends.triton.launch import Launch
from flashcore.problem import AttentionProblem

LOG2E = math.log2(math.e)

Tensor = torch.Tensor
Forward = Callable[..., tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


def forward(
    problem: AttentionProblem, config: TritonConfig, q: Tensor, k: Tensor, v: Tensor, *extras: Tensor
) -> tuple[Tensor, Tensor]:
    """out (B, Sq, Hq, Dv) in q's dtype and lse (B, Hq, Sq) float32, both contiguous."""
    return prepare_forward(problem.of_any_scale, config)(q, k, v, problem.scale, *extras)


def backward(
    problem: AttentionProblem, config: TritonConfig, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    dout: Tensor, dlse: Tensor | None = None, *extras: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv), contiguous, in the inputs' dtype. ``out`` and ``lse`` are what a forward returned: contiguous."""
    return prepare_backward(problem.of_any_scale, config)(q, k, v, out, lse, dout, dlse, problem.scale, *extras)


@lru_cache(maxsize=1024)
def prepare_forward(problem: AttentionProblem, config: TritonConfig) -> Forward:
    """`forward` as a callable (q, k, v, scale, *extras, out=None) -> (out, lse), for scales of the problem's sign."""
    tile, splits = config.forward, config.splits
    packed = 0 if not problem.packed else 1 if problem.paged else 3  # of q, k and v
    members = problem.group_size if config.pack_gqa else 1
    batch_heads = problem.batch * problem.heads_q // members
    tiles = triton.cdiv(problem.seqlen_q * members, tile.tile_m)
    changed, has_sink = problem.score.change is not None, problem.score.sink is not None
    sign = 1 if changed else (problem.scale > 0) - (problem.scale < 0)
    out_shape, lse_shape = _seen(problem, problem.out_shape), _seen(problem, problem.lse_shape)
    strides_out = (math.prod(out_shape), *_strides(out_shape)[:3])
    out_dtype = torch.float32 if problem.partial else getattr(torch, problem.dtype)
    launch = Launch(
        attention_fwd, (tiles * batch_heads, splits, 1), (batch_heads, *scalars(problem, batch_heads)),
        constants(problem, tile)
        | dict(
            PACK=config.pack_gqa, SIGN=sign, SINK=has_sink, Q_REGS=tile.q_registers, PAGE=page_size(problem),
        ),
        _options(tile), _streams(problem, 1, 2, tile.tile_n),
    )  # fmt: skip

    def allocate(
        out_shape: tuple, lse_shape: tuple, dtype: torch.dtype, device: torch.device, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if problem.packed:  # rows of no sequence are nobody's to write
            lse = torch.full(lse_shape, -torch.inf, dtype=torch.float32, device=device)
            return torch.zeros(out_shape, dtype=dtype, device=device) if out is None else out.zero_(), lse
        lse = torch.empty(lse_shape, dtype=torch.float32, device=device)
        return torch.empty(out_shape, dtype=dtype, device=device) if out is None else out, lse

    def scales(scale: float) -> tuple[float, float]:
        if changed:
            return float(scale), problem.score.factor * LOG2E
        return float(scale), abs(float(scale)) * LOG2E if sign else 1.0

    def unsplit(
        q: Tensor, k: Tensor, v: Tensor, scale: float, *extras: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        out, lse = allocate(out_shape, lse_shape, out_dtype, q.device, out)
        sink = extras[-1].contiguous() if has_sink else lse
        strides = q.stride(), k.stride(), v.stride(), strides_out
        _launch(launch, (q, k, v, sink, out, lse), strides, scales(scale), problem, extras)
        return out, lse

    if splits == 1:
        return _packed(unsplit, packed) if packed else unsplit

    rows = math.prod(lse_shape)
    merge = Launch(
        combine, (rows, 1, 1), (rows, lse_shape[2], problem.heads_q, splits),
        dict(
            BLOCK_S=min(64, triton.next_power_of_2(splits)), HEAD_DIM_V=problem.head_dim_v,
            BLOCK_DV=padded_head_dim(problem.head_dim_v),
        ),
        dict(num_warps=1 if splits <= 16 else 4),
    )  # fmt: skip

    def split(
        q: Tensor, k: Tensor, v: Tensor, scale: float, *extras: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        device = q.device
        parts, parts_lse = allocate((splits, *out_shape), (splits, *lse_shape), torch.float32, device)
        sink = extras[-1].contiguous() if has_sink else parts_lse
        strides = q.stride(), k.stride(), v.stride(), strides_out
        _launch(launch, (q, k, v, sink, parts, parts_lse), strides, scales(scale), problem, extras)
        out = torch.empty(out_shape, dtype=out_dtype, device=device) if out is None else out
        lse = torch.empty(lse_shape, dtype=torch.float32, device=device)
        merge((parts, parts_lse, out, lse), ())
        return out, lse

    return _packed(split, packed) if packed else split


@lru_cache(maxsize=1024)
def prepare_backward(problem: AttentionProblem, config: TritonConfig) -> Backward:
    """`backward` as a callable (q, k, v, out, lse, dout, dlse, scale, *extras) -> (dq, dk, dv)."""
    stats_shape, align = stats_shape_of(problem, config), alignment(config)
    launch_dq, launch_dq_with_dlse = (prepare_dq(problem, config.dq, align, with_dlse) for with_dlse in (False, True))
    if config.dv is None:
        passes = [prepare_dkdv(problem, config.dkdv, align, config.dq)]
    else:
        passes = [
            prepare_dkdv(problem, config.dkdv, align, config.dq, dv=False),
            prepare_dkdv(problem, config.dv, align, config.dq, dk=False),
        ]
    allocate = torch.zeros if problem.packed else torch.empty

    def run(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, scale: float,
        *extras: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dtype = torch.float32 if problem.partial else q.dtype
        dq, dk, dv = (allocate(t.shape, dtype=dtype, device=t.device) for t in (q, k, v))
        stats = torch.empty(stats_shape, dtype=torch.float32, device=q.device)
        if dlse is None:
            launch_dq(q, k, v, out, dout, lse, lse, stats, dq, scale, *extras)
        else:
            launch_dq_with_dlse(q, k, v, out, dout, lse, dlse.float().contiguous(), stats, dq, scale, *extras)
        for launch in passes:
            launch(q, k, v, dout, stats, dk, dv, scale, *extras)
        return dq, dk, dv

    return _packed(run, 7) if problem.packed else run


def _packed(run: Callable, tensors: int) -> Callable:
    """`run` of packed sequences, whose first arguments are so many tensors or None, and so are those by name."""

    def run_packed(*arguments, **by_name):
        seen = (t if t is None else t[None] for t in arguments[:tensors])
        named = {name: t if t is None else t[None] for name, t in by_name.items()}
        return tuple(result[0] for result in run(*seen, *arguments[tensors:], **named))

    return run_packed


def _seen(problem: AttentionProblem, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1, *shape) if problem.packed else shape


def alignment(config: TritonConfig) -> int:
    """The rows of whole tiles of all backward kernels."""
    return math.lcm(*(tile.tile_m for tile in (config.dq, config.dkdv, config.dv) if tile is not None))


def stats_shape_of(problem: AttentionProblem, config: TritonConfig) -> tuple[int, int, int, int]:
    """Of the workspace that the first backward kernel fills for the others: (4, B, Hq, rows), rows in whole tiles."""
    batch = 1 if problem.packed else problem.batch
    return 4, batch, problem.heads_q, _stats_rows(problem, alignment(config))


def _stats_rows(problem: AttentionProblem, align: int) -> int:
    if problem.packed:
        return (problem.queries.total // align + problem.batch) * align
    return _round_up(problem.seqlen_q, align)


def prepare_dq(problem: AttentionProblem, tile: Tile, align: int, with_dlse: bool = False) -> Callable[..., None]:
    """A callable (q, k, v, out, dout, lse, dlse, stats, dq, scale, *extras) that fills dq and stats.

    :param align: what :func:`alignment` says.
    :param with_dlse: whether there is a dlse; what is passed for it is not used otherwise.
    """
    heads = problem.batch * problem.heads_q
    has_sink = problem.score.sink is not None
    rows = _round_up(problem.seqlen_q, align)
    launch = Launch(
        attention_bwd_dq, (rows // tile.tile_m * heads, 1, 1),
        (heads, *scalars(problem, heads, rows, _stats_rows(problem, align))),
        backward_constants(problem, tile, align) | dict(DLSE=with_dlse, SINK=has_sink),
        _options(tile), _streams(problem, 1, 2, tile.tile_n),
    )  # fmt: skip

    def run(q, k, v, out, dout, lse, dlse, stats, dq, scale, *extras) -> None:
        strides = q.stride(), k.stride(), v.stride(), out.stride(), dout.stride(), dq.stride()
        sink = extras[-1].contiguous() if has_sink else lse
        tensors = q, k, v, sink, out, dout, lse, dlse, stats, dq
        _launch(launch, tensors, strides, _backward_scales(problem, scale), problem, extras)

    return run


def prepare_dkdv(
    problem: AttentionProblem, tile: Tile, align: int, dq_tile: Tile, dk: bool = True, dv: bool = True
) -> Callable[..., None]:
    """A callable (q, k, v, dout, stats, dk, dv, scale, *extras) that fills dk, dv or both from stats.

    :param align: what :func:`alignment` says.
    :param dq_tile: of the kernel that fills them.
    """
    heads, rows = problem.batch * problem.heads_k, _round_up(problem.seqlen_q, align)
    launch = Launch(
        attention_bwd_dkdv, (triton.cdiv(problem.seqlen_k, tile.tile_n) * heads, 1, 1),
        (heads, *scalars(problem, heads, rows, _stats_rows(problem, align), dq_tile.tile_m)),
        backward_constants(problem, tile, align) | dict(DK=dk, DV=dv),
        _options(tile), _streams(problem, 0, 3, tile.tile_m),
    )  # fmt: skip

    def run(q, k, v, dout, stats, dk, dv, scale, *extras) -> None:
        strides = q.stride(), k.stride(), v.stride(), dout.stride(), dk.stride(), dv.stride()
        tensors = q, k, v, dout, stats, dk, dv
        _launch(launch, tensors, strides, _backward_scales(problem, scale), problem, extras)

    return run


def page_size(problem: AttentionProblem) -> int | None:
    """Rows of a page, where keys are in pages."""
    return problem.keys.page_size if problem.paged else None


def constants(problem: AttentionProblem, tile: Tile) -> dict[str, Any]:
    """The constexprs that all kernels have, in their order."""
    visible = problem.visible
    used_q, used_k = (int("used" in rows.tensors) for rows in (problem.queries, problem.keys))
    places = len(problem.score.captured) if problem.packed else None
    return dict(
        GROUP=problem.group_size, BOUND_LEFT=visible.bounded_left, BOUND_RIGHT=visible.bounded_right,
        CHANGE=score.functions(problem).change, HEAD_DIM=problem.head_dim, HEAD_DIM_V=problem.head_dim_v,
        BLOCK_D=padded_head_dim(problem.head_dim), BLOCK_DV=padded_head_dim(problem.head_dim_v), TILE_M=tile.tile_m,
        TILE_N=tile.tile_n, LOOKAHEAD=tile.lookahead, TMA=tile.tma and not problem.packed, PLACES=places,
        USED_Q=used_q, USED_K=used_k,
    )  # fmt: skip


def backward_constants(problem: AttentionProblem, tile: Tile, align: int) -> dict[str, Any]:
    """The constexprs that both backward kernels have, in their order."""
    row = problem.heads_q * max(problem.head_dim, problem.head_dim_v)  # elements of a gradient, at most
    return constants(problem, tile) | dict(
        FAR=256 * row >= 2**31, SLOPE=score.functions(problem).slope, ALIGN=align if problem.packed else None,
    )  # fmt: skip


def scalars(problem: AttentionProblem, heads: int, *rows: int) -> tuple:
    """The integers that all kernels have after the number of `heads` that programs are made for."""
    total_k = problem.keys.pages if problem.paged else problem.k_shape[-3]
    return (
        heads_per_section(problem, heads), problem.seqlen_q, problem.seqlen_k, problem.q_shape[-3], total_k,
        problem.heads_k, *rows, *diagonals(problem), tuple(shape for _, shape in problem.score.captured) or None,
    )  # fmt: skip


def diagonals(problem: AttentionProblem) -> tuple[int, int]:
    """``left`` and ``right`` of tiles.py, or what `sequence` makes them of. Where there is none: beyond all keys."""
    if problem.packed:
        left = problem.seqlen_k if problem.mask.left is None else min(problem.mask.left, problem.seqlen_k)
        right = problem.seqlen_q if problem.mask.right is None else min(problem.mask.right, problem.seqlen_q)
        return left, right
    mask, offset = problem.mask, problem.visible.offset
    left = -problem.seqlen_q if mask.left is None else max(offset - mask.left, -problem.seqlen_q)
    right = problem.seqlen_k if mask.right is None else min(offset + mask.right, problem.seqlen_k)
    return left, right


def _launch(launch: Launch, tensors: tuple, strides: tuple, scales: tuple, problem: AttentionProblem, extras: tuple):
    """Launch a kernel with `captured`: None, or the tensors that the score looks up, and behind them those that say
    where packed sequences lie, of which only a table has strides."""
    if extras:
        places = len(problem.queries.tensors) + len(problem.keys.tensors)
        looked_up = extras[places : places + len(problem.score.captured)]
        if captured := (*looked_up, *extras[:places]):
            strided = captured if problem.paged else looked_up
            launch(tensors, (*strides, tuple(t.stride() for t in strided) or None), *scales, captured=captured)
            return
    launch(tensors, (None, *strides, None), *scales)


def _backward_scales(problem: AttentionProblem, scale: float) -> tuple[float, float, float]:
    """Of the scores, of the exponent, and of dS."""
    scale, factor = float(scale), problem.score.factor
    return scale, (scale if problem.score.change is None else factor) * LOG2E, scale * factor


def _streams(problem: AttentionProblem, first: int, second: int, rows: int) -> tuple[tuple[int, int, int], ...]:
    """What the copy engine reads, by position: the first of two tensors is as wide as q, the second as v."""
    return (
        (first, rows, padded_head_dim(problem.head_dim)),
        (second, rows, padded_head_dim(problem.head_dim_v)),
    )


def _options(tile: Tile) -> dict[str, int | None]:
    return {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers}


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
