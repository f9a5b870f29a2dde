"""
Attention forward, and the combination of its splits, for any GPU that Triton supports.

Computes    out = softmax(change(scale * q k^T) + mask) v, and lse = log(sum(exp(change(scale * q k^T) + mask))), per
            head; with sinks exp(sink) joins the sum. q (B, Sq, Hq, D), k (B, Sk, Hk, D), v (B, Sk, Hk, Dv), out
            (B, Sq, Hq, Dv), Hq a multiple of Hk; lse float32 (B, Hq, Sq). float16, bfloat16, and float32 without
            tensor cores; D and Dv up to 256. Masks are windows aligned to the bottom right, causal among them.
            Sequences are of one length, or packed (see tiles.py): q (total, Hq, D), lse (Hq, total). Keys of packed
            queries may be in pages: k (pages, page_size, Hk, D).
Grid        (row tiles x heads, splits). A program owns TILE_M rows of one head and one contiguous share (split) of the
            keys that these rows see. PACK makes rows of all GROUP query heads of a key head, row = query * GROUP +
            member, so that each tile of keys is read once per group: what decoding needs. Order: `tile_and_head`;
            where the last query sees most, tiles start with the last.
Data flow   q -> registers or shared memory, once;  k, v -> `stages` buffers in shared memory -> tensor cores -> acc in
            registers -> out. With more than one split out and lse are float32 partial results, which `combine` merges.
Schedule    LOOKAHEAD computes the scores of the next tile before the product with V of this one:
                softmax(i) while P V (i-1) runs | S(i+1), waits for both | round P, rescale acc | P V (i) is issued
            On Hopper, where products are asynchronous, Triton keeps P V in flight over the loop's back edge this way
            (checked in the SASS: no wait between its HGMMA and those of the next S). P is rounded only after that
            wait: until then the registers that hold the last one are being read. It costs one product of scores per
            program that is thrown away, and one more buffer for K. Without it the softmax waits for S and the
            tensor cores wait for the softmax, unless another program on the SM fills in.
Masking     Tiles of keys go from the first key that the first row sees to the last key that the last row sees: those
            outside a window are not read. Only tiles that hold a key some row does not see compare and select, behind
            a uniform branch; hidden scores are replaced by -inf, never added to. K and V past the end are zeros.
Scores      CHANGE, made by score.py from the problem's expression, is applied to scaled scores. A constant factor of
            the changed score is left to the exponent: scale_log2 is that factor times log2(e).
Numerics    Without a change scores stay unscaled; scale * log2(e) is folded into the exponent:
            p = exp2(s * scale_log2 - row_max), one multiply-add per element. That needs scale > 0: SIGN moves the sign
            into q, and scale 0 becomes q = 0. A row without any key keeps row_max = -inf and row_sum = 0: its exponents
            are taken relative to 0, its output is 0 and its lse -inf (or its sink); the same holds for a split in which
            a row sees no key, which `combine` then weighs with exactly 0. P is rounded to the input dtype for P V;
            everything else is float32. The order of all additions depends on shapes and config only: repeated calls
            give the same bits.
Huge scores The rounding of row_max is a factor that all exponentials of a row and their sum share: from HUGE on up to
            2, from 2^28 on more than P holds. A program that finds such a maximum in the end does its keys again, by
            p = exp2((s - row_max) * scale_log2): one operation more per element, and exact where all the weight is.
            Changed scores, and float32 without tensor cores, are computed so from the start.
"""

# fmt: off
import triton
import triton.language as tl

from flashcore.backends.triton.tiles import (
    begin,
    end,
    head_base,
    keys_of,
    load_rows,
    round_here,
    sequence,
    tile_and_head,
)

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
HUGE = tl.constexpr(2.0**24)  # a maximum in units of log2


@triton.jit(do_not_specialize=["batch_heads", "section", "seqlen_q", "seqlen_k", "total_q", "total_k", "heads_k",
                               "left", "right", "sizes"])
