// Which query tiles a CTA processes, in which order, and which blocks of keys each needs.
#pragma once
#include "../core/ring.cuh"
#include "mask.cuh"
#include "sequences.cuh"

// Division of 0 <= n < 2^31 by a divisor fixed at launch, as a multiplication: the host packs the multiplier into
// bits 0-31 and the shift into bits 32-63 (Granlund and Montgomery, "Division by Invariant Integers", 1994).
struct Divisor {
  u64 packed;

  __forceinline__ int divide(int n) const { return (__umulhi(u32(n), u32(packed)) + u32(n)) >> u32(packed >> 32); }
};

template <class Config> struct AttentionParams {
  float* lse;        // (batch, heads_q, seqlen_q), or (heads_q, total), natural logarithm; may be null
  float scale_log2;  // softmax scale * log2(e), > 0; of changed scores log2(e)
  Score score;
  int batch, heads_q;
  Divisor by_heads_q, by_group_size;
  int seqlen_q;
  Mask<Config::bounded_left, Config::bounded_right> mask;
  int m_blocks;  // query tiles per head
  Divisor by_m_blocks;  // in a window of many tiles a CTA by the units of a head
  int paired;         // what is processed two tiles at a time: (batch, head) pairs, an even number, where
                      // Config::longest_first; in a window tiles of each head, from the first on
  int paired_rounds;  // rounds over the CTAs that they take, rounded up
  Divisor by_single_heads;  // the other (batch, head) pairs, if any
  // Then seqlen_q is no sequence's, and the mask's diagonals are relative to the sequences' ends.
  Sequences<Config::packed> sequences;
};

struct Tile {
  int row;  // its first query row; with a right bound maybe negative
  int head, kv_head, batch;
  int n_begin, n_end;  // its blocks of keys; at least one: a tile that sees no key processes one fully masked block
  int first_q, length_q, first_k, length_k;  // of packed sequences: where its sequence begins, and how long it is
};

// How many queries and keys a tile's sequence has, and which of them see each other.
template <class Config> __forceinline__ int queries_of(const AttentionParams<Config>& params, const Tile& tile) {
  return Config::packed ? tile.length_q : params.seqlen_q;
}
template <class Config> __forceinline__ int keys_of(const AttentionParams<Config>& params, const Tile& tile) {
  return Config::packed ? tile.length_k : params.mask.seqlen_k;
}
template <class Config> __forceinline__ decltype(auto) mask_of(const AttentionParams<Config>& params, const Tile& tile) {
  if constexpr (Config::packed) {
    const int offset = tile.length_k - tile.length_q;
    return decltype(params.mask){tile.length_k, offset + params.mask.left, offset + params.mask.right};
  } else {
    return (params.mask);
  }
}

// The tiles of one CTA, in order. The order is arithmetic: no counter in memory, no hand-over between warps.
//
// Without a mask all tiles cost the same: they are dealt out head by head, so that the CTAs read the same keys. In a
// window the first tiles of a head do not: there the shortest and the longest go out together, and so on, as one unit
// that costs about as much as each of the other tiles. On the host: deal_window_tiles(). Under a causal mask (longest_first) the cost grows with m_block. Most heads are dealt out in units of two tiles, one long and one
// short, from two neighbouring heads, which all cost the same; the tiles of the remaining heads follow one by one,
// longest first and every second round in reverse, so that the CTAs end together. On the host: deal_tiles().
// With a right bound the tiles end with the last query row, so that where tile_m does not divide seqlen_q it is the shortest tile
// whose upper warpgroups have no rows, not the longest one's lower ones. Rows stay multiples of 64.
template <class Config> struct TileScheduler {
  const AttentionParams<Config>& params;
  int round = 0;
  int short_head = -1, short_m_block = 0;  // the second tile of a unit, still to be processed

  __forceinline__ void set(Tile& tile, int batch_head, int m_block) const {
    tile.row = m_block * Config::tile_m;
    tile.batch = params.by_heads_q.divide(batch_head);
    tile.head = batch_head - tile.batch * params.heads_q;
    tile.kv_head = params.by_group_size.divide(tile.head);
    if constexpr (Config::bounded_right) tile.row -= params.m_blocks * Config::tile_m - (params.seqlen_q + 63) / 64 * 64;
    const int keys = params.mask.end(tile.row + Config::tile_m - 1);
    tile.n_end = max(1, (keys + Config::tile_n - 1) / Config::tile_n);
    tile.n_begin = Config::bounded_left ? min(params.mask.begin(tile.row) / Config::tile_n, tile.n_end - 1) : 0;
  }

  __forceinline__ bool next(Tile& tile) {
    const int ctas = gridDim.x, cta = blockIdx.x, m_blocks = params.m_blocks;
    const int heads = params.batch * params.heads_q;
    if constexpr (Config::one_tile || !(Config::longest_first || Config::bounded_left)) {
      const int i = round++ * ctas + cta;
      if (i >= heads * m_blocks) return false;
      const int head = params.by_m_blocks.divide(i);
      set(tile, head, i - head * m_blocks);
      return true;
    } else {
      if (short_head >= 0) {
        set(tile, short_head, short_m_block);
        short_head = -1;
        return true;
      }
      if constexpr (Config::bounded_left) {
        const int whole = m_blocks - params.paired, units = whole + (params.paired + 1) / 2;  // of a head
        const int i = round++ * ctas + cta;
        if (i >= heads * units) return false;
        const int head = params.by_m_blocks.divide(i), j = i - head * units;
        if (j >= whole && 2 * (j - whole) + 1 < params.paired) {
          short_head = head;
          short_m_block = j - whole;
        }
        set(tile, head, m_blocks - 1 - j);
        return true;
      }
      const int units = params.paired / 2 * m_blocks;
      const int turn = round++;
      const int i = turn * ctas + cta;
      if (i < units) {
        const int pair = params.by_m_blocks.divide(i), rank = i - pair * m_blocks;
        short_head = 2 * pair + 1 - rank % 2;
        short_m_block = rank / 2;
        set(tile, 2 * pair + rank % 2, m_blocks - 1 - rank / 2);
        return true;
      }
      const bool reverse = turn >= params.paired_rounds && (turn - params.paired_rounds) % 2 == 0;
      const int j = (reverse ? turn * ctas + ctas - 1 - cta : i) - units;
      const int single_heads = heads - params.paired;
      if (j >= single_heads * m_blocks) return false;  // and so are those of all later rounds
      const int rank = params.by_single_heads.divide(j);
      set(tile, params.paired + j - rank * single_heads, m_blocks - 1 - rank);
      return true;
    }
  }
};

