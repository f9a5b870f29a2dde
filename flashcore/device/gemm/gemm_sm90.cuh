// Dense matrix product for Hopper: out = activation(a b + bias), 16-bit operands, fp32 sums.
//
// Computes   out (batch, m, n) of a (batch, m, k) and b (batch, k, n), n twice as wide for SwiGLU: the columns of the
//            gate, then those of its factor. Each operand's memory may run along either of its dimensions. Output in
//            the operands' type or fp32. TMA fills with zeros and drops what lies past m, n and k.
// Grid       persistent, one CTA per SM, in clusters of cluster_m x cluster_n. A cluster takes tiles in an order that
//            keeps concurrent tiles in a compact area (schedule.cuh); tiles that would leave SMs idle at the end are
//            shared out along k, evenly, and summed in a fixed order.
// Data flow  global --TMA, multicast to the cluster--> ring --WGMMA--> registers --round--> registers
//            --stmatrix--> staging --TMA--> global
// Roles      warpgroup 0: producer, one thread. Warpgroups 1 .. consumers: tile_m / consumers rows each, all columns.
//            Registers: (40 + 2 x 232) x 128 = 64,512 of 65,536. A consumer holds 128 sums (64 x 256), 64 rounded pairs
//            of the tile before, and about 20 more; or 192 sums (2 x 64 x 192).
// Shared     a: stages x tile_m x 128 B, b: stages x tile_n x 128 B (128 x 256, 4 stages: 64 + 128 KB), c: two buffers
//            of 64 rows x 128 B per warpgroup (32 KB), barriers.
// Barriers   full[stage]   1 arrival (the CTA's producer) + all bytes of a and b, whichever CTA of the cluster sends them
//            empty[stage]  1 arrival per consumer warpgroup of every CTA that shares a or b with this one: the producer
//                          writes into all of them
//            named 1 + wg  128 threads of a consumer: its staging buffer is free, is written
// Schedule   a consumer issues the products of block k, then waits for those of block k - in_flight and frees their
//            slot; the tensor cores have the other warpgroup's products meanwhile. Between issue and wait it stores one
//            128-byte chunk of the tile before. At the end of a tile only rounding (64 conversions per thread) lies
//            between its last product and the first of the next tile. Of fp32 output half of the chunks wait so, the
//            others are stored at once (all, if tiles are shared). Two fragments per warpgroup leave no registers: all
//            of their output is stored before the next tile. Every other tile goes backwards along k, every other strip
//            of tiles along n: what was read last is still in L2.
// Numerics   sums in fp32, blocks of k in order or in reverse; a shared tile adds its parts backwards in k, last part
//            first. Bias is added in fp32. A 16-bit result is rounded, then activated in fp32, then rounded again, as
//            separate operations would do. Deterministic.
// Evidence   docs/log.
#pragma once
#include "../core/ring.cuh"
#include "../core/smem_tile.cuh"
#include "../ptx/global.cuh"
#include "../ptx/wgmma.cuh"
#include "../ptx/wgmma_sync.cuh"
#include "epilogue.cuh"
#include "schedule.cuh"

constexpr int tile_k = 64;  // elements: 128 bytes, the swizzle width

template <class Config> struct GemmSmem {
  alignas(1024) u8 a[Config::stages][Config::tile_m * 128];
  alignas(1024) u8 b[Config::stages][Config::tile_n * 128];
  alignas(1024) u8 c[Config::consumers][Config::store_buffers][64 * 128];
  RingBarriers<Config::stages> ring;
};

