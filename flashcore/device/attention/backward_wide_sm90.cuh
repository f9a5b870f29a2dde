// Attention backward for Hopper (sm_90a) with wide heads: dK, dV, and dS in 16 bit.
//
// COMPUTES  what backward_sm90.cuh does, of head_dim up to 256, but for dQ: dS goes to memory, and
//   backward_product_sm90.cuh multiplies it with K. A dQ tile would leave no registers for dK and dV. The head_dim of V, dO
//   and dV may be another one. Scores may be changed (score.cuh; Score has their derivative here, too: slope, with the
//   arguments of apply): with P = exp(change(S) - LSE), dS = P * (dP - delta) * slope(S), but for a constant factor,
//   which is in scale_log2 and in scale_grad.
//
// GRID AND ORDER  One CTA per tile of 64 keys of one key head; it walks over the tiles of 64 queries that see it, of all
//   query heads of the group (backward_schedule.cuh), so dK and dV are complete in its registers. Nothing is added up
//   across CTAs: the same bits each time. A launch covers as many heads as the workspace has room for, or of one head as
//   many key tiles.
//
// DATA FLOW (per query tile; keys are the rows of S^T, so that P^T and dS^T are first operands from registers)
//   warpgroup 1:  K, Q -WGMMA SS-> S^T -exp2-> P^T (registers)     P^T (* slope) -fp32-> smem     P^T, dO -WGMMA RS-> dV
//   warpgroup 2:  V, dO -WGMMA SS-> dP^T, from -delta on -> dS^T = P^T (* slope) * dP^T           dS^T, Q -WGMMA RS-> dK
//                 dS^T -stmatrix-> smem -bulk copy-> global, as the tile lies in shared memory
//
// WARP ROLES AND REGISTERS
//   warpgroup 0: thread 0 loads K and V and fills the ring with Q, dO and the rows' numbers; thread 32 stores dS; the
//     others leave.
//   warpgroup 1 owns dV, warpgroup 2 dK: 64 keys x head_dim each. Both have two products and half of the elementwise work.
//   setmaxnreg: (24 + 2 * 240) * 128 = 64,512 of 65,536. Live: the gradient head_dim / 2 = 128, S or dP 32, P or dS 16 as
//     fragments and 32 while they are made, and about 30 more. A score's slope takes 32 more, and some spills.
//
// SHARED MEMORY (WideSmem), bytes at head_dim 256, 2 stages
//   k, v                       65,536   at the end dV and dK
//   q[stages], dout[stages]   131,072   the ring
//   ds[2]                      16,384   dS^T on its way out
//   p                          16,384   P^T (* slope) of a step, fp32: float4 i of thread t at [i][t]
//   rows[stages]                1,056   -lse * log2(e), -delta, whether the first is huge
//   barriers                       96
//
// BARRIERS (mbarrier)
//   name            arrivals per phase          bytes         waited for by   protects
//   k_full, v_full  1, thread 0                 K; V          warpgroup 1; 2  K; V in place
//   ring.full[s]    1, thread 0                 Q, dO, rows   consumers       slot s filled
//   ring.empty[s]   8, one per consumer warp    -             thread 0        slot s read by all
//   p_full          4, one per warp of 1        -             warpgroup 2     P^T written
//   p_empty         4, one per warp of 2        -             warpgroup 1     P^T read
//   ds_full[b]      4, one per warp of 2        -             thread 32       dS^T written
//   ds_empty[b]     1, thread 32                -             warpgroup 2     dS^T read by the copy engine
//   named 2, 3: the warps of one warpgroup.
//
// SCHEDULE
//   warpgroup 1:  S(0) | exp(0) | step i:  P(i) -> smem | issue dV(i), then S(i+1) | wait for dV(i): release the slot |
//                 wait for S(i+1) | exp(i+1)
//   warpgroup 2:  dP(0) | step i:  wait for P(i) | dS(i) -> smem | issue dK(i), then dP(i+1) | wait for dK(i): release
//                 the slot | wait for dP(i+1)
//   The products of one run while the other computes elementwise. With two slots the next S and dP come behind dV and dK:
//   the other way round both would wait for loads before they free a slot.
//
// NUMERICS  as backward_sm90.cuh; dQ is the sum of products of rounded dS, in fp32 in one accumulator.
#pragma once
#include "../core/ring.cuh"
#include "../ptx/bulk.cuh"
#include "../ptx/registers.cuh"
#include "../ptx/wgmma.cuh"
#include "../ptx/wgmma_sync.cuh"
#include "backward_tile.cuh"
#include "score.cuh"

