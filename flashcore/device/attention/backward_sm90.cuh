// Attention backward for Hopper (sm_90a): dK, dV, and dQ in fp32 fragments.
//
// COMPUTES  with P = exp(scale * Q K^T + mask - LSE), dP = dO V^T, delta = rowsum(O * dO) - dLSE, dS =
//   P * (dP - delta):
//     dV = P^T dO,   dK = scale * dS^T Q,   and dS K, which becomes dQ in backward_dq_sm90.cuh.
//   Q, dO (batch, seqlen_q, heads_q, d), K, V, dK, dV (batch, seqlen_k, heads_q / group_size, d), 16 bit, any strides
//   that TMA takes; or packed sequences, (total, heads, d). d <= head_dim: TMA fills the rest with zeros and drops it
//   again. LSE and delta come from backward_rows_sm90.cuh. Mask: two diagonals (mask.cuh), either of which may be
//   missing. Any scale. Sinks are part of LSE: nothing else is to be known of them here.
//
// GRID AND ORDER  One CTA per tile of 128 keys of one key head, of packed sequences per place for one: some have none.
//   It walks over the tiles of tile_m queries that see it, of all query heads of the group, so dK and dV are complete in its registers. backward_schedule.cuh: the order, why
//   the ordered sums of dQ cannot block each other. The same bits each time.
//
// DATA FLOW (per query tile; keys are the rows of S^T, so that P^T and dS^T are first operands from registers)
//   K, Q -WGMMA SS-> S^T (registers) -exp2-> P^T          V, dO -WGMMA SS-> dP^T, from -delta on -> dS^T = P^T * dP^T
//   P^T, dO -WGMMA RS-> dV (registers)                    dS^T, Q -WGMMA RS-> dK (registers)
//   dS^T -stmatrix-> smem;  dS, K -WGMMA SS-> dQ (registers) -> smem -bulk add-> dQ (global, fp32)
//
// WARP ROLES AND REGISTERS
//   warpgroup 0: thread 0 loads K and V and fills the ring with Q, dO and the rows' numbers; threads 32 and 64 add the
//     dQ of warpgroup 1 and 2 to global memory, each in its turn; the others leave.
//   warpgroups 1, 2: 64 keys each; of dQ the left and right 64 columns (head_dim 128) or the upper and lower 64 rows.
//   setmaxnreg: (24 + 2 * 240) * 128 = 64,512 of 65,536. Live in a consumer: dK and dV head_dim / 2 each, S and dP
//     tile_m / 2 each, and about 30 more: 64 + 64 + 32 + 32 + 30 = 222 at head_dim 128 with 64 queries; 32 + 32 + 64 +
//     64 + 30 = 222 at head_dim 64 with 128. P, dS and dQ take the place of S and dP.
//
// SHARED MEMORY (BackwardSmem), bytes at head_dim 128, 64 queries, 3 stages, 1 dQ buffer
//   k, v                       65,536   at the end dK and dV
//   q[stages], dout[stages]    98,304   the ring
//   ds[2]                      32,768   dS^T of both warpgroups, by parity of the step
//   dq[dq_buffers][2]          32,768   dQ on its way out
//   rows[stages]                1,584   -lse * log2(e), -delta, whether the first is huge
//   barriers                      112
//
// BARRIERS (mbarrier)
//   name            arrivals per phase          bytes         waited for by   protects
//   k_full, v_full  1, thread 0                 K; V          consumers       K; V in place
//   ring.full[s]    1, thread 0                 Q, dO, rows   consumers       slot s filled
//   ring.empty[s]   8, one per consumer warp    -             thread 0        slot s read by all
//   ds_full[b]      8, one per consumer warp    -             consumers       dS^T of both warpgroups written
//   dq_full[w][b]   4, one per warp of w        -             thread 32 + 32w dQ of warpgroup w written
//   dq_empty[w][b]  1, thread 32 + 32w          -             warpgroup w     dQ buffer read by the copy engine
//   named 1: both warpgroups are done with K. 2, 3: the warps of one.
//   ds[b] needs no "empty": a warpgroup writes dS(i + 2) after it saw ds_full of step i + 1, to which the other one
//   arrives after its dQ(i).
//   global: turns, see backward_schedule.cuh; acquired and released by threads 32 and 64.
//
// SCHEDULE of a consumer; the other warpgroup's products fill what it leaves idle
//   S(0) | exp(0) | dP(0)
//   step i:  wait dP(i) | dS(i) -> smem | issue S(i+1), then dV(i), dK(i) | exp(i+1) under dV(i), dK(i) |
//            wait for the other's dS(i) | dQ(i) | dQ(i) -> smem | issue dP(i+1)
//
// NUMERICS  S, dP, P, dS and all sums are fp32; P and dS are rounded to 16 bit for the products. A query without keys,
//   and those past the end, have -lse = -inf, so P = 0. Hidden P are replaced by 0. Keys past the end read as 0. Where
//   LSE is huge, its rounding is a factor of P that could overflow: P is then at most 1.
//
// EVIDENCE  FlashAttention-2 (arXiv 2307.08691) for the backward pass over key tiles, FlashAttention-3 (arXiv
//   2407.08608) for P^T and dS^T in registers.
#pragma once
#include "../core/ring.cuh"
#include "../ptx/bulk.cuh"
#include "../ptx/global.cuh"
#include "../ptx/registers.cuh"
#include "../ptx/wgmma.cuh"
#include "../ptx/wgmma_sync.cuh"
#include "backward_tile.cuh"

