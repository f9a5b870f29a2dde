#pragma once
#include "../core/ring.cuh"
#include "../ptx/wgmma.cuh"
#include "../ptx/wgmma_sync.cuh"
#include "softmax.cuh"
#include "tiles.cuh"

template <class Config> struct ForwardSmem {
  using QTile = SmemTile<64, Config::head_dim>;  // one warpgroup's rows of Q; later the same rows of O
  using KvTile = SmemTile<Config::tile_n, Config::head_dim>;

  alignas(1024) u8 q[Config::q_buffers][Config::consumers][QTile::bytes];
  alignas(1024) u8 kv[Config::stages][KvTile::bytes];
  RingBarriers<Config::stages> ring;
  u64 q_full[Config::q_buffers][Config::consumers];
  u64 q_empty[Config::q_buffers][Config::consumers];
};

template <class Config> struct ForwardKernel {
  using Smem = ForwardSmem<Config>;
  using QTile = typename Smem::QTile;
  using KvTile = typename Smem::KvTile;
  using Element = typename Config::Element;
  using Scheduler = TileScheduler<Config>;
  using Cursor = RingCursor<Config::stages>;

  static constexpr int tile_n = Config::tile_n;
  static constexpr int head_dim = Config::head_dim;
  static constexpr int consumers = Config::consumers;
  static constexpr bool seam = Config::q_buffers == 2;  // tiles of a CTA overlap: see the schedule
  static_assert(sizeof(Smem) == Config::smem_bytes, "the host and the kernel disagree on shared memory");
  static_assert(Config::tile_m == 64 * consumers);

  Smem& smem;
  const AttentionParams& params;

  static void wait(u64& barrier, u32 parity) { mbarrier_wait<Config::wait_limit>(barrier, parity); }

  // ---- producer: one thread ----------------------------------------------------------------------------------

  void load_kv(const TensorMap& map, Cursor& cursor, const Tile& tile, int n_block) {
    wait(smem.ring.empty[cursor.stage], cursor.phase ^ 1);
    u64& full = smem.ring.full[cursor.stage];
    mbarrier_arrive_expect_tx(full, KvTile::bytes);
#pragma unroll
    for (int c = 0; c < KvTile::chunks; ++c)
      tma_load_4d(smem.kv[cursor.stage] + c * KvTile::chunk_bytes, map, full, c * 64, n_block * tile_n,
                  tile.head / params.group_size, tile.batch);
    cursor.advance();
  }

  void load_q(const TensorMap& map, const Tile& tile, int buffer, u32 phase) {
#pragma unroll
    for (int wg = 0; wg < consumers; ++wg) {
      wait(smem.q_empty[buffer][wg], phase ^ 1);
      u64& full = smem.q_full[buffer][wg];
      mbarrier_arrive_expect_tx(full, QTile::bytes);
#pragma unroll
      for (int c = 0; c < QTile::chunks; ++c)
        tma_load_4d(smem.q[buffer][wg] + c * QTile::chunk_bytes, map, full, c * 64,
                    tile.m_block * Config::tile_m + wg * 64, tile.head, tile.batch);
    }
  }

  void producer(const TensorMap& q, const TensorMap& k, const TensorMap& v) {
    Scheduler scheduler{params};
    Cursor cursor;
    RingCursor<Config::q_buffers> q_cursor;
    Tile tile, previous;
    bool v_pending = false;  // the last V block of the previous tile is still to be loaded
    while (scheduler.next(tile)) {
      load_q(q, tile, q_cursor.stage, q_cursor.phase);
      q_cursor.advance();
      for (int n_block = tile.n_blocks - 1; n_block >= 0; --n_block) {
        load_kv(k, cursor, tile, n_block);
        if (n_block < tile.n_blocks - 1)
          load_kv(v, cursor, tile, n_block + 1);
        else if (v_pending)
          load_kv(v, cursor, previous, 0);
      }
      if constexpr (seam) {
        previous = tile;
        v_pending = true;
      } else {
        load_kv(v, cursor, tile, 0);
      }
    }
    if (v_pending) load_kv(v, cursor, previous, 0);
  }

  // ---- consumer: one warpgroup -------------------------------------------------------------------------------

  struct Consumer {
    ForwardKernel& kernel;
    Smem& smem;
    const AttentionParams& params;
    const TensorMap& o_map;
    const int wg, thread;
    Cursor cursor;
    RingCursor<Config::q_buffers> q_cursor;  // of the current tile
    Softmax<Config> softmax;
    bool store_pending = false;  // this tile's predecessor still owns its Q buffer: its O is being stored from it
    int store_buffer = 0;

    float o[head_dim / 2];
    u32 p[tile_n / 4];

    __forceinline__ void issue_qk(float (&s)[tile_n / 2]) {
      const u32 q = smem_address(smem.q[q_cursor.stage][wg]);
      const u32 k = smem_address(smem.kv[cursor.stage]);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < head_dim / 16; ++step)
        Wgmma<Element, tile_n>::template ss<0, 0>(s, QTile::k_major(q, step), KvTile::k_major(k, step), step > 0);
      wgmma_commit();
    }

    __forceinline__ void issue_pv(int stage, bool accumulate) {
      const u32 v = smem_address(smem.kv[stage]);
      pin(o);
      pin(p);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < tile_n / 16; ++step)
        Wgmma<Element, head_dim>::template rs<1>(o, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3],
                                                 KvTile::mn_major(v, step), step > 0 || accumulate);
      wgmma_commit();
    }

    __forceinline__ void release(int stage) {
      if (thread == 0) mbarrier_arrive(smem.ring.empty[stage]);
    }

    // Warpgroups take turns at issuing, so that one computes its softmax while the tensor cores work for another.
    __forceinline__ void await_turn() {
      if constexpr (Config::turns) named_barrier_sync(1 + wg, 256);
    }
    __forceinline__ void pass_turn() {
      if constexpr (Config::turns) named_barrier_arrive(1 + (wg + 1) % consumers, 256);
    }

    int first_row(const Tile& tile) const { return tile.m_block * Config::tile_m + wg * 64; }

    __forceinline__ void mask(float (&s)[tile_n / 2], const Tile& tile, int n_block) {
      // Every row of the warpgroup sees at least the keys that its first row sees.
      if ((n_block + 1) * tile_n <= key_limit<Config>(params, first_row(tile))) return;
      const int row = first_row(tile) + fragment_row(thread);
      const int col = n_block * tile_n + 2 * (thread % 4);
      const int limit[2] = {key_limit<Config>(params, row) - col, key_limit<Config>(params, row + 8) - col};
#pragma unroll
      for (int i = 0; i < tile_n / 2; ++i)
        if (fragment_col(i) >= limit[fragment_slot(i)]) s[i] = negative_infinity();
    }

    __forceinline__ void pack(const float (&s)[tile_n / 2]) {
#pragma unroll
      for (int i = 0; i < tile_n / 4; ++i) p[i] = pack2<Element>(s[2 * i], s[2 * i + 1]);
    }

    // The buffer that held the stored O returns to the producer once the copy engine has read it.
    __forceinline__ void finish_store() {
      if (!store_pending) return;
      if (thread == 0) {
        tma_store_wait_read<0>();
        mbarrier_arrive(smem.q_empty[store_buffer][wg]);
      }
      store_pending = false;
    }

    __forceinline__ void epilogue(const Tile& tile, int buffer, const float (&row_max)[2], const float (&row_sum)[2]) {
      float sum[2], inverse[2];
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) {
        sum[slot] = quad_sum(row_sum[slot]);
        inverse[slot] = sum[slot] == 0 ? 0 : reciprocal_approx(sum[slot]);
      }
