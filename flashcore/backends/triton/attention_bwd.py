"""
Attention backward without atomics: one kernel for dQ, one for dK and dV. Deterministic.

Computes    with S = change(scale * q k^T), P = exp(S + mask - lse), dP = dout v^T, delta = rowsum(out * dout) - dlse,
            dS = P * (dP - delta) * change':
                dQ = scale * dS K,   dK = scale * dS^T Q,   dV = P^T dout.
            Shapes, dtypes and limits are those of attention_fwd.py. Sinks are part of lse, and that of delta: nothing
            else is to be known of them here. dlse, the gradient of the LSE, may be left out.
Kernels     attention_bwd_dq   a program owns TILE_M queries of one query head and loops over the keys they see. It
                               also computes delta, and writes the row statistics that the second kernel reads.
            attention_bwd_dkdv a program owns TILE_N keys of one key head and loops over the queries that see them, of
                               all GROUP query heads one after the other: the sum over the group stays in registers.
                               It computes dK, dV or both (constexprs DK, DV). At head_dim 256 both together leave no
                               registers for 128 keys, and two warpgroups that share 64 must pass P through shared
                               memory: one product more, in two launches, is then the lesser evil.
            Seven matrix products where a fused backward has five (S and dP are computed twice), in exchange for no
            floating-point atomics, no float32 copy of dQ in memory and no third pass over it.
Workspace   stats, float32 (4, B, Hq, rows): -lse * log2(e), delta, and what huge scores need; rows = Sq rounded up to
            all kernels' tiles, so that the second kernel reads it without bounds. Rows that see no key, and rows past
            Sq, have -inf for the first: P = exp2(s - inf) = 0 for them, and dS = 0. `stats_of` says where those of a
            packed sequence are.
Data flow   dq:   q, dout -> shared memory once;  k, v -> buffers -> S, dP -> dS in registers -> dS K into dq
            dkdv: k, v -> shared memory once;  q, dout -> buffers -> S^T, dP^T -> P^T, dS^T in registers -> dV, dK
            Keys are the rows of S^T, so P^T and dS^T are first operands straight from registers.
Schedule    LOOKAHEAD overlaps exponentials with products that nothing waits for (see attention_fwd.py):
            dq:   dS(i) while dS K (i-1) runs | S(i+1), dP(i+1), waits for all | round dS | dS K (i) is issued
            dkdv: P(i) while dS^T Q (i-1) runs | dP(i) | P^T dout (i) is issued | dS(i) while it runs | S(i+1) |
                  dS^T Q (i) is issued
            K (dq) or Q (dkdv) of a tile is then read twice, one iteration apart; L2 has it.
Masking     Only the keys between `begin` and `end` of some query of the tile are read, and only the queries that see
            some key of it. Tiles that cross a diagonal or the end of the keys select, behind a uniform branch; others
            do not. Rows past the end are zeros and have P = 0.
Numerics    P = exp2(s * scale_log2 - lse), one multiply-add. The LSE's own rounding is a factor of a row's P: from HUGE
            on one that bfloat16 shows, from about 2^29 on one that float32 cannot hold. A program with such a row
            computes the maxima and sums of its rows again, first. P is then exp2((s - maximum) * scale_log2 -
            log2(sum)), in the second kernel as well: the first plane of stats has -log2(sum), the third the maxima (0
            in tiles without a huge row), and the last which tiles have one, (B, Hq, rows / TILE_M of the first kernel).
Scores      CHANGE and SLOPE, made by score.py, are the changed score and its derivative (None: it is 1), both of the
            scaled score. A constant factor of both is left out: it is in scale_log2 and in scale_grad.
"""

# fmt: off
import triton
import triton.language as tl

from flashcore.backends.triton.tiles import (
    begin,
    end,
    head_base,
    keep,
    keys_of,
    load_rows,
    queries_of,
    round_here,
    sequence,
    store_rows,
    tile_and_head,
)

LOG2E = tl.constexpr(1.4426950408889634)
HUGE = tl.constexpr(2.0**15)  # an LSE in units of log2
FLAGS = tl.constexpr(512)  # that are read at once


