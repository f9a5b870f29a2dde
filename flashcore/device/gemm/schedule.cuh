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
  int whole_tiles;              // the tiles after these are shared out by blocks of the reduction,
  int parts;                    //   to the first `parts` clusters,
  int part_blocks, part_extra;  //   this many each, and one more to the first part_extra
  int a_batch, b_batch;         // 1, or 0 where all batches share the operand
};

struct Tile {
  int m_block, n_block, batch;  // of this CTA
  int k_begin, k_end;           // blocks; a tile that ends before the reduction does is finished by another cluster
  int rest;                     // index among the tiles that are shared out
  bool backwards;               // along k: the blocks that the round before read last are still in L2
};

// The tiles of one cluster, in order. Of the whole tiles, cluster c takes c, c + clusters, ... Consecutive tiles go down
// `group` tiles along m, then one step along n: the clusters that run at the same time cover a compact area, whose
// operands they share through L2.
// The blocks of the other tiles (fewer than clusters) stand in one row, tile by tile, and cluster c takes the c-th
// share of it: at most the end of one tile and the beginning of the next. Whoever has the end of a tile finishes it,
// and the beginning that it hands over comes first. So a cluster waits only for lower ones, at work on what they do
// first: without an end to the waiting only if the GPU started a higher cluster before a lower one.
template <class Config> struct TileScheduler {
  static constexpr int cluster_size = Config::cluster_m * Config::cluster_n;
  static constexpr int least_part = 4;  // blocks: less of a tile is not worth handing over

  const GemmParams& params;
  const int rank = cluster_size == 1 ? 0 : cluster_rank();
  const int cluster = blockIdx.x / cluster_size;
  int unit = cluster;
  int part_begin = cluster < params.parts ? first_block(cluster) : 0;
  int part_end = cluster < params.parts ? first_block(cluster + 1) : 0;
  bool odd = true;  // the round of the unit before

  int m_rank() const { return rank % Config::cluster_m; }
  int n_rank() const { return rank / Config::cluster_m; }

  // Where the share of cluster `part` begins.
  __forceinline__ int first_block(int part) const {
    if constexpr (!Config::split) return 0;
    const int block = part * params.part_blocks + min(part, params.part_extra);
    const int within = block % params.k_blocks;
    if (within < least_part) return block - within;
    if (params.k_blocks - within < least_part) return block - within + params.k_blocks;
    return block;
  }

  __forceinline__ bool next(Tile& tile) {
    const int plane = params.m_tiles * params.n_tiles;
    int index = unit;
    tile.k_begin = 0;
    tile.k_end = params.k_blocks;
    if (unit < (Config::split ? params.whole_tiles : plane * params.batch)) {
      unit += gridDim.x / cluster_size;
    } else {
      if (!Config::split || part_end <= part_begin) return false;
      tile.rest = (part_end - 1) / params.k_blocks;
      const int first = tile.rest * params.k_blocks;
      tile.k_end = part_end - first;
      part_end = max(part_begin, first);
      tile.k_begin = part_end - first;
      index = params.whole_tiles + tile.rest;
    }
    odd = !odd;
    tile.backwards = odd;

    tile.batch = index / plane;
    index -= tile.batch * plane;
    const int strip = index / (params.group * params.n_tiles);
    const int first = strip * params.group;
    index -= first * params.n_tiles;
    const int rows = min(params.group, params.m_tiles - first);
    int column = index / rows;
    tile.m_block = (first + index - column * rows) * Config::cluster_m + m_rank();
    if (strip & 1) column = params.n_tiles - 1 - column;
    tile.n_block = column * Config::cluster_n + n_rank();
    return true;
  }
};