#pragma unroll
      for (int i = 0; i < head_dim / 2; ++i) o[i] *= inverse[fragment_slot(i)];
      // A row without keys is 0 whatever V holds (0 times NaN or infinity would not be).
      if (__any_sync(full_warp, sum[0] == 0 || sum[1] == 0)) {
#pragma unroll
        for (int i = 0; i < head_dim / 2; ++i)
          if (sum[fragment_slot(i)] == 0) o[i] = 0;
      }
      u8* staged = smem.q[buffer][wg];
      store_fragment<Element, head_dim>(o, smem_address(staged), thread);
      fence_async_proxy();
      named_barrier_sync(1 + consumers + wg, 128);
      if (thread == 0) {
#pragma unroll
        for (int c = 0; c < QTile::chunks; ++c)
          tma_store_4d(o_map, staged + c * QTile::chunk_bytes, c * 64, first_row(tile), tile.head, tile.batch);
        tma_store_commit();
      }
      store_pending = true;
      store_buffer = buffer;
      if (params.lse != nullptr && thread % 4 == 0) {
        const u64 row_base = (u64(tile.batch) * params.heads_q + tile.head) * params.seqlen_q;
#pragma unroll
        for (int slot = 0; slot < 2; ++slot) {
          const int row = first_row(tile) + fragment_row(thread) + 8 * slot;
          constexpr float ln2 = 0.6931471805599453f;
          if (row < params.seqlen_q)
            params.lse[row_base + row] = sum[slot] == 0
                ? negative_infinity()
                : (row_max[slot] * softmax.scale_log2 + log2_approx(sum[slot])) * ln2;
        }
      }
    }

    // First block of a tile when no other work of this warpgroup is in flight.
    __forceinline__ void open_tile(const Tile& tile) {
      wait(smem.q_full[q_cursor.stage][wg], q_cursor.phase);
      wait(smem.ring.full[cursor.stage], cursor.phase);
      float s[tile_n / 2];
      issue_qk(s);
      wgmma_wait<0>();
      pin(s);
      release(cursor.stage);
      cursor.advance();
      mask(s, tile, tile.n_blocks - 1);
      softmax.start(s);
      pack(s);
    }

    // Block n_block of the tile, with the product of block n_block + 1 under its softmax.
    __forceinline__ void next_block(const Tile& tile, int n_block, bool accumulate) {
      float s[tile_n / 2];
      const int k_stage = cursor.stage;
      wait(smem.ring.full[k_stage], cursor.phase);
      await_turn();
      issue_qk(s);
      cursor.advance();
      const int v_stage = cursor.stage;
      wait(smem.ring.full[v_stage], cursor.phase);
      cursor.advance();
      issue_pv(v_stage, accumulate);
      pass_turn();
      finish_store();
      wgmma_wait<1>();
      pin(s);
      release(k_stage);
      mask(s, tile, n_block);
      const bool grew = softmax.update(s);
      wgmma_wait<0>();
      pin(o);
      pin(p);
      release(v_stage);
      pack(s);
      if (grew) softmax.rescale_output(o);
    }

    // Last product of a tile, then its output, with nothing of the next tile in flight.
    __forceinline__ void close_tile(const Tile& tile) {
      const int v_stage = cursor.stage;
      wait(smem.ring.full[v_stage], cursor.phase);
      cursor.advance();
      issue_pv(v_stage, tile.n_blocks > 1);
      wgmma_wait<0>();
      pin(o);
      pin(p);
      release(v_stage);
      epilogue(tile, q_cursor.stage, softmax.row_max, softmax.row_sum);
    }

    // First block of the next tile, with the last product of this one under its softmax; then this one's output.
    __forceinline__ void cross_seam(const Tile& tile, const Tile& next) {
      const int buffer = q_cursor.stage;
      finish_store();
      q_cursor.advance();
      float s[tile_n / 2];
      const int k_stage = cursor.stage;
      wait(smem.q_full[q_cursor.stage][wg], q_cursor.phase);
      wait(smem.ring.full[k_stage], cursor.phase);
      await_turn();
      issue_qk(s);
      cursor.advance();
      const int v_stage = cursor.stage;
      wait(smem.ring.full[v_stage], cursor.phase);
      cursor.advance();
      issue_pv(v_stage, tile.n_blocks > 1);
      pass_turn();
      wgmma_wait<1>();
      pin(s);
      release(k_stage);
      const float row_max[2] = {softmax.row_max[0], softmax.row_max[1]};
      const float row_sum[2] = {softmax.row_sum[0], softmax.row_sum[1]};
      mask(s, next, next.n_blocks - 1);
      softmax.start(s);
      wgmma_wait<0>();
      pin(o);
      pin(p);
      release(v_stage);
      epilogue(tile, buffer, row_max, row_sum);
      pack(s);
    }

    void run() {
      Scheduler scheduler{params};
      Tile tile, next;
      bool more = scheduler.next(tile);
      if (Config::turns && wg == consumers - 1) pass_turn();
      if (seam && more) open_tile(tile);
      while (more) {
        if constexpr (!seam) open_tile(tile);
        for (int n_block = tile.n_blocks - 2; n_block >= 0; --n_block)
          next_block(tile, n_block, n_block < tile.n_blocks - 2);
        more = scheduler.next(next);
        if (seam && more) {
          cross_seam(tile, next);
        } else {
          close_tile(tile);
          finish_store();
          q_cursor.advance();
        }
        tile = next;
      }
    }
  };

  void consumer(const TensorMap& o_map, int wg, int thread) {
    Consumer{*this, smem, params, o_map, wg, thread, {}, {}, Softmax<Config>(params.scale_log2)}.run();
  }
};

