// Attention forward for few queries per sequence on Hopper (sm_90a): decoding.
//
// COMPUTES  O = softmax(scale * Q K^T + mask) V and LSE = ln(sum(exp(scale * Q K^T + mask))) per row.
//   Q, O (batch, seqlen_q, heads_q, d), K, V (batch, seqlen_k, heads_k, d), 16 bit, O contiguous, the others with any
//   strides that are multiples of 16 bytes; LSE (batch, heads_q, seqlen_q) fp32. Or packed sequences, (total, heads, d),
//   LSE (heads_q, total), whose keys are packed too, or in pages: (pages, page_size, heads_k, d). Mask: two diagonals
//   (mask.cuh); keys that no row sees are not read. Scores may be changed, and sinks join the sums (score.cuh). The rows of a key head are its queries times the heads of its group: seqlen_q * heads_q / heads_k.
//   V and O may have another d. Not handled: more than 8 rows, d % 8 != 0, d > 128.
//
// GRID  One cluster of CTAs for each key head of each batch entry; a launch chooses its size, up to 16. The blocks of 16
//   keys are dealt out in turn to all warps of the cluster. No tensor maps: a cache that grows by a key with every call
//   costs the host nothing but arguments.
//
// DATA FLOW  Each warp for itself, without barriers:
//   K, V -ld.global-> registers, as fragments of mma.sync;  S^T = K Q^T -softmax-> P^T;  O^T += V^T P^T (registers)
//   and at the end O^T, maxima and sums -st.shared-> merged per CTA -DSMEM-> merged per cluster -st.global-> O, LSE
//   Keys and dims are the 16 rows of the products, and query rows their 8 columns, so that a step needs half of the
//   accumulators that 16 query rows would. Which element of the head is which k of a product is free as long as Q and
//   K agree: a lane takes 16 contiguous bytes of a row and uses them in two products. V's lanes hold 8 dims of a key;
//   prmt pairs two keys. P^T is transposed in registers (movmatrix).
//
// REGISTERS, at head_dim 128: O 32, K of 16 keys 32, V 32, Q 4 at a time, and about 28 more: 128, so that an SM has two
//   CTAs of 8 warps. K and V of the next block are asked for as soon as the products have read this one's: 4 to 8 KB are
//   under way for each warp. Memory needs about 32 KB for each SM (bandwidth x latency).
//
// SHARED MEMORY (DecodeSmem), bytes at head_dim 128: q 2,048, as fragments; begin, end 64; o[warps][rows][head_dim + 4]
//   33,792 and the maxima and sums, 576, at the end.
//
// NUMERICS  S, O and the sums are fp32, P is rounded to 16 bit, O once at the end. Each warp has its own running maximum;
//   partial results are merged in a fixed order: the same bits each time. A row without keys gives
//   O = 0 and LSE = -inf. Keys that a row does not see have weight 0; V of such a key, if another row sees it, is
//   multiplied by 0, and 0 * NaN is NaN, as with PyTorch's kernels.
//
// EVIDENCE  docs/log/0018. "Flash-Decoding for long-context inference" (Dao, Haziza, Massa, Sizov 2023) for sharing out
//   the keys.
#pragma once
#include "../ptx/cluster.cuh"
#include "../ptx/math.cuh"
#include "../ptx/mma.cuh"
#include "../ptx/stream.cuh"
#include "mask.cuh"
#include "score.cuh"
#include "sequences.cuh"

struct Operand {  // (seqlen, heads, d) of a batch entry or a packed sequence, strides in elements
  const u16* data;
  u64 row_stride, head_stride;
  u64 page_stride;  // of keys in pages, of which `data` is the first
};

// Of keys in pages: those of a sequence.
struct Pages {
  const int* table;
  int size, count;

  // A number that is no page is taken for the next that is one: nobody reads outside of the cache.
  __forceinline__ int of(int key) const { return min(max(table[key / size], 0), count - 1); }
};

