// Before the backward kernel: what it needs to know of every query, and its counters.
//
// COMPUTES  delta = rowsum(O * dO) - dLSE; stores -LSE * log2(e) and -delta as backward_schedule.cuh says, -inf and 0
//   for queries without keys and those past the end of the last tile; whether an LSE of the tile is huge; and sets the
//   turns of every dQ tile, if there are such, to 0.
//   O, dO (batch, seqlen_q, heads_q, head_dim), 16 bit, rows aligned to 16 bytes, strides in elements; LSE, and dLSE or
//   null: (batch, heads_q, seqlen_q) fp32.
//   Of packed sequences, (total, heads_q, head_dim) with LSE (heads_q, total), it also clears the gradients of rows of none.
// GRID  A CTA per query tile of a head, or place for one. head_dim / 8 threads share a row, so a warp reads 512 contiguous
//   bytes or more.
#pragma once
#include "../ptx/bulk.cuh"
#include "../ptx/math.cuh"
#include "sequences.cuh"

struct RowStrides { u64 batch, row, head; };

template <class Config> struct RowsKernel {
  static constexpr int row_threads = Config::head_dim / 8;
  static constexpr int passes = Config::tile_m * row_threads / Config::threads;
  static constexpr float huge = 16384.0f;  // its rounding is 2^-11 or more
  static_assert(Config::tile_m * row_threads % Config::threads == 0 && Config::threads % row_threads == 0);

  static __forceinline__ float dot(const uint4& a, const uint4& b) {
    const u32 x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float a0, a1, b0, b1;
      unpack2<typename Config::Element>(x[i], a0, a1);
      unpack2<typename Config::Element>(y[i], b0, b1);
      sum += a0 * b0;
      sum += a1 * b1;
    }
    return sum;
  }
};

// Of packed sequences, from a place for tiles of a head to the tile of its sequence; false: there is none. The first tile of
// a sequence also clears the gradients of the rows between it and the next one, of its head.
template <class Config>
__forceinline__ bool enter_row_tile(const Sequences<Config::packed>& sequences, int places, int head, int& m, u64& first,
                                    u64& lse_head, int& seqlen_q) {
  if constexpr (Config::packed) {
    const Rows &queries = sequences.queries, &keys = sequences.keys;
    const int batch = places - queries.total / Config::tile_m, place = m;
    const int b = queries.template sequence_of<Config::threads>(place, Config::tile_m, batch);
    m = place - queries.first_tile(b, Config::tile_m);
    first = queries.begin(b);
    seqlen_q = queries.length(b);
    lse_head = u64(head) * queries.total + first;
    if (m == 0) {
      clear_gap(sequences.of_queries, queries, b, batch, head, sequences.heads_q, sequences.head_bytes);
      if (head < sequences.heads_k) {
        clear_gap(sequences.of_keys, keys, b, batch, head, sequences.heads_k, sequences.head_bytes);
        clear_gap(sequences.of_values, keys, b, batch, head, sequences.heads_k, sequences.head_bytes);
      }
    }
    return m >= 0 && m * Config::tile_m < seqlen_q;
  }
  return true;
}

extern "C" __global__ void __launch_bounds__(Config::threads)
attention_backward_rows_sm90(const u16* out, const u16* dout, const float* lse, const float* dlse, float* rows,
                             u32* turns, u64 out_batch, u64 out_row, u64 out_head, u64 dout_batch, u64 dout_row,
                             u64 dout_head, int heads_q, int seqlen_q, int m_blocks, int head_dim
                             SEQUENCE_PARAMETERS) {
  using Kernel = RowsKernel<Config>;
  launch_dependents();
  const int batch_head = blockIdx.x / m_blocks;
  int m = blockIdx.x % m_blocks;
  u64 batch = batch_head / heads_q, first = 0, lse_head = u64(batch_head) * seqlen_q;
  const u64 head = batch_head % heads_q;
  if (!enter_row_tile<Config>(SEQUENCE_VALUE, m_blocks, head, m, first, lse_head, seqlen_q)) return;
  const int col = threadIdx.x % Kernel::row_threads * 8;
  const u16* out_head_start = out + batch * out_batch + first * out_row + head * out_head + col;
  const u16* dout_head_start = dout + batch * dout_batch + first * dout_row + head * dout_head + col;

  uint4 a[Kernel::passes], b[Kernel::passes];
#pragma unroll
  for (int pass = 0; pass < Kernel::passes; ++pass) {
    const int row = m * Config::tile_m + (pass * Config::threads + threadIdx.x) / Kernel::row_threads;
    a[pass] = b[pass] = make_uint4(0, 0, 0, 0);
    if (row < seqlen_q && col < head_dim) {
      a[pass] = *reinterpret_cast<const uint4*>(out_head_start + row * out_row);
      b[pass] = *reinterpret_cast<const uint4*>(dout_head_start + row * dout_row);
    }
  }
  bool huge = false;
  float* const to_tile = rows + u64(blockIdx.x) * (2 * Config::tile_m + 4);
#pragma unroll
  for (int pass = 0; pass < Kernel::passes; ++pass) {
    const int i = (pass * Config::threads + threadIdx.x) / Kernel::row_threads, row = m * Config::tile_m + i;
    float delta = Kernel::dot(a[pass], b[pass]);
#pragma unroll
    for (int mask = Kernel::row_threads / 2; mask > 0; mask /= 2) delta += __shfl_xor_sync(full_warp, delta, mask);
    if (threadIdx.x % Kernel::row_threads == 0) {
      float minus_lse = negative_infinity(), minus_delta = 0;
      if (row < seqlen_q) {
        const u64 at = lse_head + row;
        const float x = lse[at];
        if (x != negative_infinity()) {
          minus_lse = x * -1.4426950408889634f;
          minus_delta = (dlse == nullptr ? 0 : dlse[at]) - delta;
        }
      }
      huge |= fabsf(minus_lse) >= Kernel::huge && minus_lse != negative_infinity();
      to_tile[i] = minus_lse;
      to_tile[Config::tile_m + i] = minus_delta;
    }
  }
  huge = __syncthreads_or(huge);
  if (threadIdx.x == 0) to_tile[2 * Config::tile_m] = huge;
  if (turns != nullptr && threadIdx.x < 2) turns[2 * blockIdx.x + threadIdx.x] = 0;
}
