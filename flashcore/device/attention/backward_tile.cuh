// What the backward kernels share: the thread that loads; what a warpgroup does with the scores of 64 keys (rows) and n
// queries (columns), and with the gradients of 64 keys, in fragments of core/fragment.cuh.
#pragma once
#include "../core/fragment.cuh"
#include "../core/ring.cuh"
#include "../ptx/bulk.cuh"
#include "backward_schedule.cuh"
#include "box.cuh"

template <class Tile, bool packed>
__forceinline__ void load_tile(u8* to, const TensorMap& map, u64& full, int row, int head, int batch, int first,
                               int length) {
#pragma unroll
  for (int c = 0; c < Tile::chunks; ++c)
    load_box<packed>(to + c * Tile::chunk_bytes, map, full, c, row, head, batch, first, length);
}

// Loads K and V of a key tile, and Q, dO and the rows' numbers of the query tiles that see it into the ring.
template <class QTile, class DoutTile, class KTile, class VTile, class Config, class Smem>
void produce(Smem& smem, const BackwardParams<Config>& params, const KeyTile<Config>& tile, const TensorMap& q,
             const TensorMap& k, const TensorMap& v, const TensorMap& dout) {
  if (tile.steps == 0) return;
  const auto load_keys = [&](auto shape, u8* to, const TensorMap& map, u64& full) {
    load_tile<decltype(shape), Config::packed>(to, map, full, tile.n * Config::tile_n, tile.head, tile.batch,
                                               params.first_k, params.mask.seqlen_k);
  };
  const auto load_queries = [&](auto shape, u8* to, const TensorMap& map, u64& full, int row, int head) {
    load_tile<decltype(shape), Config::packed>(to, map, full, row, head, tile.batch, params.first_q, params.seqlen_q);
  };
  mbarrier_arrive_expect_tx(smem.k_full, KTile::bytes);
  load_keys(KTile{}, smem.k, k, smem.k_full);
  wait_for_previous_kernel();
  RingCursor<Config::stages> cursor;
  QueryWalk<Config> walk(params, tile);
  for (int i = 0; i < tile.steps; ++i) {
    mbarrier_wait<Config::wait_limit>(smem.ring.empty[cursor.stage], cursor.phase ^ 1);
    u64& full = smem.ring.full[cursor.stage];
    mbarrier_arrive_expect_tx(full, QTile::bytes + DoutTile::bytes + sizeof(smem.rows[0]));
    const int row = walk.m * Config::tile_m, head = tile.head * params.group_size + walk.head;
    load_queries(QTile{}, smem.q[cursor.stage], q, full, row, head);
    bulk_load(smem.rows[cursor.stage], params.rows + u64(walk.index()) * (2 * Config::tile_m + 4),
              sizeof(smem.rows[0]), full);
    load_queries(DoutTile{}, smem.dout[cursor.stage], dout, full, row, head);
    if (i == 0) {
      mbarrier_arrive_expect_tx(smem.v_full, VTile::bytes);
      load_keys(VTile{}, smem.v, v, smem.v_full);
    }
    walk.advance();
    cursor.advance();
  }
}

// S^T becomes P^T. rows: those of BackwardParams; first: the first query; warp_key: the first key of this warp.
template <class Config, int n>
__forceinline__ void exponentiate(float (&s)[n], const BackwardParams<Config>& params, const float* rows, int first,
                                  int warp_key, int thread) {
  const float* const minus_lse = rows + 2 * (thread % 4);
#pragma unroll
  for (int group = 0; group < n / 4; ++group) {
    const float2 x = *reinterpret_cast<const float2*>(minus_lse + 8 * group);
    s[4 * group] = exp2_approx(s[4 * group] * params.scale_log2 + x.x);
    s[4 * group + 1] = exp2_approx(s[4 * group + 1] * params.scale_log2 + x.y);
    s[4 * group + 2] = exp2_approx(s[4 * group + 2] * params.scale_log2 + x.x);
    s[4 * group + 3] = exp2_approx(s[4 * group + 3] * params.scale_log2 + x.y);
  }
  if (rows[2 * Config::tile_m] != 0) {
#pragma unroll
    for (int i = 0; i < n; ++i) s[i] = fminf(s[i], 1);
  }
  // 0 for what the mask hides, where this warp has such.
  if (first_query(params, warp_key + 15) <= first && last_query(params, warp_key) >= first + 2 * n - 1) return;
  const int key = warp_key + thread % 32 / 4, col = first + 2 * (thread % 4);
  const int begin[2] = {first_query(params, key) - col, first_query(params, key + 8) - col};
  const int last[2] = {last_query(params, key) - col, last_query(params, key + 8) - col};
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const int slot = fragment_slot(i);
    if (fragment_col(i) < begin[slot] || (Config::bounded_left && fragment_col(i) > last[slot])) s[i] = 0;
  }
}

// Where dP^T starts: at -delta.
template <class Config, int n> __forceinline__ void start_dp(float (&dp)[n], const float* rows, int thread) {
  const float* const minus_delta = rows + Config::tile_m + 2 * (thread % 4);
#pragma unroll
  for (int group = 0; group < n / 4; ++group) {
    const float2 x = *reinterpret_cast<const float2*>(minus_delta + 8 * group);
    dp[4 * group] = dp[4 * group + 2] = x.x;
    dp[4 * group + 1] = dp[4 * group + 3] = x.y;
  }
}

// A gradient of 64 keys, rounded, takes the place of their rows of Tile, and leaves. barrier: of this warpgroup.
template <class Element, class Tile, bool packed = false, int n>
__forceinline__ void store_gradient(const float (&gradient)[n], u8* place, const TensorMap& map, int barrier, int thread,
                                    int row, int head, int batch, int first = 0, int length = 0) {
#pragma unroll
  for (int c = 0; c < Tile::chunks; ++c)
    store_pairs(smem_address(place) + c * Tile::chunk_bytes, thread, [&](int i) {
      return pack2<Element>(gradient[32 * c + 2 * i], gradient[32 * c + 2 * i + 1]);
    });
  fence_async_proxy();
  named_barrier_sync(barrier, 128);
  if (thread == 0) {
#pragma unroll
    for (int c = 0; c < Tile::chunks; ++c)
      store_box<packed>(map, place + c * Tile::chunk_bytes, c, row, head, batch, first, length);
    tma_store_commit();
  }
}
