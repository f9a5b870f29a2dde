// Packed sequences, whose lengths only the device knows: where they lie.
#pragma once
#include "../ptx/types.cuh"

// Tells the compiler that all threads of a warp have the same value, which may lie in a uniform register then.
__forceinline__ int uniform(int x) { return __shfl_sync(0xffffffff, x, 0); }

// On one side, queries or keys: sequence b has the rows from offsets[b] on, of `total` in all, as many as lie before
// offsets[b + 1], at most used[b] if that is there, and at most `longest`.
struct Rows {
  const int* offsets;
  const int* used;  // may be null
  int total, longest;

  __forceinline__ int begin(int b) const { return min(max(offsets[b], 0), total); }

  // Never beyond the tensor, whatever the offsets are.
  __forceinline__ int length(int b) const {
    const int there = begin(b + 1) - begin(b);
    return max(min(min(there, used == nullptr ? there : used[b]), longest), 0);
  }

  // Rows of no sequence, behind sequence b or, for b = -1, before the first: from the one to the other, which is none.
  __forceinline__ int gap_begin(int b) const { return b < 0 ? 0 : begin(b) + length(b); }
  __forceinline__ int gap_end(int b, int batch) const { return b + 1 < batch ? begin(b + 1) : total; }

  // Where what has a place for each tile of `rows` rows has those of a sequence: total / rows + batch places are enough.
  __forceinline__ int first_tile(int b, int rows) const { return begin(b) / rows + b; }

  // The sequence among whose places for tiles of `rows` rows `place` is: the last that begins there or before. For all
  // threads of a CTA, which look at as many sequences at a time. Where offsets fall it is some sequence.
  template <int threads> __forceinline__ int sequence_of(int place, int rows, int batch) const {
    int begun = 0;
    for (int first = 0; first < batch; first += threads) {
      const int b = first + threadIdx.x;
      begun += __syncthreads_count(b < batch && first_tile(b, rows) <= place);
    }
    return uniform(max(begun - 1, 0));
  }

  // Whether each sequence begins behind the one before. For all threads of a warp.
  __forceinline__ bool rise(int batch) const {
    bool falls = false;
    for (int b = threadIdx.x % 32; b < batch; b += 32) falls |= begin(b) > begin(b + 1);
    return !__any_sync(0xffffffff, falls);
  }
};

template <bool packed> struct Sequences {};
template <> struct Sequences<true> {
  Rows queries, keys;
  u8 *of_queries, *of_keys, *of_values;  // what a kernel clears where there is no sequence: contiguous tensors
  int heads_q, heads_k, head_bytes;      // theirs
  // Keys in pages: `offsets` is the table, with rows so far apart, and `used` says how many each sequence has.
  u64 table_row;
  int page_size, pages;
};

// `bytes` of each row from begin to end - 1 become 0. By thread `thread` of `threads`, whole warps.
__forceinline__ void clear_rows(u8* tensor, u64 row_bytes, int begin, int end, int bytes, int thread, int threads) {
  for (int row = begin + thread / 32; row < end; row += threads / 32)
    for (int at = thread % 32 * 16; at < bytes; at += 32 * 16)
      *reinterpret_cast<uint4*>(tensor + row * row_bytes + at) = make_uint4(0, 0, 0, 0);
}

// One head of the rows of no sequence behind sequence b, and of those before the first one.
__forceinline__ void clear_gap(u8* tensor, const Rows& rows, int b, int batch, int head, int heads, int head_bytes) {
  const u64 row_bytes = u64(heads) * head_bytes;
  u8* const of_head = tensor + u64(head) * head_bytes;
  for (int gap = b == 0 ? -1 : b; gap <= b; ++gap)
    clear_rows(of_head, row_bytes, rows.gap_begin(gap), rows.gap_end(gap, batch), head_bytes, threadIdx.x,
               Config::threads);
}
