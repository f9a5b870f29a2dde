"""Parts that the Triton kernels share: which tile a program owns, and how a tile of rows is read.

Tensors are (batch, seqlen, heads, head_dim), seen through their strides. A tile is TILE rows of one head, filled up
with zeros to BLOCK_D columns (head_dim rounded up to a power of two). There are two ways to read one, chosen per launch
by the constexpr TMA:

  TMA      `source` is a tensor descriptor over (batch, heads, seqlen, head_dim). The copy engine computes addresses and
           fills with zeros what lies past seqlen or head_dim: no address registers, no predicates (Hopper and newer).
  pointers `source` points at the head's first element. Any strides, the last one included.

Offsets into what callers pass are 64-bit, inside a tile too: rows of a view may lie any distance apart. (That takes no
more registers, and leaves the vectors as wide.) Offsets inside a tile of a contiguous result are 32-bit.
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
def head_base(source, batch, head, strides, TMA: tl.constexpr):
    """What `load_rows` reads one head from: a pointer to its first element; a descriptor stays as it is."""
    return source if TMA else source + tl.cast(batch, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[2]


@triton.jit
def load_rows(source, batch, head, start, stop, strides, HEAD_DIM: tl.constexpr, TILE: tl.constexpr,
              BLOCK_D: tl.constexpr, TMA: tl.constexpr):
    """Rows start..start+TILE of one head, (TILE, BLOCK_D); zeros from row `stop` on and past head_dim.

    With TMA zeros start at the end of the tensor instead of at `stop`; callers mask what lies between.
    """
    if TMA:
        tile = source.load([batch, head, start, 0]).reshape(TILE, BLOCK_D)
    else:
        rows = tl.arange(0, TILE)[:, None]
        cols = tl.arange(0, BLOCK_D)[None, :]
        offsets = rows.to(tl.int64) * strides[1] + cols.to(tl.int64) * strides[3]
        pointers = source + tl.cast(start, tl.int64) * strides[1] + offsets
        inside = rows < stop - start
        if HEAD_DIM != BLOCK_D:
            inside = inside & (cols < HEAD_DIM)
        tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@triton.jit
def store_rows(target, tile, batch, head, start, stop, strides, HEAD_DIM: tl.constexpr, TILE: tl.constexpr,
               BLOCK_D: tl.constexpr):
    """Write the part of a (TILE, BLOCK_D) tile that lies before row `stop` and inside head_dim."""
    rows = tl.arange(0, TILE)[:, None]
    cols = tl.arange(0, BLOCK_D)[None, :]
    base = head_base(target, batch, head, strides, False) + tl.cast(start, tl.int64) * strides[1]
    inside = (rows < stop - start) & (cols < HEAD_DIM)
    offsets = rows.to(tl.int64) * strides[1] + cols.to(tl.int64) * strides[3]
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