template <class Config> struct GemmKernel {
  using Smem = GemmSmem<Config>;
  using Element = typename Config::Element;
  using Scheduler = TileScheduler<Config>;
  using Cursor = RingCursor<Config::stages>;

  static constexpr int tile_m = Config::tile_m;
  static constexpr int tile_n = Config::tile_n;  // columns of the accumulator; for SwiGLU two for one of the output
  static constexpr int consumers = Config::consumers;
  static constexpr int cluster_m = Config::cluster_m;
  static constexpr int cluster_n = Config::cluster_n;
  static constexpr int activation = Config::activation;
  static constexpr int halves = activation == swiglu ? 2 : 1;
  static constexpr int out_n = tile_n / halves;
  static constexpr int fragments = tile_m / 64 / consumers;   // of a warpgroup: 64 rows each
  static constexpr int chunk_n = Config::out_float ? 32 : 64;  // columns of the output in 128 bytes
  static constexpr int chunks = out_n / chunk_n;               // of a fragment
  static_assert(sizeof(Smem) == Config::smem_bytes, "the host and the kernel disagree on shared memory");
  static_assert(tile_m == 64 * fragments * consumers);

  Smem& smem;
  const GemmParams& params;

  static void wait(u64& barrier, u32 parity) { mbarrier_wait<Config::wait_limit>(barrier, parity); }

  // ---- producer: one thread ----------------------------------------------------------------------------------

  template <bool multicast>
  static __forceinline__ void load_box(u8* target, const TensorMap& map, u64& full, u16 ctas, int c0, int c1, int c2) {
    if constexpr (multicast)
      tma_load_3d_multicast(target, map, full, ctas, c0, c1, c2);
    else
      tma_load_3d(target, map, full, c0, c1, c2);
  }

  // `rows` rows (of A, or columns of B) of one block of the reduction.
  template <bool mn_major, int rows, bool multicast>
  static __forceinline__ void load_rows(u8* target, const TensorMap& map, u64& full, u16 ctas, int row, int k_block,
                                        int batch) {
    if constexpr (mn_major) {
#pragma unroll
      for (int c = 0; c < rows / 64; ++c)
        load_box<multicast>(target + c * 64 * 128, map, full, ctas, row + c * 64, k_block * tile_k, batch);
    } else {
      load_box<multicast>(target, map, full, ctas, k_block * tile_k, row, batch);
    }
  }

  // What a tile's block `i` of the reduction is, in the order of the loads.
  static __forceinline__ int block_of(const Tile& tile, int i) {
    return tile.backwards ? tile.k_begin + tile.k_end - 1 - i : i;
  }

  void producer(const TensorMap& a, const TensorMap& b) {
    constexpr int a_rows = tile_m / cluster_n;  // what this CTA loads, for all CTAs that need it
    constexpr int b_rows = out_n / cluster_m;   // of each half
    Scheduler scheduler{params};
    const int m_rank = scheduler.m_rank(), n_rank = scheduler.n_rank();
    u16 a_ctas = 0, b_ctas = 0;
    for (int i = 0; i < cluster_n; ++i) a_ctas |= 1 << (m_rank + i * cluster_m);
    for (int i = 0; i < cluster_m; ++i) b_ctas |= 1 << (i + n_rank * cluster_m);
    Cursor cursor;
    Tile tile;
    while (scheduler.next(tile)) {
      const int a_row = tile.m_block * tile_m + n_rank * a_rows;
      const int b_row = tile.n_block * out_n + m_rank * b_rows;
      for (int i = tile.k_begin; i < tile.k_end; ++i) {
        const int k_block = block_of(tile, i);
        const int stage = cursor.stage;
        u64& full = smem.ring.full[stage];
        wait(smem.ring.empty[stage], cursor.phase ^ 1);
        mbarrier_arrive_expect_tx(full, (tile_m + tile_n) * 128);
        load_rows<Config::a_mn_major, a_rows, (cluster_n > 1)>(
            smem.a[stage] + n_rank * a_rows * 128, a, full, a_ctas, a_row, k_block, tile.batch * params.a_batch);
#pragma unroll
        for (int half = 0; half < halves; ++half)
          load_rows<Config::b_mn_major, b_rows, (cluster_m > 1)>(
              smem.b[stage] + (half * out_n + m_rank * b_rows) * 128, b, full, b_ctas, b_row + half * params.n, k_block,
              tile.batch * params.b_batch);
        cursor.advance();
      }
    }
    // The other CTAs signal these barriers until their consumers are done: leave only after the last signal.
    if constexpr (Scheduler::cluster_size > 1) {
      for (int i = 0; i < Config::stages; ++i) {
        wait(smem.ring.empty[cursor.stage], cursor.phase ^ 1);
        cursor.advance();
      }
    }
  }

  // ---- consumer: one warpgroup -------------------------------------------------------------------------------

  struct Consumer {
    static constexpr bool deferred = Config::deferred;
    static constexpr int all_chunks = fragments * chunks;
    static constexpr int first_kept = Config::out_float ? all_chunks / 2 : 0;  // chunk: if deferred, the others wait

    GemmKernel& kernel;
    Smem& smem;
    const GemmParams& params;
    const TensorMap& c_map;
    const int wg, thread;
    Scheduler scheduler;
    Cursor cursor;

    float acc[fragments][tile_n / 2];
    u32 kept[deferred ? tile_n / 4 : 1];  // the previous tile, rounded and packed, or its second half in fp32
    int stored = all_chunks;              // chunks of the previous tile that were stored
    int row, col, batch;                  // of that tile's first element
    int buffer = 0;

    // Low words of the matrix descriptors for step `step` of a slot's tiles. tests/.../test_gemm_layout.py evaluates them.
    static constexpr u32 a_word(u32 a, int wg, int fragment, int step) {
      using AFragment = SmemTile<64, 64>;
      const u32 base = without_rank(a) + (wg * fragments + fragment) * AFragment::bytes;
      return Config::a_mn_major ? AFragment::mn_major_word(base, step) : AFragment::k_major_word(base, step);
    }
    static constexpr u32 b_word(u32 b, int step) {
      const u32 base = without_rank(b);
      return Config::b_mn_major ? SmemTile<64, tile_n>::mn_major_word(base, step)
                                : SmemTile<tile_n, 64>::k_major_word(base, step);
    }

    __forceinline__ void issue(int stage, bool accumulate) {
      const u32 a = smem_address(smem.a[stage]);
      const u32 b = smem_address(smem.b[stage]);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < tile_k / 16; ++step)
#pragma unroll
        for (int f = 0; f < fragments; ++f)
          Wgmma<Element, tile_n>::template ss<Config::a_mn_major, Config::b_mn_major>(
              acc[f], matrix_descriptor(a_word(a, wg, f, step)), matrix_descriptor(b_word(b, step)),
              accumulate || step > 0);
      wgmma_commit();
    }

    // The slot goes back to every producer that fills a part of it.
    __forceinline__ void release(int stage) {
      if constexpr (Scheduler::cluster_size == 1) {
        if (thread == 0) mbarrier_arrive(smem.ring.empty[stage]);
      } else {
        const int m_rank = thread % cluster_m, n_rank = thread / cluster_m;
        if (thread < Scheduler::cluster_size && (m_rank == scheduler.m_rank() || n_rank == scheduler.n_rank()))
          mbarrier_arrive_cluster(smem.ring.empty[stage], thread);
      }
    }

    // The sums of a tile, or of a part of it. What is left of the tile before is stored under the matrix products, and
    // the next tile is found there. False if there is none.
    __forceinline__ bool multiply(const Tile& tile, Tile& next) {
      int previous = 0;
      bool more = false;
      for (int k_block = tile.k_begin; k_block < tile.k_end || stored < all_chunks; ++k_block) {
        const int stage = cursor.stage;
        if (k_block < tile.k_end) {
          wait(smem.ring.full[stage], cursor.phase);
          cursor.advance();
          issue(stage, k_block > tile.k_begin);
        }
        if (k_block == tile.k_end - 1) more = scheduler.next(next);
        if constexpr (deferred) {
          if (stored < all_chunks) store_kept();
        }
        wgmma_wait<Config::in_flight>();
        if (k_block < tile.k_end) {
          if constexpr (Config::in_flight == 0) {
            release(stage);
          } else {
            if (k_block > tile.k_begin) release(previous);
            previous = stage;
          }
        }
      }
      u32 bias[Config::bias ? tile_n / 8 : 1];
      if constexpr (Config::bias) load_bias(tile, bias);
      wgmma_wait<0>();
#pragma unroll
      for (int f = 0; f < fragments; ++f) pin(acc[f]);
      if constexpr (Config::in_flight > 0) release(previous);
      if constexpr (Config::bias) {
        if (tile.k_end == params.k_blocks) add_bias(bias);
      }
      return more;
    }

    // ---- bias: two columns per eight, the same for all rows ----

    __forceinline__ void load_bias(const Tile& tile, u32 (&bias)[tile_n / 8]) {
      const int first = tile.n_block * out_n + 2 * (thread % 4);
      const int last = (params.n - 1) / 2 * 2;  // the host pads a bias of odd length
#pragma unroll
      for (int i = 0; i < tile_n / 8; ++i) {
        const int half = i / (out_n / 8);
        const int column = half * params.n + min(first + i * 8 - half * out_n, last);
        bias[i] = *reinterpret_cast<const u32*>(params.bias + column);
      }
    }

    __forceinline__ void add_bias(const u32 (&bias)[tile_n / 8]) {
#pragma unroll
      for (int i = 0; i < tile_n / 8; ++i) {
        float low, high;
        unpack2<Element>(bias[i], low, high);
#pragma unroll
        for (int f = 0; f < fragments; ++f) {
          acc[f][4 * i] += low;
          acc[f][4 * i + 1] += high;
          acc[f][4 * i + 2] += low;
          acc[f][4 * i + 3] += high;
        }
      }
    }

    // ---- shared tiles: partial sums go through global memory, and are added in a fixed order ----

    static constexpr int partial_size = tile_m / consumers * tile_n;

    u64 partial_index(int cluster) const {
      return (u64(cluster) * Scheduler::cluster_size + scheduler.rank) * consumers + wg;
    }

    __forceinline__ void hand_over() {
      const u64 index = partial_index(scheduler.cluster);
      float* p = params.partials + index * partial_size + thread * 4;
#pragma unroll
      for (int f = 0; f < fragments; ++f)
#pragma unroll
        for (int i = 0; i < tile_n / 2; i += 4)
          store_v4(p + (f * (tile_n / 2) + i) * 128, acc[f][i], acc[f][i + 1], acc[f][i + 2], acc[f][i + 3]);
      fence_gpu();
      named_barrier_sync(1 + wg, 128);
      if (thread == 0) store_release(params.flags + index, 1);
    }

    __forceinline__ void collect(const Tile& tile) {
      for (int cluster = scheduler.cluster - 1;; --cluster) {
        const u64 index = partial_index(cluster);
        if (thread == 0) {
          for (int tries = 0; load_acquire(params.flags + index) == 0; ++tries)
            if (Config::wait_limit > 0 && tries == Config::wait_limit) __trap();
          store_release(params.flags + index, 0);
        }
        named_barrier_sync(1 + wg, 128);
        const float* p = params.partials + index * partial_size + thread * 4;
#pragma unroll
        for (int f = 0; f < fragments; ++f)
#pragma unroll
          for (int i = 0; i < tile_n / 2; i += 4) {
            float x, y, z, w;
            load_v4_l2(p + (f * (tile_n / 2) + i) * 128, x, y, z, w);
            acc[f][i] += x;
            acc[f][i + 1] += y;
            acc[f][i + 2] += z;
            acc[f][i + 3] += w;
          }
        if (scheduler.first_block(cluster) <= tile.rest * params.k_blocks) break;
      }
    }

    // ---- output ----

    // Elements 2 i and 2 i + 1 of the accumulator's columns, rounded.
    template <int f> __forceinline__ u32 rounded(int i) {
      if constexpr (!deferred) return pack2<Element>(acc[f][2 * i], acc[f][2 * i + 1]);
      if constexpr (activation != identity) pin(kept[i]);  // not before its turn: all at once would need registers
      return kept[i];
    }

    template <int f> __forceinline__ u32 output_pair(int i) {
      const u32 x = rounded<f>(i);
      if constexpr (activation == swiglu) return activate_pair<activation, Element>(x, rounded<f>(out_n / 4 + i));
      return activate_pair<activation, Element>(x, 0);
    }

    template <int f, bool is_kept> __forceinline__ float output_float(int i) {
      if constexpr (is_kept) {
        u32& bits = kept[i - first_kept * 16];
        if constexpr (activation != identity) pin(bits);
        return activate<activation>(__uint_as_float(bits));
      }
      const float x = activate<activation>(acc[f][i]);
      if constexpr (activation == swiglu) return x * acc[f][out_n / 2 + i];
      return x;
    }

    // Columns 64 c ... of fragment f (32 c ... if they are floats) go through a buffer in shared memory.
    template <int chunk> __forceinline__ void store_chunk() {
      constexpr int f = chunk / chunks, c = chunk % chunks;
      u8* staged = smem.c[wg][buffer];
      buffer = buffer + 1 == Config::store_buffers ? 0 : buffer + 1;
      if (thread == 0) tma_store_wait_read<Config::store_buffers - 1>();
      named_barrier_sync(1 + wg, 128);
      if constexpr (Config::out_float)
        store_floats(smem_address(staged), thread,
                     [&](int i) { return output_float<f, deferred && chunk >= first_kept>(16 * c + i); });
      else
        store_pairs(smem_address(staged), thread, [&](int i) { return output_pair<f>(16 * c + i); });
      fence_async_proxy();
      named_barrier_sync(1 + wg, 128);
      if (thread == 0) {
        tma_store_3d(c_map, staged, col + c * chunk_n, row + f * 64, batch);
        tma_store_commit();
      }
    }

    // The next chunk of the previous tile.
    template <int chunk = first_kept> __forceinline__ void store_kept() {
      if (stored == chunk) {
        store_chunk<chunk>();
        ++stored;
      } else if constexpr (chunk + 1 < all_chunks) {
        store_kept<chunk + 1>();
      }
    }

    // The first `count` chunks of this tile.
    template <int count, int chunk = 0> __forceinline__ void store_now() {
      if constexpr (chunk < count) {
        store_chunk<chunk>();
        store_now<count, chunk + 1>();
      }
    }

    // Element by element, for outputs whose rows TMA cannot address.
    template <int f = 0> __forceinline__ void store_directly() {
      const int first_row = row + f * 64 + fragment_row(thread);
      const int first_col = col + 2 * (thread % 4);
#pragma unroll
      for (int i = 0; i < out_n / 4; ++i) {
        const int out_row = first_row + 8 * fragment_slot(2 * i), out_col = first_col + fragment_col(2 * i);
        const u64 offset = batch * params.out_batch + out_row * params.out_row + out_col;
        if constexpr (Config::out_float) {
          float* p = static_cast<float*>(params.out) + offset;
          if (out_row < params.m && out_col < params.n) p[0] = output_float<f, false>(2 * i);
          if (out_row < params.m && out_col + 1 < params.n) p[1] = output_float<f, false>(2 * i + 1);
        } else {
          const u32 pair = output_pair<f>(i);
          u16* p = static_cast<u16*>(params.out) + offset;
          if (out_row < params.m && out_col < params.n) p[0] = pair;
          if (out_row < params.m && out_col + 1 < params.n) p[1] = pair >> 16;
        }
      }
      if constexpr (f + 1 < fragments) store_directly<f + 1>();
    }

    // A tile whose sums are complete.
    __forceinline__ void close(const Tile& tile) {
      row = tile.m_block * tile_m + wg * fragments * 64;
      col = tile.n_block * out_n;
      batch = tile.batch;
      if constexpr (deferred) {
        store_now<first_kept>();
#pragma unroll
        for (int i = 0; i < tile_n / 4; ++i) {
          kept[i] = Config::out_float ? __float_as_uint(acc[0][first_kept * 16 + i])
                                      : pack2<Element>(acc[0][2 * i], acc[0][2 * i + 1]);
          if constexpr (Config::out_float) pin(kept[i]);  // a copy, before the next products take the original
        }
        stored = first_kept;
      } else if constexpr (Config::tma_store) {
        store_now<all_chunks>();
      } else {
        store_directly();
      }
    }

    void run() {
      Tile next;
      bool more = scheduler.next(next);
      while (more) {
        const Tile tile = next;
        more = multiply(tile, next);
        if constexpr (Config::split) {
          if (tile.k_end < params.k_blocks) {
            hand_over();
            for (u32& pair : kept) pair = 0;  // frees the registers: nothing in them is needed any more
            continue;
          }
          if (tile.k_begin > 0) collect(tile);
        }
        close(tile);
      }
      if constexpr (deferred) {
        while (stored < all_chunks) store_kept();
      }
      if constexpr (Config::tma_store) {
        if (thread == 0) tma_store_wait_read<0>();
      }
    }
  };
};