def attention_fwd(q, k, v, sink, out, lse, captured, strides_q, strides_k, strides_v, strides_out, strides_captured,
                  scale, scale_log2, batch_heads, section, seqlen_q, seqlen_k, total_q, total_k, heads_k, left, right,
                  sizes, GROUP: tl.constexpr, BOUND_LEFT: tl.constexpr, BOUND_RIGHT: tl.constexpr,
                  CHANGE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
                  BLOCK_DV: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, LOOKAHEAD: tl.constexpr,
                  TMA: tl.constexpr, PLACES: tl.constexpr, USED_Q: tl.constexpr,
                  USED_K: tl.constexpr, PACK: tl.constexpr, SIGN: tl.constexpr, SINK: tl.constexpr,
                  Q_REGS: tl.constexpr, PAGE: tl.constexpr):
    """`batch_heads` counts the heads that programs are made for: B * Hk with PACK, else B * Hq. `out` is
    (splits, B, Sq, Hq, Dv) with `strides_out` in that order, `lse` is contiguous (splits, B, Hq, Sq), `sink` is (Hq,)
    and not used without SINK. `captured` is None, or a tuple of the tensors that CHANGE looks up and whose shapes are
    `sizes`; `scale` is for CHANGE. Of packed sequences seqlen_q and seqlen_k are bounds, total_q and total_k the rows
    of the tensors, left and right how far the mask reaches; of others total is seqlen, and PLACES None. PAGE is the
    rows of a page where keys are in `total_k` pages, and else None."""
    members: tl.constexpr = GROUP if PACK else 1  # query heads in one tile
    sharing: tl.constexpr = 1 if PACK else GROUP  # programs' heads that read the same key head
    tile, batch_head = tile_and_head(tl.cdiv(seqlen_q * members, TILE_M), batch_heads, section)
    split = tl.program_id(1)
    heads = heads_k * sharing
    batch = batch_head // heads
    head = batch_head % heads
    head_k = head // sharing
    slab, slabs, first_q, first_k, table = batch, batch_heads // heads, 0, 0, None  # where the sequence lies
    if PLACES is not None:
        slab, slabs = 0, 1
        first_q, seqlen_q, first_k, seqlen_k, left, right = sequence(
            captured, batch, total_q, total_k, seqlen_q, seqlen_k, left, right, PLACES, USED_Q, USED_K, PAGE)
    if PAGE is not None:
        TABLE: tl.constexpr = PLACES + 1 + USED_Q
        table = captured[TABLE] + tl.cast(batch, tl.int64) * strides_captured[TABLE][0]
    rows = seqlen_q * members
    if BOUND_RIGHT:
        tile = tl.cdiv(rows, TILE_M) - 1 - tile
    if PLACES is not None and (tile < 0) | (tile * TILE_M >= rows):
        return

    row = tile * TILE_M + tl.arange(0, TILE_M)
    col = tl.arange(0, BLOCK_D)
    query = row // members
    head_q = head * members + row % members
    inside = (row < rows)[:, None] & (col < HEAD_DIM)[None, :]
    q_rows = head_base(q, slab, first_q, 0, strides_q, False) + (query.to(tl.int64) * strides_q[1]
                                                                 + head_q.to(tl.int64) * strides_q[2])
    q_tile = tl.load(q_rows[:, None] + (col.to(tl.int64) * strides_q[3])[None, :], mask=inside, other=0.0)
    if SIGN != 1:
        q_tile = (q_tile.to(tl.float32) * SIGN).to(q.dtype.element_ty)
    if Q_REGS:  # a computed operand stays in registers, where a product before the loop uses it too (docs/log/0015)
        q_tile = tl.where((row < rows)[:, None], q_tile, 0.0)

    # Row r sees the keys from sees_from[r] to sees_to[r] - 1; all rows see those from full_start to full_stop - 1.
    sees_from = begin(query, left, seqlen_k, BOUND_LEFT)
    sees_to = end(query, right, seqlen_k, BOUND_RIGHT)
    last_query = (tl.minimum(tile * TILE_M + TILE_M, rows) - 1) // members
    lowest, limit, full_start, full_stop = keys_of(tile * TILE_M // members, last_query, left, right, seqlen_k,
                                                   BOUND_LEFT, BOUND_RIGHT)
    blocks = tl.cdiv(limit - lowest, TILE_N)
    per_split = tl.cdiv(blocks, tl.num_programs(1))
    start = lowest + tl.minimum(split * per_split, blocks) * TILE_N
    stop = lowest + tl.minimum((split + 1) * per_split, blocks) * TILE_N

    k_head = head_base(k, slab, first_k, head_k, strides_k, TMA)
    v_head = head_base(v, slab, first_k, head_k, strides_v, TMA)
    positions = scale, batch, head_q[:, None] if PACK else head, query[:, None], seqlen_k - seqlen_q
    looked_up = captured, strides_captured, sizes
    visible = sees_from, sees_to, full_start, full_stop - TILE_N
    in_pages = table, total_k
    EXACT: tl.constexpr = CHANGE is not None or q.dtype.element_ty == tl.float32
    acc, row_max, row_sum = attend(q_tile, k_head, v_head, batch, head_k, start, stop, limit, strides_k, strides_v,
                                   scale_log2, visible, positions, looked_up, in_pages, BOUND_LEFT, CHANGE, HEAD_DIM,
                                   HEAD_DIM_V, TILE_M, TILE_N, BLOCK_D, BLOCK_DV, LOOKAHEAD, TMA, PAGE, EXACT, None)
    if not EXACT:
        huge = tl.abs(tl.where(row_max == float("-inf"), 0.0, row_max)) >= HUGE
        if tl.max(huge.to(tl.int32), 0) != 0:
            acc, row_max, row_sum = attend(q_tile, k_head, v_head, batch, head_k, start, stop, limit, strides_k,
                                           strides_v, scale_log2, visible, positions, looked_up, in_pages, BOUND_LEFT,
                                           CHANGE, HEAD_DIM, HEAD_DIM_V, TILE_M, TILE_N, BLOCK_D, BLOCK_DV, False, TMA,
                                           PAGE, True, 1)

    if SINK:  # one split's
        of_sink = tl.where(split == 0, tl.load(sink + head_q).to(tl.float32), float("-inf"))
        row_max, row_sum, weight = with_sink(row_max, row_sum, of_sink)
        acc = acc * weight[:, None]
    empty = row_sum == 0.0
    acc = acc / tl.where(empty, 1.0, row_sum)[:, None]
    row_lse = tl.where(empty, float("-inf"), row_max * LN2 + tl.log(row_sum))
    col_v = tl.arange(0, BLOCK_DV)
    out_rows = out + (split.to(tl.int64) * strides_out[0] + tl.cast(slab, tl.int64) * strides_out[1]
                      + (first_q + query).to(tl.int64) * strides_out[2] + head_q.to(tl.int64) * strides_out[3])
    tl.store(out_rows[:, None] + col_v[None, :], acc.to(out.dtype.element_ty),
             mask=(row < rows)[:, None] & (col_v < HEAD_DIM_V)[None, :])
    lse_rows = ((split * slabs + slab).to(tl.int64) * (heads_k * GROUP) + head_q) * total_q + first_q + query
    tl.store(lse + lse_rows, row_lse, mask=row < rows)


