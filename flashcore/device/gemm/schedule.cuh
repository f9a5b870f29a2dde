// Which tiles a CTA computes, in which order, and which part of the reduction.
#pragma once
#include "../ptx/cluster.cuh"

struct GemmParams {
  void* out;         // for outputs that TMA cannot write; else null
  const u16* bias;   // (n), or (2 n) for SwiGLU; may be null
  float* partials;   // accumulators of parts of a tile that another CTA finishes
  u32* flags;        // one per partial accumulator of a warpgroup, 0 before and after the kernel
  u64 out_row, out_batch;  // strides of out, in elements
  int m, n;                // of the output
  int k_blocks;            // of 64 elements
  int m_tiles, n_tiles, batch;  // tiles of a cluster
  int group;                    // tiles along m that are walked together
  int whole_tiles, splits;      // the tiles after the first whole_tiles are split along the reduction
  int a_batch, b_batch;         // 1, or 0 where all batches share the operand
  int snake;                    // bit 0: every other round goes backwards along k, bit 1: every other group along n
};

struct Tile {
  int m_block, n_block, batch;  // of this CTA
  int k_begin, k_end;           // blocks
  int split;                    // which part of the tile; the last one finishes it
  int rest;                     // index among the split tiles
  bool backwards;               // along k: the blocks that the round before read last are still in L2
};

// The tiles of one cluster, in order. A unit is a tile or one part of a split tile; cluster c takes units c,
// c + clusters, ... Consecutive tiles go down `group` tiles along m, then one step along n: the clusters that run
// at the same time cover a compact area, whose operands they share through L2. Parts follow the whole tiles, first
// parts of all tiles first, so that clusters still share operands, and a cluster only ever waits for lower units.
template <class Config> struct TileScheduler {
  static constexpr int cluster_size = Config::cluster_m * Config::cluster_n;

  const GemmParams& params;
  const int rank = cluster_size == 1 ? 0 : cluster_rank();
  int unit = blockIdx.x / cluster_size;
  bool odd = true;  // the round of the unit before

  int m_rank() const { return rank % Config::cluster_m; }
  int n_rank() const { return rank / Config::cluster_m; }

  __forceinline__ bool next(Tile& tile) {
    const int plane = params.m_tiles * params.n_tiles;
    const int tiles = plane * params.batch;
    int index = unit;
    tile.k_begin = 0;
    tile.k_end = params.k_blocks;
    if constexpr (Config::split) {
      const int rest = tiles - params.whole_tiles;
      if (unit >= params.whole_tiles + rest * params.splits) return false;
      tile.split = params.splits - 1;
      if (unit >= params.whole_tiles) {
        tile.split = (unit - params.whole_tiles) / rest;
        tile.rest = unit - params.whole_tiles - tile.split * rest;
        index = params.whole_tiles + tile.rest;
        tile.k_begin = tile.split * params.k_blocks / params.splits;
        tile.k_end = (tile.split + 1) * params.k_blocks / params.splits;
      }
    } else {
      if (unit >= tiles) return false;
    }
    unit += gridDim.x / cluster_size;
    odd = !odd;
    tile.backwards = odd && (params.snake & 1);

    tile.batch = index / plane;
    index -= tile.batch * plane;
    const int strip = index / (params.group * params.n_tiles);
    const int first = strip * params.group;
    index -= first * params.n_tiles;
    const int rows = min(params.group, params.m_tiles - first);
    int column = index / rows;
    tile.m_block = (first + index - column * rows) * Config::cluster_m + m_rank();
    if (strip & params.snake >> 1) column = params.n_tiles - 1 - column;
    tile.n_block = column * Config::cluster_n + n_rank();
    return true;
  }
};
