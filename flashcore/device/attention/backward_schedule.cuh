// Which key tile a CTA of the backward pass has, which query tiles see it, and in which order they are walked.
#pragma once
#include "../ptx/types.cuh"
#include "mask.cuh"
#include "sequences.cuh"

template <class Config> struct BackwardParams {
  const float* rows;  // (batch, heads_q, m_blocks, 2 tile_m + 4), of packed sequences (heads_q, places_q, 2 tile_m + 4):
                      // -lse * log2(e), then -(delta - dlse), of every query; then whether the first is huge for some
                      // query, or 0
  float scale, scale_log2;
  int first_head, heads;  // (batch, key head) pairs of this launch
  int heads_k, group_size, seqlen_q;
  Mask<Config::bounded_left, Config::bounded_right> mask;
  int m_blocks;           // tiles of queries
  int first_n, n_blocks;  // tiles of keys of this launch
  int section;             // key heads whose tiles are dealt out together

  // Of packed sequences all this is of a CTA's own sequence, but for n_blocks: the places for key tiles of a head.
  int first_q, first_k;              // where it begins
  int first_place_q, first_place_k;  // where its tiles of queries and keys do
  int places_q;                      // for tiles of queries, of a head
};

// The head of this CTA's section, and the place of its key tile among those of a head.
template <class Config> __forceinline__ int2 place_of_cta(const BackwardParams<Config>& params) {
  const int tiles = params.section * params.n_blocks;  // of a section
  const int first_head = int(blockIdx.x) / tiles * params.section;
  const int here = min(params.section, params.heads - first_head);
  const int rank = int(blockIdx.x) % tiles;
  return make_int2(first_head + rank % here, rank / here);
}

// Makes `params` those of a CTA's sequence; false: it has none.
template <class Config>
__forceinline__ bool enter_sequence(BackwardParams<Config>& params, const Sequences<Config::packed>& sequences,
                                    int batch) {
  if constexpr (Config::packed) {
    const Rows &queries = sequences.queries, &keys = sequences.keys;
    params.heads = params.heads_k;
    const int place = place_of_cta(params).y;
    const int b = keys.template sequence_of<Config::threads>(place, Config::tile_n, batch);
    const int length_q = uniform(queries.length(b)), length_k = uniform(keys.length(b));
    params.first_q = uniform(queries.begin(b));
    params.first_k = uniform(keys.begin(b));
    params.first_place_q = params.first_q / Config::tile_m + b;
    params.first_place_k = params.first_k / Config::tile_n + b;
    params.places_q = queries.total / Config::tile_m + batch;
    params.seqlen_q = length_q;
    params.m_blocks = (length_q + Config::tile_m - 1) / Config::tile_m;
    params.mask.seqlen_k = length_k;
    params.mask.left += length_k - length_q;
    params.mask.right += length_k - length_q;
    return place >= params.first_place_k && (place - params.first_place_k) * Config::tile_n < length_k;
  }
  return true;
}

// Whether key tiles may wait for each other's dQ. Where offsets fall, which means nothing, some of a sequence's may have no
// CTA, and be waited for in vain. For all threads of a warp.
template <class Config> __forceinline__ bool may_wait(const Sequences<Config::packed>& sequences, int batch) {
  if constexpr (Config::packed) return sequences.queries.rise(batch) && sequences.keys.rise(batch);
  return true;
}

// Queries that see a key: from this one on. For keys past the end: none.
template <class Config> int first_query(const BackwardParams<Config>& params, int key) {
  if (key >= params.mask.seqlen_k) return 0x3fffffff;
  return Config::bounded_right ? key - params.mask.right : 0;
}

// And up to this one, as far as it exists.
template <class Config> int last_query(const BackwardParams<Config>& params, int key) {
  return Config::bounded_left ? key - params.mask.left : 0x3fffffff;
}

// The key tile of a CTA, and the query tiles that see it: m_begin, ..., m_end - 1 of every query head of the group.
//
// In the fused kernel a dQ tile is the sum over the key tiles that it sees, always added up in ascending order: each waits
// for those before it. So no CTA may wait for one that has not started. CTAs start in the order of blockIdx, and in that order key tiles
// ascend within a head; all walk the query tiles from the last to the first, so that under a causal mask the first to start have the
// most to do. A CTA then runs at least a step behind its predecessor. So that few of a head's tiles run at once, the
// tiles of `section` heads alternate; more heads than the L2 cache has room for would not pay.
template <class Config> struct KeyTile {
  int n, head, batch;  // head: of K and V
  int m_begin, m_end;
  int steps;  // over all heads of the group; 0 for keys that a window hides from all queries

  explicit __forceinline__ KeyTile(const BackwardParams<Config>& params) {
    const int2 place = place_of_cta(params);
    n = params.first_n + place.y - (Config::packed ? params.first_place_k : 0);
    const int batch_head = params.first_head + place.x;
    batch = batch_head / params.heads_k;
    head = batch_head % params.heads_k;
    m_begin = max(0, first_query(params, n * Config::tile_n)) / Config::tile_m;
    m_end = params.m_blocks;
    if constexpr (Config::bounded_left) {
      const int last = last_query(params, min((n + 1) * Config::tile_n, params.mask.seqlen_k) - 1);
      m_end = last < 0 ? m_begin : min(m_end, last / Config::tile_m + 1);
    }
    steps = params.group_size * (m_end - m_begin);
  }
};

// Position in the walk: from the last query tile down, of each all heads of the group. Head by head, a CTA with few
// query tiles would wait at each head for those with many.
template <class Config> struct QueryWalk {
  const BackwardParams<Config>& params;
  const KeyTile<Config>& tile;
  int m, head;  // head: within the group

  __forceinline__ QueryWalk(const BackwardParams<Config>& params, const KeyTile<Config>& tile)
      : params(params), tile(tile), m(tile.m_end - 1), head(0) {}

  __forceinline__ void advance() {
    if (++head == params.group_size) {
      head = 0;
      --m;
    }
  }

  // Which dQ tile this is.
  __forceinline__ int index() const {
    const int batch_head = (tile.batch * params.heads_k + tile.head) * params.group_size + head;
    if constexpr (Config::packed) return batch_head * params.places_q + params.first_place_q + m;
    return batch_head * params.m_blocks + m;
  }

  // How many key tiles are added to it before this one.
  __forceinline__ int turn() const { return tile.n - params.mask.begin(m * Config::tile_m) / Config::tile_n; }
};

// The key tiles that see query tile m: begin, ..., end - 1.
template <class Config> struct KeyTilesOf {
  int begin, end;

  __forceinline__ KeyTilesOf(const Mask<Config::bounded_left, Config::bounded_right>& mask, int m) {
    end = (mask.seqlen_k + Config::tile_n - 1) / Config::tile_n;
    if constexpr (Config::bounded_right) {
      const int last = (m + 1) * Config::tile_m - 1 + mask.right;
      end = last < 0 ? 0 : min(end, last / Config::tile_n + 1);
    }
    begin = mask.begin(m * Config::tile_m) / Config::tile_n;
  }

  __forceinline__ bool has(int n) const { return begin <= n && n < end; }
};