// The same of packed sequences, one after the other: a unit is dealt out to the next CTA. How many each sequence has is
// known when the kernel runs, by walking along the offsets. Under a causal mask a unit is two tiles of neighbouring heads
// as above (`paired`; a last head without a neighbour has units of one), or one, the long ones of a sequence first and every
// second round in reverse. On the host: packed_blocks().
template <class Config> struct PackedTileScheduler {
  const AttentionParams<Config>& params;
  int turn = 0;  // units done, times two, and one if the next tile is the second of its unit
  int sequence = -1, end = 0;  // where the units of that sequence end

  __forceinline__ int m_blocks() const {
    return (params.sequences.queries.length(sequence) + Config::tile_m - 1) / Config::tile_m;
  }

  __forceinline__ void set(Tile& tile, int head, int m_block, int m_blocks) const {
    const Rows &queries = params.sequences.queries, &keys = params.sequences.keys;
    tile.first_q = queries.begin(sequence);
    tile.length_q = queries.length(sequence);
    tile.first_k = keys.begin(sequence);
    tile.length_k = keys.length(sequence);
    tile.batch = sequence;
    tile.head = head;
    tile.kv_head = params.by_group_size.divide(head);
    tile.row = m_block * Config::tile_m;
    if constexpr (Config::bounded_right) tile.row -= m_blocks * Config::tile_m - (tile.length_q + 63) / 64 * 64;
    const auto& mask = mask_of(params, tile);
    const int seen = mask.end(tile.row + Config::tile_m - 1);
    tile.n_end = max(1, (seen + Config::tile_n - 1) / Config::tile_n);
    tile.n_begin = Config::bounded_left ? min(mask.begin(tile.row) / Config::tile_n, tile.n_end - 1) : 0;
  }

  __forceinline__ bool next(Tile& tile) {
    const int heads = params.heads_q;
    const bool paired = Config::longest_first && params.paired;
    const int unit_heads = paired ? (heads + 1) / 2 : heads;
    const bool reverse = Config::longest_first && !paired && turn / 2 % 2 == 1;
    const int unit = turn / 2 * gridDim.x + (reverse ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    while (unit >= end) {
      if (++sequence >= params.batch) return false;
      end += m_blocks() * unit_heads;
    }
    const u32 m = m_blocks(), i = unit - (end - m * unit_heads);
    int head, m_block;
    bool goes_on = false;  // with the second tile of the unit
    if (paired) {
      const int pair = i / m, rank = i % m, second = turn % 2;
      const bool single = 2 * pair + 1 == heads;
      head = 2 * pair + (single ? 0 : (rank + second) % 2);
      m_block = single ? m - 1 - rank : second ? rank / 2 : m - 1 - rank / 2;
      goes_on = !single && !second;
    } else if (Config::longest_first) {
      const int rank = params.by_heads_q.divide(i);
      head = i - rank * heads;
      m_block = m - 1 - rank;
    } else {
      head = i / m;
      m_block = Config::bounded_left ? m - 1 - i % m : i % m;
    }
    turn += goes_on || turn % 2 ? 1 : 2;
    set(tile, head, m_block, m);
    return true;
  }
};

// Tiles on their way from one thread, which walks, to all others of a CTA, which need them one after the other.
template <bool packed> struct TileQueue {
  void init(int) {}
};
template <> struct TileQueue<true> {
  static constexpr int slots = 2;
  Tile tile[slots];
  u64 full[slots], empty[slots];

  void init(int readers) {
    for (int slot = 0; slot < slots; ++slot) {
      mbarrier_init(full[slot], 1);
      mbarrier_init(empty[slot], readers);
    }
  }
};

template <class Config> struct PackedTiles {
  static constexpr int no_head = -1;  // of the tile after the last
  TileQueue<true>& queue;
  RingCursor<TileQueue<true>::slots> cursor;

  // Of the thread that walks.
  void send(const AttentionParams<Config>& params) {
    PackedTileScheduler<Config> scheduler{params};
    bool more = true;
    while (more) {
      Tile tile;
      more = scheduler.next(tile);
      if (!more) tile.head = no_head;
      mbarrier_wait<Config::wait_limit>(queue.empty[cursor.stage], cursor.phase ^ 1);
      queue.tile[cursor.stage] = tile;
      mbarrier_arrive(queue.full[cursor.stage]);
      cursor.advance();
    }
  }

  // Of every other.
  __forceinline__ bool next(Tile& tile) {
    mbarrier_wait<Config::wait_limit>(queue.full[cursor.stage], cursor.phase);
    tile = queue.tile[cursor.stage];
    mbarrier_arrive(queue.empty[cursor.stage]);
    cursor.advance();
    return tile.head != no_head;
  }
};
