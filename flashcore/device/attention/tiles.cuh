// Which query tiles a CTA processes, in which order, and which keys each needs (the device side of mask.py).
#pragma once
#include "../ptx/types.cuh"

struct AttentionParams {
  float* lse;  // (batch, heads_q, seqlen_q), natural logarithm
  int batch, heads_q, group_size, seqlen_q, seqlen_k;
  int m_blocks;           // query tiles per head
  int tiles;              // m_blocks * heads_q * batch
  int heads_per_section;  // (batch, head) pairs whose K and V share the L2 cache at a time
  float scale_log2;       // softmax scale * log2(e), > 0
};

struct Tile {
  int m_block, head, batch;
  int n_blocks;  // at least 1: a tile that sees no key processes one fully masked block
};

// Tiles are numbered section by section; inside a section the last query tile of every head comes first, because
// under a causal mask it is the longest. CTAs take them round by round, every second round in reverse, which
// evens out the sums of decreasing lengths. The order is arithmetic: no counter, no hand-over between warps.
template <class Config> struct TileScheduler {
  const AttentionParams& params;
  int round = 0;

  // Index of this CTA's tile in the current round; params.tiles or more when there is none left.
  int index() const {
    const int cta = round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    return round * gridDim.x + cta;
  }

  bool next(Tile& tile) {
    const int i = index();
    ++round;
    if (i >= params.tiles) return false;  // later rounds start even higher
    const int section_tiles = params.heads_per_section * params.m_blocks;
    const int section = i / section_tiles;
    const int first_head = section * params.heads_per_section;
    const int heads = min(params.heads_per_section, params.batch * params.heads_q - first_head);
    const int in_section = i - section * section_tiles;
    const int rank = in_section / heads;
    const int batch_head = first_head + in_section - rank * heads;
    tile.m_block = params.m_blocks - 1 - rank;
    tile.batch = batch_head / params.heads_q;
    tile.head = batch_head - tile.batch * params.heads_q;
    int keys = params.seqlen_k;
    if constexpr (Config::causal)
      keys = min(keys, (tile.m_block + 1) * Config::tile_m + params.seqlen_k - params.seqlen_q);
    tile.n_blocks = max(1, (keys + Config::tile_n - 1) / Config::tile_n);
    return true;
  }
};

// Keys that a query row sees: those with an index below the limit.
template <class Config> int key_limit(const AttentionParams& params, int row) {
  if constexpr (Config::causal) return min(params.seqlen_k, row + 1 + params.seqlen_k - params.seqlen_q);
  return params.seqlen_k;
}