struct DecodeParams {
  Operand q, k, v;
  u16* out;
  float* lse;        // may be null
  float scale_log2;  // softmax scale * log2(e), > 0; of changed scores log2(e)
  Score score;
  int heads_k, group_size, seqlen_q;
  Mask<true, true> mask;
  Pages pages;
  int first_q, first_k;  // where packed sequences begin
  int total_q;

  __forceinline__ int rows() const { return seqlen_q * group_size; }  // of a key head
};

template <class Config> struct DecodeSmem {
  static constexpr int rows = 8;
  u32 q[(Config::head_dim + 31) / 32][32][4];  // as fragments: [32 elements][lane]
  int begin[rows], end[rows];  // keys that a row sees
  alignas(16) float o[Config::warps][rows][Config::head_dim_v + 4];  // of each warp; then, in the first, of the CTA
  float m[Config::warps + 1][rows], l[Config::warps + 1][rows];    // the last: of the CTA
};

template <class Config> struct DecodeKernel {
  using Smem = DecodeSmem<Config>;
  using Element = typename Config::Element;

  static constexpr int head_dim = Config::head_dim;
  static constexpr int head_dim_v = Config::head_dim_v;
  static constexpr int warps = Config::warps;
  static constexpr int rows = Smem::rows;
  static constexpr int block_n = 16;
  static constexpr int k_chunks = (head_dim + 31) / 32;  // 32 elements of the head: two steps of a product
  static constexpr int v_chunks = (head_dim_v + 63) / 64;  // 64 elements: four products' rows
  static_assert(sizeof(Smem) == Config::smem_bytes, "the host and the kernel disagree on shared memory");
  static_assert(head_dim % 8 == 0 && head_dim <= 128 && k_chunks <= warps);
  static_assert(head_dim_v % 8 == 0 && head_dim_v <= 128);

  Smem& smem;
  const DecodeParams& params;
  const int batch, kv_head;
  const int warp, g, t;  // lane = 4 g + t

  // Lane (g, t) has elements 32 c + 8 t + {0, ..., 7} of rows g (and g + 8) in chunk c.
  struct KFragment {
    u32 r[2][k_chunks][4];
  };
  // Lane (g, t) has elements 64 c + 8 g + {0, ..., 7} of keys 2 t, 2 t + 1, 2 t + 8, 2 t + 9 in chunk c.
  struct VFragment {
    u32 r[4][v_chunks][4];
  };

  // The pages of this warp's next 32 blocks, where all keys of a block are in one: lane i has that of the i-th.
  __forceinline__ int look_up(int block, int step, int blocks) const {
    block += (4 * g + t) * step;
    return block < blocks ? params.pages.of(block * block_n) : 0;
  }
  static __forceinline__ int page_of(int found, int turn) {
    return Config::page == block_n ? __shfl_sync(full_warp, found, turn % 32) : 0;
  }

  // Where a key is, in elements from the first.
  __forceinline__ u64 row_of(const Operand& operand, int key, int page) const {
    if constexpr (Config::page == 0) return u64(Config::packed ? params.first_k + key : key) * operand.row_stride;
    if constexpr (Config::page == 1) page = params.pages.of(key);
    return u64(page) * operand.page_stride + u64(key % params.pages.size) * operand.row_stride;
  }

  __forceinline__ void load_k(KFragment& f, int block, int page) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = min(block * block_n + g + 8 * half, params.mask.seqlen_k - 1);
      const u16* row = params.k.data + row_of(params.k, key, page) + 8 * t;
#pragma unroll
      for (int c = 0; c < k_chunks; ++c)
        if (32 * c + 32 <= head_dim || 32 * c + 8 * t < head_dim) load_once_v4(f.r[half][c], row + 32 * c);
    }
  }

  __forceinline__ int v_key(int block, int i) const { return block * block_n + 2 * t + i % 2 + i / 2 * 8; }

  __forceinline__ void load_v(VFragment& f, int block, int page) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = min(v_key(block, i), params.mask.seqlen_k - 1);
      const u16* row = params.v.data + row_of(params.v, key, page) + 8 * g;