@triton.jit
def attend(q_tile, k_head, v_head, batch, head_k, start, stop, limit, strides_k, strides_v, scale_log2, visible,
           positions, looked_up, in_pages, BOUND_LEFT: tl.constexpr, CHANGE: tl.constexpr, HEAD_DIM: tl.constexpr,
           HEAD_DIM_V: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, BLOCK_D: tl.constexpr,
           BLOCK_DV: tl.constexpr, LOOKAHEAD: tl.constexpr, TMA: tl.constexpr, PAGE: tl.constexpr, EXACT: tl.constexpr,
           STAGES: tl.constexpr):
    """(acc, row_max, row_sum) of the rows of `q_tile` and the keys start..stop; row_max in units of log2.

    EXACT: the maximum of a row is subtracted before anything is rounded. STAGES: of the loop; None: the kernel's.
    """
    table, pages = in_pages
    sees_from, sees_to, full_start, last_full = visible  # the last tile that is full on the right starts at last_full
    acc = tl.zeros([TILE_M, BLOCK_DV], tl.float32)
    row_max = tl.full([TILE_M], float("-inf") if EXACT else float("inf"), tl.float32)
    row_sum = tl.zeros([TILE_M], tl.float32)
    minus_scale_log2 = -scale_log2
    if LOOKAHEAD:
        k_tile = load_rows(k_head, batch, head_k, start, limit, strides_k, HEAD_DIM, TILE_N, BLOCK_D, TMA, table, pages,
                           PAGE)
        s = tl.dot(q_tile, k_tile.T, input_precision="ieee")
    for key in tl.range(start, stop, TILE_N, num_stages=STAGES):
        if not LOOKAHEAD:
            k_tile = load_rows(k_head, batch, head_k, key, limit, strides_k, HEAD_DIM, TILE_N, BLOCK_D, TMA, table,
                               pages, PAGE)
            s = tl.dot(q_tile, k_tile.T, input_precision="ieee")
        if CHANGE is not None:
            scale, in_batch, head, query, offset = positions
            captured, strides_captured, sizes = looked_up
            s = CHANGE(s, scale, in_batch, head, query, key + tl.arange(0, TILE_N)[None, :], offset, captured,
                       strides_captured, sizes)
        crosses = key > last_full
        if BOUND_LEFT:
            crosses = crosses | (key < full_start)
        if crosses:
            keys = key + tl.arange(0, TILE_N)[None, :]
            seen = keys < sees_to[:, None]
            if BOUND_LEFT:
                seen = seen & (keys >= sees_from[:, None])
            s = tl.where(seen, s, float("-inf"))
        if EXACT:
            new_max = tl.maximum(row_max, tl.max(s, 1))
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.exp2((s - shift[:, None]) * scale_log2)
            rescale = tl.exp2((row_max - shift) * scale_log2)
        else:
            new_max = tl.minimum(row_max, tl.max(s, 1) * minus_scale_log2)  # with the other sign: it is added
            shift = tl.where(new_max == float("inf"), 0.0, new_max)
            p = tl.exp2(tl.fma(s, scale_log2, shift[:, None]))
            rescale = tl.exp2(shift - row_max)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        row_max = new_max
        if LOOKAHEAD:  # past the last tile: not used
            k_tile = load_rows(k_head, batch, head_k, key + TILE_N, limit, strides_k, HEAD_DIM, TILE_N, BLOCK_D, TMA,
                               table, pages, PAGE)
            s = tl.dot(q_tile, k_tile.T, input_precision="ieee")
            p = round_here(p, q_tile.dtype)  # P of the last tile is still being read until S has been waited for
        else:
            p = p.to(q_tile.dtype)
        acc = acc * rescale[:, None]
        v_tile = load_rows(v_head, batch, head_k, key, limit, strides_v, HEAD_DIM_V, TILE_N, BLOCK_DV, TMA, table,
                           pages, PAGE)
        acc = tl.dot(p, v_tile, acc, input_precision="ieee")
    row_max = row_max * scale_log2 if EXACT else -row_max
    return acc, row_max, row_sum


