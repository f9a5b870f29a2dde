// How TMA reads and writes rows of one sequence: of a batch, or of packed ones.
#pragma once
#include "../ptx/tma.cuh"

// Row r of a sequence of `length` rows from `first` on is at (packed_origin - length + r, packed_origin, first + length) of
// the dimensions that a map has for rows (tma.py). Those past its end are out of bounds.
constexpr int packed_origin = 1 << 30;

// Rows of a sequence from `row` on, 64 columns: of sequence `batch` of a batch, or of a packed one.
template <bool packed>
__forceinline__ void load_box(void* to, const TensorMap& map, u64& full, int chunk, int row, int head, int batch,
                              int first, int length) {
  if constexpr (packed)
    tma_load_5d(to, map, full, chunk * 64, packed_origin - length + row, head, packed_origin, first + length);
  else
    tma_load_4d(to, map, full, chunk * 64, row, head, batch);
}
template <bool packed>
__forceinline__ void store_box(const TensorMap& map, const void* from, int chunk, int row, int head, int batch, int first,
                               int length) {
  if constexpr (packed)
    tma_store_5d(map, from, chunk * 64, packed_origin - length + row, head, packed_origin, first + length);
  else
    tma_store_4d(map, from, chunk * 64, row, head, batch);
}
