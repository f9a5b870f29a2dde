// A [rows][cols] tile of 16-bit elements in shared memory, as TMA writes it with 128-byte swizzle and WGMMA
// reads it: ceil(cols / 64) chunks of [rows][64]; a row of a chunk is 128 bytes, eight rows are one swizzle atom
// (1024 bytes) in which the 16-byte unit u of row r lies at unit u ^ (r % 8). Base: aligned to 1024 bytes.
#pragma once
#include "../ptx/tma.cuh"

// In a cluster, bits 24 and up of an address in shared memory are the CTA's rank. A matrix descriptor has no room for
// them: they would fall into its leading byte offset.
constexpr u32 without_rank(u32 address) { return address & 0xffffff; }

// Matrix descriptor (PTX ISA, "Matrix Descriptor Format"): address / 16 in bits 0-13, leading byte offset / 16 in
// 16-29, stride byte offset / 16 in 32-45, swizzle mode 1 (128 bytes) in 62-63. Steps add to the low word only.
u64 matrix_descriptor(u32 low_word) {
  u64 bits;
  asm("mov.b64 %0, {%1, %2};" : "=l"(bits) : "r"(low_word), "n"(1u << 30 | 1024 / 16));
  return bits;
}

template <int rows_, int cols_> struct SmemTile {
  static constexpr int rows = rows_;
  static constexpr int cols = cols_;
  static constexpr int chunks = (cols + 63) / 64;
  static constexpr int chunk_bytes = rows * 128;
  static constexpr int bytes = chunks * chunk_bytes;
  static_assert(rows % 8 == 0, "a swizzle atom has eight rows");

  static constexpr u32 low_word(u32 base, u32 leading_bytes, int step_bytes) {
    return (base >> 4 | (leading_bytes / 16) << 16) + u32(step_bytes / 16);
  }

  // The reduction runs along cols: step k of 16 columns. The leading offset is not used with 128-byte swizzle.
  static constexpr u32 k_major_word(u32 base, int k) {
    return low_word(base, 16, k / 4 * chunk_bytes + k % 4 * 32);
  }

  // The reduction runs along rows: step k of 16 rows; chunks of 64 columns are a leading offset apart.
  static constexpr u32 mn_major_word(u32 base, int k) { return low_word(base, chunk_bytes, k * 16 * 128); }

  // Descriptors of these steps, for kernels without clusters.
  static u64 k_major(u32 base, int k) { return matrix_descriptor(k_major_word(base, k)); }
  static u64 mn_major(u32 base, int k) { return matrix_descriptor(mn_major_word(base, k)); }
};