@triton.jit
def with_sink(row_max, row_sum, sink):
    """(row_max, row_sum, weight) with one more key, whose value is 0: `weight` is what that makes of the other keys'
    exponentials. Maxima are in units of log2, and -inf for a row without keys."""
    of_sink = sink * LOG2E
    top = tl.maximum(row_max, of_sink)
    shift = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(row_max - shift)
    return shift, row_sum * weight + tl.exp2(of_sink - shift), weight


@triton.jit(do_not_specialize=["rows", "seqlen_q", "heads", "splits"])
def combine(partial_out, partial_lse, out, lse, rows, seqlen_q, heads, splits, BLOCK_S: tl.constexpr,
            HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr):
    """One query of one head per program: out = sum of w_s out_s, w_s = exp(lse_s - lse), lse = log(sum of exp(lse_s)).

    Partial results are float32 (splits, B, Sq, Hq, Dv) and (splits, B, Hq, Sq); programs are numbered as (B, Hq, Sq).
    Splits are added in order, BLOCK_S at a time. A split without visible keys has lse = -inf and weighs exactly 0.
    """
    row = tl.program_id(0).to(tl.int64)
    batch_head = row // seqlen_q
    out_row = (batch_head // heads * seqlen_q + row % seqlen_q) * heads + batch_head % heads
    col = tl.arange(0, BLOCK_DV)
    highest = tl.full([BLOCK_S], float("-inf"), tl.float32)
    for first in tl.range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        part = tl.load(partial_lse + split.to(tl.int64) * rows + row, mask=split < splits, other=float("-inf"))
        highest = tl.maximum(highest, part)
    top = tl.max(highest, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.zeros([BLOCK_S], tl.float32)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for first in tl.range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        index = split.to(tl.int64) * rows
        part = tl.load(partial_lse + index + row, mask=split < splits, other=float("-inf"))
        weight = tl.exp(part - shift)
        values = tl.load(partial_out + ((index + out_row) * HEAD_DIM_V)[:, None] + col[None, :],
                         mask=(split < splits)[:, None] & (col < HEAD_DIM_V)[None, :], other=0.0)
        acc += tl.sum(weight[:, None] * values, 0)
        weights += weight
    total = tl.sum(weights, 0)
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)
    tl.store(out + out_row * HEAD_DIM_V + col, acc.to(out.dtype.element_ty), mask=col < HEAD_DIM_V)
    tl.store(lse + row, tl.where(empty, float("-inf"), shift + tl.log(total)))