extern "C" __global__ void __cluster_dims__(Config::cluster_m * Config::cluster_n, 1, 1)
__launch_bounds__(Config::threads, 1)
gemm_sm90(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
          const __grid_constant__ TensorMap c, void* out, const u16* bias, float* partials, u32* flags, u64 out_row,
          u64 out_batch, int m, int n, int k_blocks, int m_tiles, int n_tiles, int batch, int group, int whole_tiles,
          int parts, int part_blocks, int part_extra, int a_batch, int b_batch) {
  const GemmParams params{out, bias, partials, flags, out_row, out_batch, m, n, k_blocks, m_tiles, n_tiles, batch,
                          group, whole_tiles, parts, part_blocks, part_extra, a_batch, b_batch};
  extern __shared__ __align__(1024) u8 raw_smem[];
  using Kernel = GemmKernel<Config>;
  constexpr int sharers = Config::cluster_m + Config::cluster_n - 1;  // CTAs that read what one of them loads
  auto& smem = *reinterpret_cast<typename Kernel::Smem*>(raw_smem);
  Kernel kernel{smem, params};
  // Uniform over the warp, which the compiler has to be told.
  const int warp = __shfl_sync(full_warp, threadIdx.x / 32, 0);

  if (threadIdx.x == 0) {
    prefetch_tensor_map(a);
    prefetch_tensor_map(b);
    if (Config::tma_store) prefetch_tensor_map(c);
    smem.ring.init(Config::consumers * sharers);
    fence_mbarrier_init();
  }
  if constexpr (sharers > 1)
    cluster_sync();
  else
    __syncthreads();

  if (warp < 4) {
    if constexpr (Config::consumers > 1) setmaxnreg_dec<Config::producer_registers>();
    if (threadIdx.x == 0) kernel.producer(a, b);
  } else {
    if constexpr (Config::consumers > 1) setmaxnreg_inc<Config::consumer_registers>();
    typename Kernel::Consumer{kernel, smem, params, c, warp / 4 - 1, int(threadIdx.x % 128), {params}}.run();
  }
}