#pragma unroll
      for (int c = 0; c < v_chunks; ++c)
        if (64 * c + 64 <= head_dim_v || 64 * c + 8 * g < head_dim_v) load_once_v4(f.r[i][c], row + 64 * c);
    }
  }

  // Past the last key stands the last key once more: its weight is 0, which infinity in V would not bear.
  __forceinline__ void clear_tail(VFragment& f, int block) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (v_key(block, i) >= params.mask.seqlen_k)
#pragma unroll
        for (int c = 0; c < v_chunks; ++c) f.r[i][c][0] = f.r[i][c][1] = f.r[i][c][2] = f.r[i][c][3] = 0;
  }

  // Lane (g, t) fetches elements 32 c + 8 t + {0, ..., 7} of row g: its own part of the fragment.
  __forceinline__ void stage_q(int c) const {
    const int row = g, query = row / params.group_size;
    u32 q[4] = {};
    if (row < params.rows() && 32 * c + 8 * t < head_dim)
      load_once_v4(q, params.q.data + (Config::packed ? params.first_q + query : query) * params.q.row_stride +
                          (kv_head * params.group_size + row % params.group_size) * params.q.head_stride + 32 * c + 8 * t);
    *reinterpret_cast<uint4*>(smem.q[c][4 * g + t]) = make_uint4(q[0], q[1], q[2], q[3]);
    if (c == 0 && t == 0) {
      smem.begin[row] = params.mask.begin(query);
      smem.end[row] = params.mask.end(query);
    }
  }

  // The warp's blocks are the first-th of those that some row sees, and every step-th from there.
  __forceinline__ void run(int first, int step) {
    KFragment k{};
    VFragment v{};
    float o[v_chunks][4][4] = {};  // O^T: elements 64 c + 8 g + 2 j + {0, 1} x rows 2 t + {0, 1}
    float m[2] = {negative_infinity(), negative_infinity()}, l[2] = {};  // of these rows; l: of this lane's keys
    const int last_query = params.seqlen_q - 1;
    const int blocks = (params.mask.end(last_query) + block_n - 1) / block_n;
    first += params.mask.begin(0) / block_n;
    int found = 0, turn = 0;  // pages, and how many blocks have been loaded
    if (first < blocks) {
      if constexpr (Config::page == block_n) found = look_up(first, step, blocks);
      load_k(k, first, page_of(found, 0));
      load_v(v, first, page_of(found, 0));
    }
    if (warp < k_chunks) stage_q(warp);
    __syncthreads();

    for (int block = first; block < blocks; block += step) {
      float s[4] = {};  // S^T: keys g, g + 8 x rows 2 t + {0, 1}
#pragma unroll
      for (int c = 0; c < k_chunks; ++c) {
        if (c > 0) __syncwarp();  // or all loads of Q move to the front, and take registers for themselves
        u32 q[4];
        load_shared_v4(q, smem.q[c][4 * g + t]);
#pragma unroll
        for (int i = 0; i < 4; i += 2)
          mma_16x8x16<Element>(s, k.r[0][c][i], k.r[1][c][i], k.r[0][c][i + 1], k.r[1][c][i + 1], q[i], q[i + 1]);
      }
      if (block + step < blocks) {
        if constexpr (Config::page == block_n)
          if (++turn % 32 == 0) found = look_up(block + step, step, blocks);
        load_k(k, block + step, page_of(found, turn));
      }
      if constexpr (!Score::plain) change(s, block * block_n);
      if ((block + 1) * block_n > params.mask.end(0) || block * block_n < params.mask.begin(last_query))
        mask(s, block * block_n);

      float rescale[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float top = fmaxf(s[i], s[i + 2]);
        top = fmaxf(top, __shfl_xor_sync(full_warp, top, 4));
        top = fmaxf(top, __shfl_xor_sync(full_warp, top, 8));
        top = fmaxf(top, __shfl_xor_sync(full_warp, top, 16));
        top = fmaxf(top, m[i]);
        rescale[i] = relative(m[i], top);
        m[i] = top;
        s[i] = relative(s[i], top);
        s[i + 2] = relative(s[i + 2], top);
        l[i] = l[i] * rescale[i] + s[i] + s[i + 2];
      }
      if (__any_sync(full_warp, rescale[0] != 1 || rescale[1] != 1))
#pragma unroll
        for (int c = 0; c < v_chunks; ++c)
#pragma unroll
          for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) o[c][j][i] *= rescale[i % 2];

      if ((block + 1) * block_n > params.mask.seqlen_k) clear_tail(v, block);
      // P^T as the second operand: row g, keys 2 t + {0, 1} and + 8.
      const u32 p0 = transpose_8x8(pack2<Element>(s[0], s[1])), p1 = transpose_8x8(pack2<Element>(s[2], s[3]));
#pragma unroll
      for (int c = 0; c < v_chunks; ++c)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          mma_16x8x16<Element>(o[c][j], low_halves(v.r[0][c][j], v.r[1][c][j]),
                               high_halves(v.r[0][c][j], v.r[1][c][j]), low_halves(v.r[2][c][j], v.r[3][c][j]),
                               high_halves(v.r[2][c][j], v.r[3][c][j]), p0, p1);
      if (block + step < blocks) load_v(v, block + step, page_of(found, turn));
    }
    leave(o, m, l);
  }

  // The exponential of a score, relative to a maximum: exactly 1 of the maximum itself, however large. A maximum of -inf:
  // no key yet, and 0 of everything.
  __forceinline__ float relative(float score, float top) const {
    return exp2_approx((score - (top == negative_infinity() ? 0 : top)) * params.scale_log2);
  }

  __forceinline__ void change(float (&s)[4], int first_key) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 2 * t + i % 2, query = row / params.group_size, key = first_key + g + i / 2 * 8;
      s[i] = params.score.apply(s[i], batch, kv_head * params.group_size + row % params.group_size, query, key,
                                float(query), float(key), params.mask.seqlen_k - params.seqlen_q);
    }
  }

  __forceinline__ void mask(float (&s)[4], int first_key) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 2 * t + i % 2, key = first_key + g + i / 2 * 8;
      if (key < smem.begin[row] || key >= smem.end[row]) s[i] = negative_infinity();
    }
  }

  // The warp's partial result to shared memory.
  __forceinline__ void leave(const float (&o)[v_chunks][4][4], const float (&m)[2], const float (&l)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = 2 * t + i;
      float sum = l[i];
      sum += __shfl_xor_sync(full_warp, sum, 4);
      sum += __shfl_xor_sync(full_warp, sum, 8);
      sum += __shfl_xor_sync(full_warp, sum, 16);
      if (g == 0) {
        smem.m[warp][row] = m[i];
        smem.l[warp][row] = sum;
      }
#pragma unroll
      for (int c = 0; c < v_chunks; ++c)
        if (64 * c + 8 * g < head_dim_v)
#pragma unroll
          for (int j = 0; j < 4; j += 2)
            *reinterpret_cast<float4*>(&smem.o[warp][row][64 * c + 8 * g + 2 * j]) =
                make_float4(o[c][j][i], o[c][j][i + 2], o[c][j + 1][i], o[c][j + 1][i + 2]);
    }
  }

  // Partial results, each relative to its own maximum, on their way to one.
  struct Sum {
    float m, l = 0, o[4] = {};

    __forceinline__ void add(float weight, float part_l, const float (&part_o)[4]) {
      l += weight * part_l;
#pragma unroll
      for (int i = 0; i < 4; ++i) o[i] += weight * part_o[i];
    }
  };

  // Of all warps of this CTA, for four elements of a row.
  __forceinline__ Sum merge_warps(int row, int column) const {
    Sum sum{negative_infinity()};
#pragma unroll
    for (int w = 0; w < warps; ++w) sum.m = fmaxf(sum.m, smem.m[w][row]);
#pragma unroll
    for (int w = 0; w < warps; ++w) {
      const float4 o = *reinterpret_cast<const float4*>(&smem.o[w][row][column]);
      sum.add(relative(smem.m[w][row], sum.m), smem.l[w][row], {o.x, o.y, o.z, o.w});
    }
    return sum;
  }

  // Of all CTAs of the cluster: `ranks` neighbouring lanes fetch what one CTA each has, and add it up as a tree.
  __forceinline__ Sum merge_ctas(int row, int column, u32 from, u32 ranks) const {
    Sum part{load_cluster(cluster_address(&smem.m[warps][row], from))};
    part.l = load_cluster(cluster_address(&smem.l[warps][row], from));
    load_cluster_v4(part.o, cluster_address(&smem.o[0][row][column], from));
    Sum sum{part.m};
    for (u32 far = 1; far < ranks; far *= 2) sum.m = fmaxf(sum.m, __shfl_xor_sync(full_warp, sum.m, far));
    sum.add(relative(part.m, sum.m), part.l, part.o);
    for (u32 far = 1; far < ranks; far *= 2) {
      sum.l += __shfl_xor_sync(full_warp, sum.l, far);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum.o[i] += __shfl_xor_sync(full_warp, sum.o[i], far);
    }
    return sum;
  }

  __forceinline__ Denominator denominator_of(const Sum& sum, int head) const {
    if constexpr (Score::has_sink) return {sum.m, sum.l, params.scale_log2, params.score.sink(head)};
    return {sum.m, sum.l, params.scale_log2};
  }

  __forceinline__ void store(const Sum& sum, int row, int column) const {
    const int query = row / params.group_size, head = kv_head * params.group_size + row % params.group_size;
    const int heads_q = params.heads_k * params.group_size;
    const Denominator denominator = denominator_of(sum, head);
    const float inverse = denominator.inverse;
    const int first = Config::packed ? params.first_q : batch * params.seqlen_q;
    const u64 index = (u64(first + query) * heads_q + head) * head_dim_v + column;
    *reinterpret_cast<uint2*>(params.out + index) =
        make_uint2(pack2<Element>(sum.o[0] * inverse, sum.o[1] * inverse),
                   pack2<Element>(sum.o[2] * inverse, sum.o[3] * inverse));
    if (params.lse != nullptr && column == 0)
      params.lse[Config::packed ? u64(head) * params.total_q + params.first_q + query
                                : (u64(batch) * heads_q + head) * params.seqlen_q + query] = denominator.lse;
  }

  __forceinline__ void merge(u32 rank, u32 ranks, int thread) {
    constexpr int units = head_dim_v / 4;  // of four elements, per row
    static_assert(rows * units <= 32 * warps);
    const int count = params.rows() * units;
    __syncthreads();
    if (thread < count) {
      const int row = thread / units, column = thread % units * 4;
      const Sum sum = merge_warps(row, column);
      if (ranks == 1) {
        store(sum, row, column);
      } else {  // nobody else reads these four of warp 0
        *reinterpret_cast<float4*>(&smem.o[0][row][column]) = make_float4(sum.o[0], sum.o[1], sum.o[2], sum.o[3]);
        if (column == 0) {
          smem.m[warps][row] = sum.m;
          smem.l[warps][row] = sum.l;
        }
      }
    }
    if (ranks == 1) return;
    cluster_sync();
    // There are at least as many threads in the cluster as units and CTAs to fetch them from.
    const u32 work = rank * 32 * warps + thread;
    const int i = work / ranks, row = i / units, column = i % units * 4;
    const bool exists = i < count;
    const Sum sum = merge_ctas(exists ? row : 0, exists ? column : 0, work % ranks, ranks);
    if (exists && work % ranks == 0) store(sum, row, column);
    cluster_sync();  // shared memory must outlive its last reader
  }
};

