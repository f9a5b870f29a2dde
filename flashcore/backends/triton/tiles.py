"""Parts that the Triton kernels share: which tile a program owns, what a mask shows it, how a tile of rows is read.

Tensors are (batch, seqlen, heads, head_dim), seen through their strides. A tile is TILE rows of one head, filled up
with zeros to BLOCK_D columns (head_dim rounded up to a power of two). There are two ways to read one, chosen per launch
by the constexpr TMA:

  TMA      `source` is a tensor descriptor over (batch, heads, seqlen, head_dim). The copy engine computes addresses and
           fills with zeros what lies past seqlen or head_dim: no address registers, no predicates (Hopper and newer).
  pointers `source` points at the head's first element. Any strides, the last one included.

Offsets into what callers pass are 64-bit, inside a tile too: rows of a view may lie any distance apart. (That takes no
more registers, and leaves the vectors as wide.)

Packed sequences are (total, heads, head_dim), which kernels see as a batch of one. Where a program's sequence lies, and
how long it is, `sequence` reads when the program runs. The host knows bounds: grids are for the longest sequence, and
programs past the end of theirs stop at once. Packed tensors are read through pointers, so that a tile ends where its
sequence does: the copy engine would fill it up with the neighbour's values, and 0 times NaN is NaN.

Keys in pages are (pages, page_size, heads, head_dim), PAGE rows each; a row of a tile looks its page up in its
sequence's row of the table (`table`, also None). Only what lies before the sequence's end is looked up, and a number
that is no page is taken for the next that is one: nobody reads outside of the cache.

Masks are flashcore/mask.py's, and nobody else says what they hide. Query i sees the keys i + left to i + right, both
included, that exist: the host adds seqlen_k - seqlen_q to the bounds of the problem's mask. Which bounds hide anything
is known when a kernel is compiled, by the constexprs BOUND_LEFT and BOUND_RIGHT: what does not is not compared.
"""

# fmt: off
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # decided, like the kernels' own fate, at the first import


@triton.jit
def tile_and_head(tiles, heads, section):
    """The (tile, head) that this program owns, out of `tiles` for each of `heads` (counted over the whole batch).

    Programs start in the order of their ids. Heads are taken in sections of `section`: all heads of a section do tile
    0, then all do tile 1, and so on. Callers let tile 0 be the longest, so that the short ones fill the gaps at the
    end, and choose `section` such that the keys and values of its heads fit in the L2 cache together.
    """
    program = tl.program_id(0)
    first = program // (tiles * section) * section
    width = tl.minimum(section, heads - first)
    index = program - first * tiles
    return index // width, first + index % width


@triton.jit
def sequence(captured, batch, total_q, total_k, longest_q, longest_k, left, right, PLACES: tl.constexpr,
             USED_Q: tl.constexpr, USED_K: tl.constexpr, PAGE: tl.constexpr = None):
    """(first_q, seqlen_q, first_k, seqlen_k, left, right) of a packed sequence: its first rows, its lengths, and its
    mask's bounds, made of those of the problem's mask. The tensors that say it are in `captured` from PLACES on. Keys
    in pages have no first row: it is 0."""
    KEYS: tl.constexpr = PLACES + 1 + USED_Q
    first_q, seqlen_q = rows_of(captured[PLACES], captured[PLACES + USED_Q], batch, total_q, longest_q, USED_Q)
    if PAGE is None:
        first_k, seqlen_k = rows_of(captured[KEYS], captured[KEYS + USED_K], batch, total_k, longest_k, USED_K)
    else:
        first_k, seqlen_k = 0, tl.minimum(tl.maximum(tl.load(captured[KEYS + 1] + batch), 0), longest_k)
    return first_q, seqlen_q, first_k, seqlen_k, seqlen_k - seqlen_q - left, seqlen_k - seqlen_q + right


@triton.jit
def rows_of(offsets, used, batch, total, longest, USED: tl.constexpr):
    """(first, length): never beyond the tensor, nor the bound that the grid was made for."""
    first = tl.minimum(tl.maximum(tl.load(offsets + batch), 0), total)
    length = tl.minimum(tl.load(offsets + batch + 1), total) - first
    if USED:
        length = tl.minimum(length, tl.load(used + batch))
    return first, tl.minimum(tl.maximum(length, 0), longest)


@triton.jit
def begin(query, left, seqlen_k, BOUND_LEFT: tl.constexpr):
    """The first key that a query sees, if it sees any. Of one query or a block of them."""
    key = query * 0
    if BOUND_LEFT:
        key = tl.minimum(tl.maximum(query + left, 0), seqlen_k)
    return key


@triton.jit
def end(query, right, seqlen_k, BOUND_RIGHT: tl.constexpr):
    """One past the last key that a query sees, if it sees any. Of one query or a block of them."""
    key = query * 0 + seqlen_k
    if BOUND_RIGHT:
        key = tl.minimum(tl.maximum(query + right + 1, 0), seqlen_k)
    return key


@triton.jit
def keep(query, key, left, right, BOUND_LEFT: tl.constexpr, BOUND_RIGHT: tl.constexpr):
    """Whether a query sees a key; both exist."""
    seen = (query == query) & (key == key)
    if BOUND_LEFT:
        seen = seen & (key >= query + left)
    if BOUND_RIGHT:
        seen = seen & (key <= query + right)
    return seen


