// Before the backward kernel: what it needs to know of every query, and its counters.
//
// COMPUTES  delta = rowsum(O * dO) - dLSE; stores -LSE * log2(e) and -delta as backward_schedule.cuh says, -inf and 0
//   for queries without keys and those past the end of the last tile; whether an LSE of the tile is huge; and sets the
//   turns of every dQ tile, if there are such, to 0.
//   O, dO (batch, seqlen_q, heads_q, head_dim), 16 bit, rows aligned to 16 bytes, strides in elements; LSE, and dLSE or
//   null: (batch, heads_q, seqlen_q) fp32.
// GRID  A CTA per query tile of a head. head_dim / 8 threads share a row, so a warp reads 512 contiguous bytes or more.
#pragma once
#include "../ptx/bulk.cuh"
#include "../ptx/math.cuh"

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

extern "C" __global__ void __launch_bounds__(Config::threads)
attention_backward_rows_sm90(const u16* out, const u16* dout, const float* lse, const float* dlse, float* rows,
                             u32* turns, u64 out_batch, u64 out_row, u64 out_head, u64 dout_batch, u64 dout_row,
                             u64 dout_head, int heads_q, int seqlen_q, int m_blocks, int head_dim) {
  using Kernel = RowsKernel<Config>;
  launch_dependents();
  const int batch_head = blockIdx.x / m_blocks, m = blockIdx.x % m_blocks;
  const u64 batch = batch_head / heads_q, head = batch_head % heads_q;
  const int col = threadIdx.x % Kernel::row_threads * 8;
  const u16* out_head_start = out + batch * out_batch + head * out_head + col;
  const u16* dout_head_start = dout + batch * dout_batch + head * dout_head + col;

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
        const u64 at = u64(batch_head) * seqlen_q + row;
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