template <class Params>
__forceinline__ void clear_output(const Params& params, const Sequences<true>& sequences, int begin, int end) {
  const int heads_q = params.heads_k * params.group_size, row_bytes = heads_q * sequences.head_bytes;
  clear_rows(sequences.of_queries, row_bytes, begin, end, row_bytes, threadIdx.x, Config::threads);
  for (int head = 0; params.lse != nullptr && head < heads_q; ++head)
    for (int row = begin + threadIdx.x; row < end; row += Config::threads)
      params.lse[u64(head) * sequences.queries.total + row] = negative_infinity();
}

// Makes `params` those of packed sequence b of `batch`; false: it has no queries. `clears`: one CTA of each sequence gives the
// rows of no sequence behind it, and before the first one, the output 0 and the LSE -inf.
template <class Config>
__forceinline__ bool enter_sequence(DecodeParams& params, const Sequences<Config::packed>& sequences, int b, int batch,
                                    bool clears) {
  if constexpr (Config::packed) {
    const Rows &queries = sequences.queries, &keys = sequences.keys;
    if (clears) {
      for (int gap = b == 0 ? -1 : b; gap <= b; ++gap)
        clear_output(params, sequences, queries.gap_begin(gap), queries.gap_end(gap, batch));
    }
    int length_k;
    if constexpr (Config::page > 0) {
      length_k = uniform(max(min(keys.used[b], keys.longest), 0));
      params.pages = {keys.offsets + b * sequences.table_row, sequences.page_size, sequences.pages};
    } else {
      params.first_k = uniform(keys.begin(b));
      length_k = uniform(keys.length(b));
    }
    params.seqlen_q = uniform(queries.length(b));
    params.first_q = uniform(queries.begin(b));
    params.total_q = queries.total;
    params.mask.seqlen_k = length_k;
    params.mask.left += length_k - params.seqlen_q;
    params.mask.right += length_k - params.seqlen_q;
    return params.seqlen_q > 0;
  }
  return true;
}