template <class Config> struct BackwardSmem {
  using QTile = SmemTile<Config::tile_m, Config::head_dim>;
  using KTile = SmemTile<Config::tile_n, Config::head_dim>;
  using DsTile = SmemTile<Config::tile_n, Config::tile_m>;
  static constexpr int dq_bytes = 64 * 64 * 4;  // one warpgroup's part of a dQ tile

  alignas(1024) u8 k[KTile::bytes];
  u8 v[KTile::bytes];
  u8 q[Config::stages][QTile::bytes];
  u8 dout[Config::stages][QTile::bytes];
  u8 ds[2][DsTile::bytes];
  u8 dq[Config::dq_buffers][2][dq_bytes];
  float rows[Config::stages][2 * Config::tile_m + 4];  // as in BackwardParams
  RingBarriers<Config::stages> ring;
  u64 k_full, v_full;
  u64 ds_full[2];
  u64 dq_full[2][Config::dq_buffers];
  u64 dq_empty[2][Config::dq_buffers];
};

template <class Config> struct BackwardKernel {
  using Smem = BackwardSmem<Config>;
  using QTile = typename Smem::QTile;
  using KTile = typename Smem::KTile;
  using DsTile = typename Smem::DsTile;
  using Element = typename Config::Element;
  using Cursor = RingCursor<Config::stages>;
  using DqCursor = RingCursor<Config::dq_buffers>;

  static constexpr int tile_m = Config::tile_m;
  static constexpr int tile_n = Config::tile_n;
  static constexpr int head_dim = Config::head_dim;
  static_assert(sizeof(Smem) == Config::smem_bytes, "the host and the kernel disagree on shared memory");
  static_assert(tile_n == 128 && tile_m * head_dim == 64 * 128, "two warpgroups: 64 keys and 64 x 64 of dQ each");

  Smem& smem;
  const BackwardParams<Config>& params;
  const KeyTile<Config>& tile;
  float* const dq;   // (batch, heads_q, m_blocks, 2, 4096): fp32 fragments of dQ / scale, one for each warpgroup
  u32* const turns;  // (batch, heads_q, m_blocks, 2): how many key tiles have been added to a fragment

  static __forceinline__ void wait(u64& barrier, u32 parity) { mbarrier_wait<Config::wait_limit>(barrier, parity); }

  // ---- dQ on its way to global memory: one thread for each consumer warpgroup --------------------------------------

  __forceinline__ void await_turn(const u32* counter, int turn) {
    for (int tries = 0; load_acquire(counter) != u32(turn);)
      if (Config::wait_limit > 0 && ++tries == Config::wait_limit) __trap();
    fence_async_proxy_global();
  }

  void add_dq(int wg, bool waits) {
    wait_for_previous_kernel();
    DqCursor cursor;
    QueryWalk<Config> walk(params, tile);
    for (int i = 0; i < tile.steps; ++i) {
      const int part = walk.index() * 2 + wg;
      const int turn = walk.turn();
      u32* counter = turns + part;
      float* sum = dq + u64(part) * (Smem::dq_bytes / 4);
      u8* staged = smem.dq[cursor.stage][wg];
      if (turn > 0 && waits) await_turn(counter, turn);
      wait(smem.dq_full[wg][cursor.stage], cursor.phase);
      if (turn > 0)
        bulk_add(sum, staged, Smem::dq_bytes);
      else
        bulk_store(sum, staged, Smem::dq_bytes);  // the first one: what lay there is overwritten
      tma_store_commit();
      tma_store_wait_read<0>();
      mbarrier_arrive(smem.dq_empty[wg][cursor.stage]);
      bulk_wait<0>();
      fence_async_proxy_global();
      store_release(counter, turn + 1);
      walk.advance();
      cursor.advance();
    }
  }

  // ---- consumer: one warpgroup -------------------------------------------------------------------------------------

  struct Consumer {
    Smem& smem;
    const BackwardParams<Config>& params;
    const KeyTile<Config>& tile;
    const int wg, thread;
    const int warp_key;    // first key of this warp
    const u32 ds_address;  // where this lane's 16 bytes of dS^T begin, in the first buffer
    Cursor cursor;
    DqCursor dq_cursor;
    u32 parity = 0;  // of the step: its dS buffer
    u32 ds_phase = 0;
    QueryWalk<Config> walk;

    float dk[head_dim / 2], dv[head_dim / 2];
    float s[tile_m / 2];   // S^T, then P^T
    float dp[tile_m / 2];  // dP^T, then the fragments of dS^T and P^T
    float dq[32];          // takes the place of dp

    __forceinline__ u32 fragment(int i) const { return __float_as_uint(dp[i]); }

    __forceinline__ void acquire() { wait(smem.ring.full[cursor.stage], cursor.phase); }

    __forceinline__ void issue_s() {
      const u32 k = smem_address(smem.k) + wg * 64 * 128, q = smem_address(smem.q[cursor.stage]);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < head_dim / 16; ++step)
        Wgmma<Element, tile_m>::template ss<0, 0>(s, KTile::k_major(k, step), QTile::k_major(q, step), step > 0);
      wgmma_commit();
    }

    __forceinline__ void issue_dp() {
      forget(dp);
      start_dp<Config>(dp, smem.rows[cursor.stage], thread);
      const u32 v = smem_address(smem.v) + wg * 64 * 128, dout = smem_address(smem.dout[cursor.stage]);
      pin(dp);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < head_dim / 16; ++step)
        Wgmma<Element, tile_m>::template ss<0, 0>(dp, KTile::k_major(v, step), QTile::k_major(dout, step), true);
      wgmma_commit();
    }

    // dV += P^T dO, dK += dS^T Q: one group.
    __forceinline__ void issue_dv_dk(int stage) {
      const u32 q = smem_address(smem.q[stage]), dout = smem_address(smem.dout[stage]);
#pragma unroll
      for (int step = 0; step < tile_m / 16; ++step)
        Wgmma<Element, head_dim>::template rs<1>(dv, fragment(8 * step + 4), fragment(8 * step + 5),
                                                 fragment(8 * step + 6), fragment(8 * step + 7),
                                                 QTile::mn_major(dout, step), true);
#pragma unroll
      for (int step = 0; step < tile_m / 16; ++step)
        Wgmma<Element, head_dim>::template rs<1>(dk, fragment(8 * step), fragment(8 * step + 1), fragment(8 * step + 2),
                                                 fragment(8 * step + 3), QTile::mn_major(q, step), true);
      wgmma_commit();
    }

    // dQ = dS K, this warpgroup's 64 x 64 of it.
    __forceinline__ void issue_dq() {
      constexpr bool by_rows = tile_m == 128;
      forget(dq);
      const u32 ds = smem_address(smem.ds[parity]) + (by_rows ? wg * DsTile::chunk_bytes : 0);
      const u32 k = smem_address(smem.k) + (by_rows ? 0 : wg * KTile::chunk_bytes);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < tile_n / 16; ++step)
        Wgmma<Element, 64>::template ss<1, 1>(dq, DsTile::mn_major(ds, step), KTile::mn_major(k, step), step > 0);
      wgmma_commit();
    }

    // P^T of the query tile at the cursor, from S^T.
    __forceinline__ void exponentiate() {
      ::exponentiate(s, params, smem.rows[cursor.stage], walk.m * tile_m, warp_key, thread);
    }

    // dS^T = P^T * dP^T. Of 16 queries dp[8 j ..] then holds the fragment of dS^T, and behind it that of P^T.
    __forceinline__ void differentiate() {
#pragma unroll
      for (int j = 0; j < tile_m / 16; ++j) {
        u32 packed[8];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int a = 8 * j + 2 * i;
          packed[i] = pack2<Element>(s[a] * dp[a], s[a + 1] * dp[a + 1]);
          packed[4 + i] = pack2<Element>(s[a], s[a + 1]);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) dp[8 * j + i] = __uint_as_float(packed[i]);
      }
    }

    __forceinline__ void store_ds() {
      const u32 address = ds_address + parity * DsTile::bytes;
#pragma unroll
      for (int j = 0; j < tile_m / 16; ++j)
        stmatrix_x4((address + j / 4 * DsTile::chunk_bytes) ^ (j % 4 * 32), fragment(8 * j), fragment(8 * j + 1),
                    fragment(8 * j + 2), fragment(8 * j + 3));
      arrive(smem.ds_full[parity]);
    }

    // One lane speaks for the warp, after all of them have ordered their stores before the asynchronous proxy's reads.
    __forceinline__ void arrive(u64& barrier) {
      fence_async_proxy();
      __syncwarp();
      if (thread % 32 == 0) mbarrier_arrive(barrier);
    }

    __forceinline__ void store_dq() {
      wait(smem.dq_empty[wg][dq_cursor.stage], dq_cursor.phase ^ 1);
      float4* to = reinterpret_cast<float4*>(smem.dq[dq_cursor.stage][wg]) + thread;
#pragma unroll
      for (int j = 0; j < 8; ++j) to[128 * j] = make_float4(dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
      arrive(smem.dq_full[wg][dq_cursor.stage]);
      dq_cursor.advance();
    }

    __forceinline__ void begin_step() {
      wgmma_wait<0>();
      pin(dp);
      differentiate();
      pin(dp);
      store_ds();
    }

    // The products of dV and dK are done, that of dQ is not.
    __forceinline__ void end_step(int stage) {
      wgmma_wait<0>();
      pin(dk);
      pin(dv);
      pin(dp);
      if (thread % 32 == 0) mbarrier_arrive(smem.ring.empty[stage]);
      issue_dq();
      wgmma_wait<0>();
      pin(dq);
      store_dq();
      parity ^= 1;
      if (parity == 0) ds_phase ^= 1;
    }

    __forceinline__ void store(const float (&gradient)[head_dim / 2], u8* place, const TensorMap& map) {
      store_gradient<Element, KTile, Config::packed>(gradient, place + wg * 64 * 128, map, 2 + wg, thread,
                                                     tile.n * tile_n + wg * 64, tile.head, tile.batch, params.first_k,
                                                     params.mask.seqlen_k);
    }

    void run(const TensorMap& dk_map, const TensorMap& dv_map) {
#pragma unroll
      for (int i = 0; i < head_dim / 2; ++i) dk[i] = dv[i] = 0;
      if (!(Config::bounded_left || Config::packed) || tile.steps > 0) walk_over_queries();
      store(dv, smem.v, dv_map);
#pragma unroll
      for (int i = 0; i < head_dim / 2; ++i) dk[i] *= params.scale;
      named_barrier_sync(1, 256);
      store(dk, smem.k, dk_map);
      if (thread == 0) tma_store_wait_read<0>();
    }

    __forceinline__ void walk_over_queries() {
      wait(smem.k_full, 0);
      acquire();
      issue_s();
      wgmma_wait<0>();
      pin(s);
      exponentiate();
      pin(s);
      wait(smem.v_full, 0);
      issue_dp();
#pragma unroll 1
      for (int i = tile.steps;;) {
        const int stage = cursor.stage;
        begin_step();
        if (--i == 0) break;
        cursor.advance();
        walk.advance();
        acquire();
        issue_s();
        issue_dv_dk(stage);
        wgmma_wait<1>();
        pin(s);
        exponentiate();
        pin(s);
        wait(smem.ds_full[parity], ds_phase);  // also keeps the compiler from waiting for all products any earlier
        end_step(stage);
        issue_dp();
      }
      wgmma_fence();
      issue_dv_dk(cursor.stage);
      wait(smem.ds_full[parity], ds_phase);
      end_step(cursor.stage);
    }
  };

  __forceinline__ void consume(const TensorMap& dk, const TensorMap& dv, int wg, int thread, int warp) {
    const int row = wg * 64 + warp % 4 * 16 + thread % 16;  // of the key tile
    const u32 ds_address = smem_address(smem.ds[0]) + row * 128 + (thread % 32 / 16 ^ row % 8) * 16;
    Consumer{smem, params, tile, wg, thread, tile.n * tile_n + wg * 64 + warp % 4 * 16, ds_address, {}, {}, 0, 0,
             QueryWalk<Config>(params, tile)}.run(dk, dv);
  }
};

