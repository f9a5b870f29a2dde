// Which query tiles a CTA processes, in which order, and which keys each needs (the device side of mask.py).
#pragma once
#include "../ptx/types.cuh"

struct AttentionParams {
  float* lse;  // (batch, heads_q, seqlen_q), natural logarithm; may be null
  int batch, heads_q, group_size, seqlen_q, seqlen_k;
  int m_blocks;      // query tiles per head
  int paired_heads;  // (batch, head) pairs whose tiles are processed two at a time; even, 0 without a mask
  float scale_log2;  // softmax scale * log2(e), > 0
};

struct Tile {
  int m_block, head, batch;
  int n_blocks;  // at least 1: a tile that sees no key processes one fully masked block
};

// The tiles of one CTA, in order. The order is arithmetic: no counter in memory, no hand-over between warps.
//
// Without a mask all tiles cost the same: they are dealt out head by head, so that the CTAs read the same keys.
// Under a causal mask the cost grows with m_block. Most heads are dealt out in units of two tiles, one long and one
// short, from two neighbouring heads, which all cost the same; the tiles of the remaining heads follow one by one,
// longest first and every second round in reverse, so that the CTAs end together. On the host: deal_tiles().
template <class Config> struct TileScheduler {
  const AttentionParams& params;
  int round = 0;
  int short_head = -1, short_m_block = 0;  // the second tile of a unit, still to be processed

  __forceinline__ void set(Tile& tile, int batch_head, int m_block) const {
    tile.m_block = m_block;
    tile.batch = batch_head / params.heads_q;
    tile.head = batch_head - tile.batch * params.heads_q;
    int keys = params.seqlen_k;
    if constexpr (Config::causal)
      keys = min(keys, (m_block + 1) * Config::tile_m + params.seqlen_k - params.seqlen_q);
    tile.n_blocks = max(1, (keys + Config::tile_n - 1) / Config::tile_n);
  }

  __forceinline__ bool next(Tile& tile) {
    const int ctas = gridDim.x, cta = blockIdx.x, m_blocks = params.m_blocks;
    const int heads = params.batch * params.heads_q;
    if constexpr (!Config::causal) {
      const int i = round++ * ctas + cta;
      if (i >= heads * m_blocks) return false;
      set(tile, i / m_blocks, i % m_blocks);
      return true;
    } else {
      if (short_head >= 0) {
        set(tile, short_head, short_m_block);
        short_head = -1;
        return true;
      }
      const int units = params.paired_heads / 2 * m_blocks;
      const int i = round++ * ctas + cta;
      if (i < units) {
        const int rank = i % m_blocks, head = i / m_blocks * 2;
        short_head = head + 1 - rank % 2;
        short_m_block = rank / 2;
        set(tile, head + rank % 2, m_blocks - 1 - rank / 2);
        return true;
      }
      const int full_rounds = (units + ctas - 1) / ctas;  // rounds that hold units
      const bool reverse = round > full_rounds && (round - full_rounds) % 2;
      const int rank = (reverse ? (round - 1) * ctas + ctas - 1 - cta : i) - units;
      const int rest = heads - params.paired_heads;
      if (rank >= rest * m_blocks) return false;  // and so are the ranks of all later rounds
      set(tile, params.paired_heads + rank % rest, m_blocks - 1 - rank / rest);
      return true;
    }
  }
};

// Keys that a query row sees: those with an index below the limit.
template <class Config> int key_limit(const AttentionParams& params, int row) {
  if constexpr (Config::causal) return min(params.seqlen_k, row + 1 + params.seqlen_k - params.seqlen_q);
  return params.seqlen_k;
}