extern "C" __global__ void __launch_bounds__(Config::threads, 2)
attention_decode_sm90(const u16* q, const u16* k, const u16* v, u16* out, float* lse, u64 q_batch, u64 q_row,
                      u64 q_head, u64 k_batch, u64 k_row, u64 k_head, u64 v_batch, u64 v_row, u64 v_head,
                      float scale_log2, int heads_k, int group_size, int seqlen_q, int seqlen_k, int mask_left,
                      int mask_right SEQUENCE_PARAMETERS SCORE_PARAMETERS) {
  extern __shared__ __align__(16) u8 raw_smem[];
  using Kernel = DecodeKernel<Config>;
  const u32 ranks = cluster_size(), rank = cluster_rank();
  const int tile = blockIdx.x / ranks;
  const int batch = tile / heads_k, kv_head = tile % heads_k;
  const u64 entry = Config::packed ? 0 : batch;  // of a batch
  DecodeParams params{{q + entry * q_batch, q_row, q_head},
                      {k + entry * k_batch + kv_head * k_head, k_row, k_head, Config::packed ? k_batch : 0},
                      {v + entry * v_batch + kv_head * v_head, v_row, v_head, Config::packed ? v_batch : 0},
                      out, lse, scale_log2, SCORE_VALUE, heads_k, group_size, seqlen_q,
                      {seqlen_k, mask_left, mask_right}};
  if (!enter_sequence<Config>(params, SEQUENCE_VALUE, batch, gridDim.x / ranks / heads_k, kv_head + rank == 0)) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Kernel kernel{*reinterpret_cast<typename Kernel::Smem*>(raw_smem), params, batch, kv_head, warp, lane / 4, lane % 4};
  kernel.run(rank * Config::warps + warp, ranks * Config::warps);
  kernel.merge(rank, ranks, threadIdx.x);
}