extern "C" __global__ void __launch_bounds__(Config::threads, 1)
attention_forward_sm90(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                       const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap o, float* lse, int batch,
                       int heads_q, int group_size, int seqlen_q, int seqlen_k, int m_blocks,
                       int paired_heads, float scale_log2) {
  const AttentionParams params{lse, batch, heads_q, group_size, seqlen_q, seqlen_k, m_blocks, paired_heads, scale_log2};
  extern __shared__ __align__(1024) u8 raw_smem[];
  using Kernel = ForwardKernel<Config>;
  auto& smem = *reinterpret_cast<typename Kernel::Smem*>(raw_smem);
  Kernel kernel{smem, params};
  // Uniform over the warp, which the compiler has to be told.
  const int warp = __shfl_sync(full_warp, threadIdx.x / 32, 0);

  if (threadIdx.x == 0) {
    prefetch_tensor_map(q);
    prefetch_tensor_map(k);
    prefetch_tensor_map(v);
    prefetch_tensor_map(o);
    smem.ring.init(Config::consumers);
    for (int buffer = 0; buffer < Config::q_buffers; ++buffer)
      for (int wg = 0; wg < Config::consumers; ++wg) {
        mbarrier_init(smem.q_full[buffer][wg], 1);
        mbarrier_init(smem.q_empty[buffer][wg], 1);
      }
    fence_mbarrier_init();
  }
  __syncthreads();

  if (warp < 4) {
    setmaxnreg_dec<Config::producer_registers>();
    if (threadIdx.x == 0) kernel.producer(q, k, v);
  } else {
    setmaxnreg_inc<Config::consumer_registers>();
    kernel.consumer(o, warp / 4 - 1, threadIdx.x % 128);
  }
}
