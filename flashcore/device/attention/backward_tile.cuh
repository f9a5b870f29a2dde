// What a warpgroup of the backward kernels does with the scores of 64 keys (rows) and n queries (columns), and with the
// gradients of 64 keys: fragments of core/fragment.cuh.
#pragma once
#include "../core/fragment.cuh"
#include "backward_schedule.cuh"

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
template <class Element, class Tile, int n>
__forceinline__ void store_gradient(const float (&gradient)[n], u8* place, const TensorMap& map, int barrier, int thread,
                                    int row, int head, int batch) {
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
      tma_store_4d(map, place + c * Tile::chunk_bytes, c * 64, row, head, batch);
    tma_store_commit();
  }
}