template <class Config> struct WideSmem {
  using QTile = SmemTile<64, Config::head_dim>;    // and of K
  using VTile = SmemTile<64, Config::head_dim_v>;  // and of dO
  using DsTile = SmemTile<64, 64>;
  static constexpr int bytes = QTile::bytes > VTile::bytes ? QTile::bytes : VTile::bytes;

  alignas(1024) u8 k[bytes];
  u8 v[bytes];
  u8 q[Config::stages][QTile::bytes];
  u8 dout[Config::stages][VTile::bytes];
  u8 ds[2][DsTile::bytes];
  float4 p[8][128];
  float rows[Config::stages][2 * 64 + 4];  // as in BackwardParams
  RingBarriers<Config::stages> ring;
  u64 k_full, v_full;
  u64 p_full, p_empty;
  u64 ds_full[2], ds_empty[2];
};

template <class Config> struct WideKernel {
  using Smem = WideSmem<Config>;
  using QTile = typename Smem::QTile;
  using VTile = typename Smem::VTile;
  using DsTile = typename Smem::DsTile;
  using Element = typename Config::Element;
  using Cursor = RingCursor<Config::stages>;
  using DsCursor = RingCursor<2>;

  static_assert(sizeof(Smem) == Config::smem_bytes, "the host and the kernel disagree on shared memory");
  static_assert(Config::tile_m == 64 && Config::tile_n == 64);

  Smem& smem;
  const BackwardParams<Config>& params;
  const KeyTile<Config>& tile;
  const Score& score;
  u8* const ds;  // (heads, group, m_blocks, n_blocks of this launch) tiles of dS^T as they lie in shared memory

  static __forceinline__ void wait(u64& barrier, u32 parity) { mbarrier_wait<Config::wait_limit>(barrier, parity); }

  // ---- the thread that stores dS ----------------------------------------------------------------------------------

  void store_ds() {
    wait_for_previous_kernel();
    DsCursor cursor;
    QueryWalk<Config> walk(params, tile);
    const int before = params.first_head * params.group_size * params.m_blocks;  // query tiles of earlier launches
    for (int i = 0; i < tile.steps; ++i) {
      wait(smem.ds_full[cursor.stage], cursor.phase);
      const u64 index = u64(walk.index() - before) * params.n_blocks + tile.n - params.first_n;
      bulk_store(ds + index * DsTile::bytes, smem.ds[cursor.stage], DsTile::bytes);
      tma_store_commit();
      tma_store_wait_read<0>();
      mbarrier_arrive(smem.ds_empty[cursor.stage]);
      walk.advance();
      cursor.advance();
    }
  }

  // ---- consumers ---------------------------------------------------------------------------------------------------

  // Tile: of the gradient, and of what P^T or dS^T is multiplied with.
  template <class Tile> struct Consumer {
    Smem& smem;
    const BackwardParams<Config>& params;
    const KeyTile<Config>& tile;
    const Score& score;
    const int thread;
    Cursor cursor;
    u32 p_phase = 0;

    float gradient[Tile::cols / 2];  // dV or dK
    float s[32];                     // S^T, then P^T; or dP^T, then dS^T
    float slope[32];                 // of changed scores
    u32 fragment[16];                // of P^T or dS^T

    __forceinline__ void acquire() { wait(smem.ring.full[cursor.stage], cursor.phase); }

    __forceinline__ void release(int stage) {
      if (thread % 32 == 0) mbarrier_arrive(smem.ring.empty[stage]);
    }

    __forceinline__ void arrive(u64& barrier) {
      __syncwarp();
      if (thread % 32 == 0) mbarrier_arrive(barrier);
    }

    // s (+)= a b^T: K Q^T, V dO^T.
    template <class Operands> __forceinline__ void issue_scores(const u8* a, const u8* b, bool accumulate) {
      const u32 first = smem_address(a), second = smem_address(b);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < Operands::cols / 16; ++step)
        Wgmma<Element, 64>::template ss<0, 0>(s, Operands::k_major(first, step), Operands::k_major(second, step),
                                              step > 0 || accumulate);
      wgmma_commit();
    }

    // gradient += fragments b: P^T dO, dS^T Q.
    __forceinline__ void issue_gradient(const u8* b) {
      const u32 second = smem_address(b);
      pin(gradient);
      pin(fragment);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step)
        Wgmma<Element, Tile::cols>::template rs<1>(gradient, fragment[4 * step], fragment[4 * step + 1],
                                                 fragment[4 * step + 2], fragment[4 * step + 3],
                                                 Tile::mn_major(second, step), true);
      wgmma_commit();
    }

    __forceinline__ void pack() {
#pragma unroll
      for (int i = 0; i < 16; ++i) fragment[i] = pack2<Element>(s[2 * i], s[2 * i + 1]);
    }

    // ---- warpgroup 1: dV

    __forceinline__ void exponentiate(const QueryWalk<Config>& walk, int warp_key) {
      if constexpr (!Score::plain) change(walk, warp_key);
      ::exponentiate(s, params, smem.rows[cursor.stage], walk.m * 64, warp_key, thread);
      if constexpr (!Score::plain) {
        // Past the end a changed score may be anything.
        const int exists = params.seqlen_q - walk.m * 64 - 2 * (thread % 4);
        if (exists < 64) {
#pragma unroll
          for (int i = 0; i < 32; ++i)
            if (fragment_col(i) >= exists) s[i] = 0;
        }
#pragma unroll
        for (int i = 0; i < 32; ++i) slope[i] = s[i] == 0 ? 0 : slope[i] * s[i];
      }
    }

    __forceinline__ void change(const QueryWalk<Config>& walk, int warp_key) {
      const int head = tile.head * params.group_size + walk.head, offset = params.mask.seqlen_k - params.seqlen_q;
      const int key = warp_key + thread % 32 / 4, query = walk.m * 64 + 2 * (thread % 4);
      const float key_f[2] = {float(key), float(key + 8)}, query_f = float(query);
#pragma unroll
      for (int group = 0; group < 8; ++group) {
        float x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int i = 4 * group + j, slot = fragment_slot(i), col = fragment_col(i);
          slope[i] = score.slope(s[i], tile.batch, head, query + col, key + 8 * slot, query_f + col, key_f[slot], offset);
          x[j] = score.apply(s[i], tile.batch, head, query + col, key + 8 * slot, query_f + col, key_f[slot], offset);
        }
        pin(x);  // or addresses and half-done scores of all groups are live at once
#pragma unroll
        for (int j = 0; j < 4; ++j) s[4 * group + j] = x[j];
      }
    }

    void walk_for_values(int warp_key) {
      QueryWalk<Config> walk(params, tile);
      wait(smem.k_full, 0);
      acquire();
      issue_scores<QTile>(smem.k, smem.q[cursor.stage], false);
      wgmma_wait<0>();
      pin(s);
      exponentiate(walk, warp_key);
#pragma unroll 1
      for (int i = tile.steps;;) {
        const int stage = cursor.stage;
        wait(smem.p_empty, p_phase ^ 1);
        const float(&p)[32] = Score::plain ? s : slope;
#pragma unroll
        for (int j = 0; j < 8; ++j)
          smem.p[j][thread] = make_float4(p[4 * j], p[4 * j + 1], p[4 * j + 2], p[4 * j + 3]);
        arrive(smem.p_full);
        p_phase ^= 1;
        pack();
        issue_gradient(smem.dout[stage]);
        if (--i == 0) break;
        cursor.advance();
        walk.advance();
        acquire();
        issue_scores<QTile>(smem.k, smem.q[cursor.stage], false);
        wgmma_wait<1>();
        pin(gradient);
        pin(fragment);
        release(stage);
        wgmma_wait<0>();
        pin(s);
        exponentiate(walk, warp_key);
      }
      wgmma_wait<0>();
      pin(gradient);
      pin(fragment);
    }

    // ---- warpgroup 2: dK

    __forceinline__ void issue_dp() {
      start_dp<Config>(s, smem.rows[cursor.stage], thread);
      pin(s);
      issue_scores<VTile>(smem.v, smem.dout[cursor.stage], true);
    }

    void walk_for_keys() {
      const int row = thread / 32 * 16 + thread % 16;
      const u32 ds_address = smem_address(smem.ds[0]) + row * 128 + (thread % 32 / 16 ^ row % 8) * 16;
      DsCursor ds_cursor;
      wait(smem.v_full, 0);
      acquire();
      issue_dp();
#pragma unroll 1
      for (int i = tile.steps;;) {
        const int stage = cursor.stage;
        wgmma_wait<0>();
        pin(s);
        wait(smem.p_full, p_phase);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float4 p = smem.p[j][thread];
          s[4 * j] *= p.x;
          s[4 * j + 1] *= p.y;
          s[4 * j + 2] *= p.z;
          s[4 * j + 3] *= p.w;
        }
        arrive(smem.p_empty);
        p_phase ^= 1;
        pack();
        wait(smem.ds_empty[ds_cursor.stage], ds_cursor.phase ^ 1);
        const u32 address = ds_address + ds_cursor.stage * DsTile::bytes;
#pragma unroll
        for (int j = 0; j < 4; ++j)
          stmatrix_x4(address ^ (j * 32), fragment[4 * j], fragment[4 * j + 1], fragment[4 * j + 2],
                      fragment[4 * j + 3]);
        fence_async_proxy();
        arrive(smem.ds_full[ds_cursor.stage]);
        ds_cursor.advance();
        issue_gradient(smem.q[stage]);
        if (--i == 0) break;
        cursor.advance();
        acquire();
        issue_dp();
        wgmma_wait<1>();
        pin(gradient);
        pin(fragment);
        release(stage);
      }
      wgmma_wait<0>();
      pin(gradient);
      pin(fragment);
    }

    void make_dv(const TensorMap& map, int warp) {
      clear();
      if (!Config::bounded_left || tile.steps > 0) walk_for_values(tile.n * 64 + warp % 4 * 16);
      store(smem.k, map, 2);  // whose K nobody else reads
    }

    void make_dk(const TensorMap& map) {
      clear();
      if (!Config::bounded_left || tile.steps > 0) walk_for_keys();
#pragma unroll
      for (int i = 0; i < Tile::cols / 2; ++i) gradient[i] *= params.scale;
      store(smem.v, map, 3);
    }

    __forceinline__ void clear() {
#pragma unroll
      for (int i = 0; i < Tile::cols / 2; ++i) gradient[i] = 0;
    }

    __forceinline__ void store(u8* place, const TensorMap& map, int barrier) {
      named_barrier_sync(barrier, 128);  // all warps' products have read what lies there
      store_gradient<Element, Tile>(gradient, place, map, barrier, thread, tile.n * 64, tile.head, tile.batch);
      if (thread == 0) tma_store_wait_read<0>();
    }
  };
};

