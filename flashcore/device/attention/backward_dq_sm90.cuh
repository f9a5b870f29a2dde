// After the backward kernel: dQ in 16 bit from its fp32 fragments.
//
// COMPUTES  dQ = scale * sum, rounded. Query tiles before m_begin see no key: nobody wrote their sums, and dQ is 0.
//   dQ (batch, seqlen_q, heads_q, d <= head_dim), any strides that TMA takes; or packed sequences, (total, heads_q, d).
// GRID  A CTA of two warpgroups per query tile of a head, each with 64 x 64 elements: the fragments of its namesake in
//   backward_sm90.cuh, which held the right columns of a tile with 64 rows, the lower rows of one with 128.
#pragma once
#include "../core/fragment.cuh"
#include "../ptx/bulk.cuh"
#include "../ptx/global.cuh"
#include "box.cuh"
#include "sequences.cuh"

// Of packed sequences, from a place for tiles of a head to the tile of its sequence; false: there is none. m_begin comes
// as the mask's right bound, relative to the end of the keys.
template <class Config>
__forceinline__ bool enter_dq_tile(const Sequences<Config::packed>& sequences, int places, int& m, int& m_begin,
                                   int& first, int& length) {
  if constexpr (Config::packed) {
    const Rows& queries = sequences.queries;
    const int b =
        queries.template sequence_of<Config::threads>(m, Config::tile_m, places - queries.total / Config::tile_m);
    const int keys = sequences.keys.length(b);
    m -= queries.first_tile(b, Config::tile_m);
    first = queries.begin(b);
    length = queries.length(b);
    m_begin = keys == 0 ? places : max(0, length - keys - m_begin) / Config::tile_m;
    return m >= 0 && m * Config::tile_m < length;
  }
  return true;
}

extern "C" __global__ void __launch_bounds__(Config::threads)
attention_backward_dq_sm90(const __grid_constant__ TensorMap dq, const float* sums, float scale, int heads_q,
                           int m_blocks, int m_begin SEQUENCE_PARAMETERS) {
  extern __shared__ __align__(1024) u8 raw_smem[];
  const int wg = threadIdx.x / 128, thread = threadIdx.x % 128;
  const int batch_head = blockIdx.x / m_blocks;
  int m = blockIdx.x % m_blocks, first = 0, length = 0;
  wait_for_previous_kernel();
  if (!enter_dq_tile<Config>(SEQUENCE_VALUE, m_blocks, m, m_begin, first, length)) return;
  u8* staged = raw_smem + wg * SmemTile<64, 64>::bytes;

  float r[32];
  const float* fragment = sums + (u64(blockIdx.x) * 2 + wg) * (64 * 64) + thread * 4;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    r[4 * j] = r[4 * j + 1] = r[4 * j + 2] = r[4 * j + 3] = 0;
    if (m >= m_begin) load_v4_l2(fragment + 512 * j, r[4 * j], r[4 * j + 1], r[4 * j + 2], r[4 * j + 3]);
  }
#pragma unroll
  for (int i = 0; i < 32; ++i) r[i] *= scale;
  store_fragment<typename Config::Element, 64>(r, smem_address(staged), thread);
  fence_async_proxy();
  named_barrier_sync(1 + wg, 128);
  if (thread == 0) {
    constexpr bool by_rows = Config::tile_m == 128;
    store_box<Config::packed>(dq, staged, by_rows ? 0 : wg, m * Config::tile_m + (by_rows ? wg * 64 : 0),
                              batch_head % heads_q, batch_head / heads_q, first, length);
    tma_store_commit();
    tma_store_wait_read<0>();
  }
}