extern "C" __global__ void __launch_bounds__(Config::threads, 1)
attention_backward_sm90(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                        const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap dout,
                        const __grid_constant__ TensorMap dk, const __grid_constant__ TensorMap dv, const float* rows,
                        float* dq, u32* turns, float scale, float scale_log2, int batch, int heads_k, int group_size,
                        int seqlen_q, int seqlen_k, int mask_left, int mask_right, int m_blocks, int n_blocks,
                        int section SEQUENCE_PARAMETERS) {
  BackwardParams<Config> params{rows, scale, scale_log2, 0, batch * heads_k, heads_k, group_size, seqlen_q,
                                {seqlen_k, mask_left, mask_right}, m_blocks, 0, n_blocks, section};
  if (!enter_sequence(params, SEQUENCE_VALUE, batch)) {
    if (blockIdx.x == 0) wait_for_previous_kernel();  // or this kernel might end before the one that clears gradients
    return;
  }
  extern __shared__ __align__(1024) u8 raw_smem[];
  using Kernel = BackwardKernel<Config>;
  auto& smem = *reinterpret_cast<typename Kernel::Smem*>(raw_smem);
  const KeyTile<Config> tile(params);
  Kernel kernel{smem, params, tile, dq, turns};
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
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(smem.ds_full[i], 8);
      for (int b = 0; b < Config::dq_buffers; ++b) {
        mbarrier_init(smem.dq_full[i][b], 4);
        mbarrier_init(smem.dq_empty[i][b], 1);
      }
    }
    fence_mbarrier_init();
  }
  __syncthreads();

  if (warp < 4) {
    setmaxnreg_dec<Config::producer_registers>();
    if (threadIdx.x == 0)
      produce<typename Kernel::QTile, typename Kernel::QTile, typename Kernel::KTile, typename Kernel::KTile>(
          smem, params, tile, q, k, v, dout);
    const bool waits = may_wait<Config>(SEQUENCE_VALUE, batch);
    if (threadIdx.x == 32 || threadIdx.x == 64) kernel.add_dq(warp - 1, waits);
  } else {
    setmaxnreg_inc<Config::consumer_registers>();
    kernel.consume(dk, dv, warp / 4 - 1, threadIdx.x % 128, warp);
  }
}