extern "C" __global__ void __launch_bounds__(Config::threads, 1)
attention_backward_wide_sm90(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                             const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap dout,
                             const __grid_constant__ TensorMap dk, const __grid_constant__ TensorMap dv,
                             const float* rows, u8* ds, float scale_grad, float scale_log2, int first_head, int heads,
                             int heads_k, int group_size, int seqlen_q, int seqlen_k, int mask_left, int mask_right,
                             int m_blocks, int first_n, int n_blocks, int section SCORE_PARAMETERS) {
  const BackwardParams<Config> params{rows, scale_grad, scale_log2, first_head, heads, heads_k, group_size, seqlen_q,
                                      {seqlen_k, mask_left, mask_right}, m_blocks, first_n, n_blocks, section};
  extern __shared__ __align__(1024) u8 raw_smem[];
  using Kernel = WideKernel<Config>;
  auto& smem = *reinterpret_cast<typename Kernel::Smem*>(raw_smem);
  const KeyTile<Config> tile(params);
  const Score score SCORE_VALUE;
  Kernel kernel{smem, params, tile, score, ds};
  // Uniform over the warp, which the compiler has to be told.
  const int warp = __shfl_sync(full_warp, threadIdx.x / 32, 0);

  if (threadIdx.x == 0) {
    prefetch_tensor_map(k);
    prefetch_tensor_map(q);
    prefetch_tensor_map(v);
    prefetch_tensor_map(dout);
    smem.ring.init(8);
    mbarrier_init(smem.k_full, 1);
    mbarrier_init(smem.v_full, 1);
    mbarrier_init(smem.p_full, 4);
    mbarrier_init(smem.p_empty, 4);
    for (int b = 0; b < 2; ++b) {
      mbarrier_init(smem.ds_full[b], 4);
      mbarrier_init(smem.ds_empty[b], 1);
    }
    fence_mbarrier_init();
  }
  __syncthreads();

  if (warp < 4) {
    setmaxnreg_dec<Config::producer_registers>();
    if (threadIdx.x == 0)
      produce<typename Kernel::QTile, typename Kernel::VTile, typename Kernel::QTile, typename Kernel::VTile>(
          smem, params, tile, q, k, v, dout);
    if (threadIdx.x == 32) kernel.store_ds();
  } else {
    setmaxnreg_inc<Config::consumer_registers>();
    const int thread = threadIdx.x % 128;
    if (warp < 8)
      typename Kernel::template Consumer<typename Kernel::VTile>{smem, params, tile, score, thread, {}}.make_dv(dv, warp);
    else
      typename Kernel::template Consumer<typename Kernel::QTile>{smem, params, tile, score, thread, {}}.make_dk(dk);
  }
}