@triton.jit
def keys_of(first, last, left, right, seqlen_k, BOUND_LEFT: tl.constexpr, BOUND_RIGHT: tl.constexpr):
    """(start, stop, full_start, full_stop): outside of start..stop no query from `first` to `last` sees a key, and all
    of them see those from full_start to full_stop - 1."""
    start = begin(first, left, seqlen_k, BOUND_LEFT)
    stop = end(last, right, seqlen_k, BOUND_RIGHT)
    full_start = begin(last, left, seqlen_k, BOUND_LEFT)
    full_stop = end(first, right, seqlen_k, BOUND_RIGHT)
    return start, stop, full_start, full_stop


@triton.jit
def queries_of(first, last, left, right, seqlen_q, BOUND_LEFT: tl.constexpr, BOUND_RIGHT: tl.constexpr):
    """(start, stop, full_start, full_stop): outside of start..stop no query sees a key from `first` to `last`, and
    those from full_start to full_stop - 1 see all of them."""
    start = first * 0
    full_start = first * 0
    if BOUND_RIGHT:
        start = tl.minimum(tl.maximum(first - right, 0), seqlen_q)
        full_start = tl.maximum(last - right, 0)
    stop = first * 0 + seqlen_q
    full_stop = first * 0 + seqlen_q
    if BOUND_LEFT:
        stop = tl.maximum(tl.minimum(last - left + 1, seqlen_q), 0)
        full_stop = first - left + 1
    return start, stop, full_start, full_stop


@triton.jit
def head_base(source, batch, first, head, strides, TMA: tl.constexpr):
    """What `load_rows` reads one head from, beginning with row `first`: a pointer to an element. A descriptor stays as
    it is: there `first` is 0."""
    return source if TMA else source + (tl.cast(batch, tl.int64) * strides[0] + tl.cast(first, tl.int64) * strides[1]
                                        + tl.cast(head, tl.int64) * strides[2])


@triton.jit
def load_rows(source, batch, head, start, stop, strides, HEAD_DIM: tl.constexpr, TILE: tl.constexpr,
              BLOCK_D: tl.constexpr, TMA: tl.constexpr, table=None, pages=None, PAGE: tl.constexpr = None):
    """Rows start..start+TILE of one head, (TILE, BLOCK_D); zeros from row `stop` on and past head_dim.

    With TMA zeros start at the end of the tensor instead of at `stop`; callers mask what lies between. `table` is a
    sequence's row of the table, and `pages` how many there are.
    """
    if TMA:
        tile = source.load([batch, head, start, 0]).reshape(TILE, BLOCK_D)
    else:
        rows = tl.arange(0, TILE)[:, None]
        cols = tl.arange(0, BLOCK_D)[None, :]
        if PAGE is None:
            offsets = rows.to(tl.int64) * strides[1] + cols.to(tl.int64) * strides[3]
            pointers = source + tl.cast(start, tl.int64) * strides[1] + offsets
        inside = rows < stop - start
        if PAGE is not None:
            page = tl.load(table + (start + rows) // PAGE, mask=inside, other=0)
            page = tl.minimum(tl.maximum(page, 0), pages - 1).to(tl.int64)
            row = ((start + rows) % PAGE).to(tl.int64)
            pointers = source + (page * strides[0] + row * strides[1] + cols.to(tl.int64) * strides[3])
        if HEAD_DIM != BLOCK_D:
            inside = inside & (cols < HEAD_DIM)
        tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@triton.jit
def store_rows(target, tile, batch, head, start, stop, strides, HEAD_DIM: tl.constexpr, TILE: tl.constexpr,
               BLOCK_D: tl.constexpr, FAR: tl.constexpr):
    """Write the part of a (TILE, BLOCK_D) tile that lies before row `stop` and inside head_dim.

    FAR: 32 bits do not hold the distance of a tile's rows. 64 take more registers, all through the kernel.
    """
    rows = tl.arange(0, TILE)[:, None]
    cols = tl.arange(0, BLOCK_D)[None, :]
    base = head_base(target, batch, start, head, strides, False)
    inside = (rows < stop - start) & (cols < HEAD_DIM)
    if FAR:
        rows = rows.to(tl.int64)
    offsets = rows * strides[1] + cols * strides[3]
    tl.store(base + offsets, tile.to(target.dtype.element_ty), mask=inside)


@triton.jit
def round_here(x, dtype: tl.constexpr):
    """float32 to `dtype`, at this place among the waits of the program; `to` may be moved.

    For the first operand of a product that stays in flight over a loop's back edge. Its registers belong to that
    product until it has been waited for: the next operand must be written after the wait, which neither Triton nor its
    assembler sees to (docs/log/0009; tests look for it in the SASS).
    """
    if INTERPRETED or dtype == tl.float32:
        rounded = x.to(dtype)
    elif dtype == tl.bfloat16:
        rounded = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.bfloat16, is_pure=False,
                                            pack=2)
    else:
        rounded = tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.float16, is_pure=False,
                                            pack=2)
    return rounded
