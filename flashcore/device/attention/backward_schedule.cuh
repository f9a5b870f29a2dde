// Which key tile a CTA of the backward pass has, which query tiles see it, and in which order they are walked.
#pragma once
#include "../ptx/types.cuh"

struct BackwardParams {
  const float* rows;  // (batch, heads_q, m_blocks, 2, tile_m): -lse * log2(e), then -(delta - dlse), of every query
  float* dq;          // (batch, heads_q, m_blocks, 2, 4096): fp32 fragments of dQ / scale, one for each warpgroup
  u32* turns;         // (batch, heads_q, m_blocks, 2): how many key tiles have been added to a fragment
  float scale, scale_log2;
  int batch, heads_k, group_size, seqlen_q, seqlen_k;
  int m_blocks, n_blocks;  // tiles of queries and of keys
  int section;             // key heads whose tiles are dealt out together
};

// Queries that see a key: from this one on. For keys past the end: none.
template <class Config> int first_query(const BackwardParams& params, int key) {
  if (key >= params.seqlen_k) return 0x3fffffff;
  if constexpr (Config::causal) return key - (params.seqlen_k - params.seqlen_q);
  return 0;
}

// The key tile of a CTA, and the query tiles that see it: m_begin, ..., m_blocks - 1 of every query head of the group.
//
// A dQ tile is the sum over key tiles, always added up in ascending order: key tile n waits for n others. So no CTA
// may wait for one that has not started. CTAs start in the order of blockIdx, and in that order key tiles ascend within
// a head; all walk the query tiles from the last to the first, so that under a causal mask the first to start have the
// most to do. A CTA then runs at least a step behind its predecessor. So that few of a head's tiles run at once, the
// tiles of `section` heads alternate; more heads than the L2 cache has room for would not pay.
template <class Config> struct KeyTile {
  int n, head, batch;  // head: of K and V
  int m_begin, steps;  // steps: over all heads of the group; at least 1, as the last query sees all keys

  explicit __forceinline__ KeyTile(const BackwardParams& params) {
    const int heads = params.batch * params.heads_k;
    const int tiles = params.section * params.n_blocks;  // of a section
    const int first_head = int(blockIdx.x) / tiles * params.section;
    const int here = min(params.section, heads - first_head);
    const int rank = int(blockIdx.x) % tiles;
    n = rank / here;
    const int batch_head = first_head + rank % here;
    batch = batch_head / params.heads_k;
    head = batch_head % params.heads_k;
    m_begin = max(0, first_query<Config>(params, n * Config::tile_n)) / Config::tile_m;
    steps = params.group_size * (params.m_blocks - m_begin);
  }
};

// Position in the walk: head by head, from the last query tile down.
struct QueryWalk {
  int m, head;  // head: within the group

  explicit __forceinline__ QueryWalk(const BackwardParams& params) : m(params.m_blocks - 1), head(0) {}

  template <class Config> __forceinline__ void advance(const BackwardParams& params, const KeyTile<Config>& tile) {
    if (--m < tile.m_begin) {
      m = params.m_blocks - 1;
      ++head;
    }
  }

  // Which dQ tile this is.
  template <class Config> __forceinline__ int index(const BackwardParams& params, const KeyTile<Config>& tile) const {
    return ((tile.batch * params.heads_k + tile.head) * params.group_size + head) * params.m_blocks + m;
  }
};