@triton.jit
def stats_of(batch_head, batch, head, heads, batches, first_q, seqlen_q, rows, stats_rows, ALIGN: tl.constexpr):
    """(at, plane, rows): where in stats a head's statistics of a sequence begin, how large a plane is, and how many
    they are, in whole tiles of all kernels.

    Of packed sequences a row of stats holds all of a head's. Each begins with a tile of ALIGN rows, one further for
    each sequence before it: none ends in the tile where the next begins.
    """
    at = tl.cast(batch_head, tl.int64) * stats_rows
    plane = tl.cast(batches * heads, tl.int64) * stats_rows
    if ALIGN is not None:
        at = tl.cast(head, tl.int64) * stats_rows + (first_q // ALIGN + batch) * ALIGN
        plane = tl.cast(heads, tl.int64) * stats_rows
        rows = tl.cdiv(seqlen_q, ALIGN) * ALIGN
    return at, plane, rows


@triton.jit(do_not_specialize=["batch_heads", "section", "seqlen_q", "seqlen_k", "total_q", "total_k", "heads_k",
                               "rows", "stats_rows", "left", "right", "sizes"])
def attention_bwd_dq(q, k, v, sink, out, dout, lse, dlse, stats, dq, captured, strides_q, strides_k, strides_v,
                     strides_out, strides_dout, strides_dq, strides_captured, scale, scale_log2, scale_grad,
                     batch_heads, section, seqlen_q, seqlen_k, total_q, total_k, heads_k, rows, stats_rows, left, right,
                     sizes, GROUP: tl.constexpr, BOUND_LEFT: tl.constexpr, BOUND_RIGHT: tl.constexpr,
                     CHANGE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
                     BLOCK_DV: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, LOOKAHEAD: tl.constexpr,
                     TMA: tl.constexpr, PLACES: tl.constexpr, USED_Q: tl.constexpr, USED_K: tl.constexpr,
                     FAR: tl.constexpr, SLOPE: tl.constexpr, ALIGN: tl.constexpr, DLSE: tl.constexpr,
                     SINK: tl.constexpr):
    """lse and dlse are contiguous (B, Hq, Sq); dlse is not used without DLSE. A sequence has up to `rows` rows of
    stats, a row of stats has `stats_rows`. `scale_grad` is what dS is to be multiplied with. The others are as in
    attention_fwd."""
    tile, batch_head = tile_and_head(rows // TILE_M, batch_heads, section)
    heads = heads_k * GROUP
    batch = batch_head // heads
    head = batch_head % heads
    head_k = head // GROUP
    slab, first_q, first_k = batch, 0, 0
    if PLACES is not None:
        slab = 0
        first_q, seqlen_q, first_k, seqlen_k, left, right = sequence(
            captured, batch, total_q, total_k, seqlen_q, seqlen_k, left, right, PLACES, USED_Q, USED_K)
    at, plane, rows = stats_of(batch_head, batch, head, heads, batch_heads // heads, first_q, seqlen_q, rows,
                               stats_rows, ALIGN)
    tiles = rows // TILE_M  # with those past seqlen_q, which only write stats
    if BOUND_RIGHT:
        tile = tiles - 1 - tile
    if PLACES is not None and (tile < 0) | (tile >= tiles):
        return
    first = tile * TILE_M
    query = first + tl.arange(0, TILE_M)

    q_head = head_base(q, slab, first_q, head, strides_q, False)
    q_tile = load_rows(q_head, batch, head, first, seqlen_q, strides_q, HEAD_DIM, TILE_M, BLOCK_D, False)
    dout_head = head_base(dout, slab, first_q, head, strides_dout, False)
    dout_tile = load_rows(dout_head, batch, head, first, seqlen_q, strides_dout, HEAD_DIM_V, TILE_M, BLOCK_DV, False)
    out_head = head_base(out, slab, first_q, head, strides_out, False)
    out_tile = load_rows(out_head, batch, head, first, seqlen_q, strides_out, HEAD_DIM_V, TILE_M, BLOCK_DV, False)
    delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    head_rows = tl.cast(slab * heads + head, tl.int64) * total_q + first_q + query
    row_lse = tl.load(lse + head_rows, mask=query < seqlen_q, other=float("-inf"))
    if DLSE:
        delta -= tl.load(dlse + head_rows, mask=query < seqlen_q, other=0.0)
    minus_lse = tl.where(row_lse == float("-inf"), float("-inf"), row_lse * -LOG2E)
    sees_from = begin(query, left, seqlen_k, BOUND_LEFT)  # as in attention_fwd
    sees_to = end(query, right, seqlen_k, BOUND_RIGHT)
    last = tl.minimum(first + TILE_M, seqlen_q) - 1
    start, limit, full_start, full_stop = keys_of(first, last, left, right, seqlen_k, BOUND_LEFT, BOUND_RIGHT)
    stop = tl.where(first < seqlen_q, limit, start)
    last_full = full_stop - TILE_N

    k_head = head_base(k, slab, first_k, head_k, strides_k, TMA)
    v_head = head_base(v, slab, first_k, head_k, strides_v, TMA)
    positions = scale, batch, head, query[:, None], seqlen_k - seqlen_q
    looked_up = captured, strides_captured, sizes
    visible = sees_from, sees_to
    row_max = tl.zeros([TILE_M], tl.float32)
    is_huge = (tl.abs(minus_lse) >= HUGE) & (minus_lse != float("-inf"))
    huge = tl.max(is_huge.to(tl.int32), 0) != 0
    if huge:
        row_max, row_sum = maxima_and_sums(q_tile, k_head, batch, head_k, start, stop, limit, strides_k, scale_log2,
                                           visible, positions, looked_up, CHANGE, HEAD_DIM, TILE_M, TILE_N, BLOCK_D,
                                           TMA)
        if SINK:
            row_sum += tl.exp2(tl.load(sink + head).to(tl.float32) * LOG2E - row_max * scale_log2)
        minus_lse = tl.where(row_sum == 0.0, float("-inf"), -tl.log2(row_sum))
    stats_row = stats + at + query
    tl.store(stats_row, minus_lse)
    tl.store(stats_row + plane, delta)
    tl.store(stats_row + 2 * plane, row_max)
    tl.store(stats + 3 * plane + at + tile, huge.to(tl.float32))
    if huge:
        tl.debug_barrier()  # other threads read the maxima

    acc = tl.zeros([TILE_M, BLOCK_D], tl.float32)
    if LOOKAHEAD:
        k_tile = load_rows(k_head, batch, head_k, start, limit, strides_k, HEAD_DIM, TILE_N, BLOCK_D, TMA)
        s = tl.dot(q_tile, k_tile.T, input_precision="ieee")
        v_tile = load_rows(v_head, batch, head_k, start, limit, strides_v, HEAD_DIM_V, TILE_N, BLOCK_DV, TMA)
        dp = tl.dot(dout_tile, v_tile.T, input_precision="ieee")
    for key in tl.range(start, stop, TILE_N):
        k_tile = load_rows(k_head, batch, head_k, key, limit, strides_k, HEAD_DIM, TILE_N, BLOCK_D, TMA)
        if not LOOKAHEAD:
            s = tl.dot(q_tile, k_tile.T, input_precision="ieee")
            v_tile = load_rows(v_head, batch, head_k, key, limit, strides_v, HEAD_DIM_V, TILE_N, BLOCK_DV, TMA)
            dp = tl.dot(dout_tile, v_tile.T, input_precision="ieee")
        keys = key + tl.arange(0, TILE_N)[None, :]
        if SLOPE is not None:
            slope = SLOPE(s, scale, batch, head, query[:, None], keys, seqlen_k - seqlen_q, captured, strides_captured,
                          sizes)
        if CHANGE is not None:
            s = CHANGE(s, scale, batch, head, query[:, None], keys, seqlen_k - seqlen_q, captured, strides_captured,
                       sizes)
        if huge:
            s = below(s, tl.load(stats_row + 2 * plane)[:, None])
        p = tl.exp2(tl.fma(s, scale_log2, minus_lse[:, None]))
        ds = p * (dp - delta[:, None])
        if SLOPE is not None:
            ds = ds * slope
        crosses = key > last_full
        if BOUND_LEFT:
            crosses = crosses | (key < full_start)
        if crosses:
            seen = keys < sees_to[:, None]
            if BOUND_LEFT:
                seen = seen & (keys >= sees_from[:, None])
            ds = tl.where(seen, ds, 0.0)
        if LOOKAHEAD:  # past the last tile: not used
            k_next = load_rows(k_head, batch, head_k, key + TILE_N, limit, strides_k, HEAD_DIM, TILE_N, BLOCK_D, TMA)
            s = tl.dot(q_tile, k_next.T, input_precision="ieee")
            v_next = load_rows(v_head, batch, head_k, key + TILE_N, limit, strides_v, HEAD_DIM_V, TILE_N, BLOCK_DV,
                               TMA)
            dp = tl.dot(dout_tile, v_next.T, input_precision="ieee")
            ds = round_here(ds, q.dtype.element_ty)  # the last one is being read until S and dP have been waited for
        else:
            ds = ds.to(q.dtype.element_ty)
        acc = tl.dot(ds, k_tile, acc, input_precision="ieee")
    store_rows(dq, acc * scale_grad, slab, head, first_q + first, first_q + seqlen_q, strides_dq, HEAD_DIM, TILE_M,
               BLOCK_D, FAR)


@triton.jit
def maxima_and_sums(q_tile, k_head, batch, head_k, start, stop, limit, strides_k, scale_log2, visible, positions,
                    looked_up, CHANGE: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_M: tl.constexpr,
                    TILE_N: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr):
    """Of each row the score with the largest exponent, 0 without keys, and the sum of exponentials relative to it."""
    sees_from, sees_to = visible
    scale, in_batch, head, query, offset = positions
    captured, strides_captured, sizes = looked_up
    sign = tl.where(scale_log2 < 0.0, -1.0, 1.0)
    steepness = scale_log2 * sign
    row_max = tl.full([TILE_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([TILE_M], tl.float32)
    # Without buffers; but products without tensor cores would hold all of K's tile in registers then.
    for key in tl.range(start, stop, TILE_N, num_stages=None if q_tile.dtype == tl.float32 else 1):
        k_tile = load_rows(k_head, batch, head_k, key, limit, strides_k, HEAD_DIM, TILE_N, BLOCK_D, TMA)
        s = tl.dot(q_tile, k_tile.T, input_precision="ieee")
        keys = key + tl.arange(0, TILE_N)[None, :]
        if CHANGE is not None:
            s = CHANGE(s, scale, in_batch, head, query, keys, offset, captured, strides_captured, sizes)
        s = tl.where((keys < sees_to[:, None]) & (keys >= sees_from[:, None]), s * sign, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_sum = row_sum * tl.exp2((row_max - shift) * steepness)
        row_sum += tl.sum(tl.exp2(below(s, shift[:, None]) * steepness), 1)
        row_max = new_max
    return tl.where(row_max == float("-inf"), 0.0, row_max * sign), row_sum


@triton.jit
def below(s, row_max):
    """How far scores lie from the maximum of their row. Those that differ from it in their last bits alone are equal to
    it: these may be worth orders of magnitude, and the transposed product may have them otherwise."""
    gap = s - row_max
    return tl.where(tl.abs(gap) <= tl.abs(row_max) * 2.0**-22, 0.0, gap)


@triton.jit(do_not_specialize=["batch_heads", "section", "seqlen_q", "seqlen_k", "total_q", "total_k", "heads_k",
                               "rows", "stats_rows", "stats_tile", "left", "right", "sizes"])
def attention_bwd_dkdv(q, k, v, dout, stats, dk, dv, captured, strides_q, strides_k, strides_v, strides_dout,
                       strides_dk, strides_dv, strides_captured, scale, scale_log2, scale_grad, batch_heads, section,
                       seqlen_q, seqlen_k, total_q, total_k, heads_k, rows, stats_rows, stats_tile, left, right, sizes,
                       GROUP: tl.constexpr, BOUND_LEFT: tl.constexpr, BOUND_RIGHT: tl.constexpr, CHANGE: tl.constexpr,
                       HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
                       TILE_M: tl.constexpr, TILE_N: tl.constexpr, LOOKAHEAD: tl.constexpr, TMA: tl.constexpr,
                       PLACES: tl.constexpr, USED_Q: tl.constexpr, USED_K: tl.constexpr, FAR: tl.constexpr,
                       SLOPE: tl.constexpr, ALIGN: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr):
    """`batch_heads` counts B * Hk here; stats were filled in tiles of `stats_tile` rows. DK, DV: which are computed;
    the pointers to what is not are not used."""
    tile, batch_head = tile_and_head(tl.cdiv(seqlen_k, TILE_N), batch_heads, section)
    batch = batch_head // heads_k
    head_k = batch_head % heads_k
    first = tile * TILE_N
    slab, first_q, first_k = batch, 0, 0
    if PLACES is not None:
        slab = 0
        first_q, seqlen_q, first_k, seqlen_k, left, right = sequence(
            captured, batch, total_q, total_k, seqlen_q, seqlen_k, left, right, PLACES, USED_Q, USED_K)
        if first >= seqlen_k:
            return

    k_head = head_base(k, slab, first_k, head_k, strides_k, False)
    k_tile = load_rows(k_head, batch, head_k, first, seqlen_k, strides_k, HEAD_DIM, TILE_N, BLOCK_D, False)
    if DK:
        v_head = head_base(v, slab, first_k, head_k, strides_v, False)
        v_tile = load_rows(v_head, batch, head_k, first, seqlen_k, strides_v, HEAD_DIM_V, TILE_N, BLOCK_DV, False)

    last = tl.minimum(first + TILE_N, seqlen_k) - 1
    start, stop, full_start, full_stop = queries_of(first, last, left, right, seqlen_q, BOUND_LEFT, BOUND_RIGHT)
    start = start // TILE_M * TILE_M  # as stats are in whole tiles
    steps = tl.maximum(tl.cdiv(stop - start, TILE_M), 0) * GROUP
    # Of a head. Where no query sees a key it divides, too: a division by 0 would let the compiler take the first loads,
    # which are issued ahead of the loop, to be wanted.
    tiles = tl.maximum(tl.cdiv(stop - start, TILE_M), 1)
    last_full = full_stop - TILE_M

    at, plane, rows = stats_of(batch_head * GROUP, batch, head_k * GROUP, heads_k * GROUP, batch_heads // heads_k,
                               first_q, seqlen_q, rows, stats_rows, ALIGN)
    stats_tiles = tl.maximum(rows // stats_tile, 1)
    any_huge = tl.zeros([FLAGS], tl.float32)
    flags_end = GROUP * (rows // stats_tile)
    for flag in tl.range(0, flags_end, FLAGS):  # of all heads of the group
        index = flag + tl.arange(0, FLAGS)
        flags = stats + 3 * plane + at + (index // stats_tiles).to(tl.int64) * stats_rows + index % stats_tiles
        any_huge = tl.maximum(any_huge, tl.load(flags, mask=index < flags_end, other=0.0))
    huge = tl.max(any_huge, 0) != 0.0

    if DK:
        dk_acc = tl.zeros([TILE_N, BLOCK_D], tl.float32)
    if DV:
        dv_acc = tl.zeros([TILE_N, BLOCK_DV], tl.float32)
    if LOOKAHEAD:
        q_head = head_base(q, slab, first_q, head_k * GROUP, strides_q, TMA)
        q_tile = load_rows(q_head, batch, head_k * GROUP, start, seqlen_q, strides_q, HEAD_DIM, TILE_M, BLOCK_D, TMA)
        s = tl.dot(k_tile, q_tile.T, input_precision="ieee")
    for step in tl.range(0, steps):
        member = step // tiles if GROUP > 1 else 0
        head = head_k * GROUP + member
        query = start + (step - member * tiles) * TILE_M
        if DK or not LOOKAHEAD:
            q_head = head_base(q, slab, first_q, head, strides_q, TMA)
            q_tile = load_rows(q_head, batch, head, query, seqlen_q, strides_q, HEAD_DIM, TILE_M, BLOCK_D, TMA)
        dout_head = head_base(dout, slab, first_q, head, strides_dout, TMA)
        dout_tile = load_rows(dout_head, batch, head, query, seqlen_q, strides_dout, HEAD_DIM_V, TILE_M, BLOCK_DV, TMA)
        head_stats = stats + at + tl.cast(member, tl.int64) * stats_rows + query
        minus_lse = tl.load(head_stats + tl.arange(0, TILE_M))
        if DK:
            delta = tl.load(head_stats + plane + tl.arange(0, TILE_M))

        if not LOOKAHEAD:
            s = tl.dot(k_tile, q_tile.T, input_precision="ieee")
        queries = query + tl.arange(0, TILE_M)[None, :]
        keys = first + tl.arange(0, TILE_N)[:, None]
        if SLOPE is not None:
            slope = SLOPE(s, scale, batch, head, queries, keys, seqlen_k - seqlen_q, captured, strides_captured, sizes)
        if CHANGE is not None:
            s = CHANGE(s, scale, batch, head, queries, keys, seqlen_k - seqlen_q, captured, strides_captured, sizes)
        x = tl.fma(s, scale_log2, minus_lse[None, :])
        if huge:
            s = below(s, tl.load(head_stats + 2 * plane + tl.arange(0, TILE_M))[None, :])
            x = tl.fma(s, scale_log2, minus_lse[None, :])
        p = tl.exp2(x)
        crosses = query < full_start
        if BOUND_LEFT:
            crosses = crosses | (query > last_full)
        if CHANGE is not None:  # the score of a row past the end may be infinite
            crosses = crosses | (query + TILE_M > seqlen_q)
        if crosses:
            seen = keep(queries, keys, left, right, BOUND_LEFT, BOUND_RIGHT)
            if CHANGE is not None:
                seen = seen & (queries < seqlen_q)
            p = tl.where(seen, p, 0.0)
        if DK:
            dp = tl.dot(v_tile, dout_tile.T, input_precision="ieee")
            if DV:
                dv_acc = tl.dot(p.to(k.dtype.element_ty), dout_tile, dv_acc, input_precision="ieee")
            ds = p * slope if SLOPE is not None else p
            ds = ds * (dp - delta[None, :])
            if DV or not LOOKAHEAD:
                ds = ds.to(k.dtype.element_ty)
        if LOOKAHEAD:  # the last step reads its own tile again, unused
            next_step = tl.minimum(step + 1, steps - 1)
            next_member = next_step // tiles if GROUP > 1 else 0
            next_head = head_k * GROUP + next_member
            next_query = start + (next_step - next_member * tiles) * TILE_M
            q_head = head_base(q, slab, first_q, next_head, strides_q, TMA)
            q_next = load_rows(q_head, batch, next_head, next_query, seqlen_q, strides_q, HEAD_DIM, TILE_M, BLOCK_D,
                               TMA)
            s = tl.dot(k_tile, q_next.T, input_precision="ieee")
            if DK and not DV:  # with both, the product dP waits for the last dS; here S does
                ds = round_here(ds, k.dtype.element_ty)
            if not DK:
                p = round_here(p, k.dtype.element_ty)
        if DK:
            dk_acc = tl.dot(ds, q_tile, dk_acc, input_precision="ieee")
        else:
            dv_acc = tl.dot(p.to(k.dtype.element_ty), dout_tile, dv_acc, input_precision="ieee")
    if DK:
        store_rows(dk, dk_acc * scale_grad, slab, head_k, first_k + first, first_k + seqlen_k, strides_dk, HEAD_DIM,
                   TILE_N, BLOCK_D, FAR)
    if DV:
        store_rows(dv, dv_acc, slab, head_k, first_k + first, first_k + seqlen_k, strides_dv, HEAD_DIM_V, TILE_N,
                   BLOCK_DV, FAR)
