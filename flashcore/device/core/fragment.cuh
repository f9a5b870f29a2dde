// The m64nN accumulator of WGMMA as it is spread over a warpgroup. Element i of thread t lies at
//   row 16 * (t / 32) + (t % 32) / 4 + 8 * (i / 2 % 2),  column 8 * (i / 4) + 2 * (t % 4) + i % 2,
// so a thread holds two rows ("slots" 0 and 1, eight apart), and the four lanes of a quad share them.
#pragma once
#include "../ptx/math.cuh"
#include "../ptx/tma.cuh"
#include "smem_tile.cuh"

constexpr int fragment_slot(int i) { return i / 2 % 2; }
constexpr int fragment_col(int i) { return 8 * (i / 4) + i % 2; }  // without the thread's 2 * (t % 4)

int fragment_row(int thread) { return thread / 32 * 16 + thread % 32 / 4; }  // of slot 0

float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(full_warp, x, 1));
  return fmaxf(x, __shfl_xor_sync(full_warp, x, 2));
}

float quad_sum(float x) {
  x += __shfl_xor_sync(full_warp, x, 1);
  return x + __shfl_xor_sync(full_warp, x, 2);
}

// Writes 64 x 64 elements of an accumulator, rounded and packed, to a chunk of a swizzled tile of 64 rows: pair(i) is
// elements 2 i and 2 i + 1.
template <class Pair> __forceinline__ void store_pairs(u32 chunk, int thread, Pair pair) {
  const int lane = thread % 32;
  const int row = thread / 32 * 16 + lane % 16;
  const u32 row_address = chunk + row * 128;
#pragma unroll
  for (int j = 0; j < 4; ++j)
    stmatrix_x4(row_address + ((j * 2 + lane / 16) ^ (row % 8)) * 16, pair(4 * j), pair(4 * j + 1), pair(4 * j + 2),
                pair(4 * j + 3));
}

// Writes 64 x 32 elements of an accumulator to a chunk of 64 rows of 128 bytes, swizzled alike: value(i) is element i.
template <class Value> __forceinline__ void store_floats(u32 chunk, int thread, Value value) {
  const int row = fragment_row(thread);
  const u32 address = chunk + row * 128 + thread % 2 * 8;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const u32 unit = (j * 2 + thread % 4 / 2) ^ (row % 8);  // the same for both slots: their rows are 8 apart
    store_shared_v2(address + unit * 16, value(4 * j), value(4 * j + 1));
    store_shared_v2(address + unit * 16 + 8 * 128, value(4 * j + 2), value(4 * j + 3));
  }
}

// Rounds a 64 x cols accumulator to T and writes it to a swizzled tile of 64 rows.
template <class T, int cols, int n> __forceinline__ void store_fragment(float (&r)[n], u32 tile, int thread) {
  static_assert(n == cols / 2);
  using Tile = SmemTile<64, cols>;
  const int lane = thread % 32;
  const int row = thread / 32 * 16 + lane % 16;
  const u32 row_address = tile + row * 128;
#pragma unroll
  for (int j = 0; j < cols / 16; ++j) {
    const int unit = (j % 4 * 2 + lane / 16) ^ (row % 8);
    stmatrix_x4(row_address + j / 4 * Tile::chunk_bytes + unit * 16,
                pack2<T>(r[8 * j], r[8 * j + 1]), pack2<T>(r[8 * j + 2], r[8 * j + 3]),
                pack2<T>(r[8 * j + 4], r[8 * j + 5]), pack2<T>(r[8 * j + 6], r[8 * j + 7]));
  }
}
