// After the backward kernel for wide heads: dQ = scale * dS K.
//
// COMPUTES  dQ (batch, seqlen_q, heads_q, d <= head_dim), any strides that TMA takes, from dS^T in the tiles in which
//   backward_wide_sm90.cuh left them. Only tiles that see each other are read: nobody wrote the others. Query tiles that
//   see no key are 0. A launch covers the key tiles of the launch before it; where more follow, it leaves its sums in
//   memory, fp32, and the next one goes on from there.
// GRID  A CTA per `groups` tiles of 64 queries of a query head. The first warpgroup's thread 0 loads; each of the others
//   owns a tile of dQ in its registers, 64 x head_dim fp32, and all share the tiles of K on their way through the ring.
// SCHEDULE  of a consumer: issue the product of key tile n | wait for that of n - 1: release its slot.
#pragma once
#include "../core/ring.cuh"
#include "../ptx/bulk.cuh"
#include "../ptx/registers.cuh"
#include "../ptx/wgmma.cuh"
#include "../ptx/wgmma_sync.cuh"
#include "backward_tile.cuh"

template <class Config> struct ProductSmem {
  using Tile = SmemTile<64, Config::head_dim>;
  using DsTile = SmemTile<64, 64>;

  struct Slot {
    u8 k[Tile::bytes];
    u8 ds[Config::groups][DsTile::bytes];
  };
  alignas(1024) Slot slots[Config::stages];  // at the end dQ
  RingBarriers<Config::stages> ring;
};

template <class Config> struct ProductKernel {
  using Smem = ProductSmem<Config>;
  using Tile = typename Smem::Tile;
  using DsTile = typename Smem::DsTile;
  using Element = typename Config::Element;
  using Cursor = RingCursor<Config::stages>;

  static constexpr int head_dim = Config::head_dim;
  static constexpr int groups = Config::groups;
  static_assert(sizeof(Smem) == Config::smem_bytes, "the host and the kernel disagree on shared memory");
  static_assert(groups * Tile::bytes <= sizeof(Smem::slots));

  Smem& smem;
  const Mask<Config::bounded_left, Config::bounded_right>& mask;
  const int m_blocks, first_n, n_blocks, first_m;

  static __forceinline__ void wait(u64& barrier, u32 parity) { mbarrier_wait<Config::wait_limit>(barrier, parity); }

  __forceinline__ KeyTilesOf<Config> tiles_of(int group) const { return {mask, first_m + group}; }
  // Those of this launch that some query tile of the CTA sees.
  __forceinline__ int begin() const { return max(first_n, tiles_of(0).begin); }
  __forceinline__ int end() const {
    return min(first_n + n_blocks, tiles_of(min(groups, m_blocks - first_m) - 1).end);
  }

  void produce(const TensorMap& k, const u8* ds, int head_k, int batch) {
    wait_for_previous_kernel();
    Cursor cursor;
    for (int n = begin(); n < end(); ++n) {
      bool seen[groups];
      int bytes = Tile::bytes;
#pragma unroll
      for (int g = 0; g < groups; ++g) {
        seen[g] = first_m + g < m_blocks && tiles_of(g).has(n);
        bytes += seen[g] * DsTile::bytes;
      }
      wait(smem.ring.empty[cursor.stage], cursor.phase ^ 1);
      u64& full = smem.ring.full[cursor.stage];
      auto& slot = smem.slots[cursor.stage];
      mbarrier_arrive_expect_tx(full, bytes);
#pragma unroll
      for (int c = 0; c < Tile::chunks; ++c)
        tma_load_4d(slot.k + c * Tile::chunk_bytes, k, full, c * 64, n * 64, head_k, batch);
#pragma unroll
      for (int g = 0; g < groups; ++g)
        if (seen[g])
          bulk_load(slot.ds[g], ds + (u64(first_m + g) * n_blocks + n - first_n) * DsTile::bytes, DsTile::bytes, full);
      cursor.advance();
    }
  }

  // sums: of this query head, head_dim / 8 float4 of each thread of each query tile.
  void consume(const TensorMap& dq_map, float4* sums, bool goes_on, bool ends, float scale, int group, int thread,
               int head, int batch) {
    float dq[head_dim / 2];
#pragma unroll
    for (int i = 0; i < head_dim / 2; ++i) dq[i] = 0;
    const bool exists = first_m + group < m_blocks;
    float4* const mine = sums + u64(first_m + group) * (head_dim / 8) * 128 + thread;
    if constexpr (Config::rounds) {
      wait_for_previous_kernel();
#pragma unroll
      for (int j = 0; j < head_dim / 8; ++j) {
        float4 x = make_float4(0, 0, 0, 0);
        if (goes_on && exists) x = mine[128 * j];
        dq[4 * j] = x.x, dq[4 * j + 1] = x.y, dq[4 * j + 2] = x.z, dq[4 * j + 3] = x.w;
      }
    }
    const int first = tiles_of(group).begin, stop = exists ? tiles_of(group).end : 0;
    const int last = end();
    Cursor cursor;
    int pending = -1;  // the slot whose product is under way
#pragma unroll 1
    for (int n = begin(); n < last; ++n) {
      const int stage = cursor.stage;
      wait(smem.ring.full[stage], cursor.phase);
      if (first <= n && n < stop) {
        const u32 ds = smem_address(smem.slots[stage].ds[group]), k = smem_address(smem.slots[stage].k);
        pin(dq);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step)
          Wgmma<Element, head_dim>::template ss<1, 1>(dq, DsTile::mn_major(ds, step), Tile::mn_major(k, step), true);
        wgmma_commit();
        wgmma_wait<1>();
        if (pending >= 0 && thread % 32 == 0) mbarrier_arrive(smem.ring.empty[pending]);
        pending = stage;
      } else {  // before or behind those of this tile
        wgmma_wait<0>();
        if (thread % 32 == 0) {
          if (pending >= 0) mbarrier_arrive(smem.ring.empty[pending]);
          mbarrier_arrive(smem.ring.empty[stage]);
        }
        pending = -1;
      }
      cursor.advance();
    }
    wgmma_wait<0>();
    pin(dq);
    if (Config::rounds && !ends) {
#pragma unroll
      for (int j = 0; j < head_dim / 8 && exists; ++j)
        mine[128 * j] = make_float4(dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
      return;
    }
#pragma unroll
    for (int i = 0; i < head_dim / 2; ++i) dq[i] *= scale;
    named_barrier_sync(1, 128 * groups);  // all have read what lies in the ring
    if (!exists) return;
    store_gradient<Element, Tile>(dq, reinterpret_cast<u8*>(smem.slots) + group * Tile::bytes, dq_map, 2 + group, thread,
                                  (first_m + group) * 64, head, batch);
    if (thread == 0) tma_store_wait_read<0>();
  }
};

extern "C" __global__ void __launch_bounds__(Config::threads, 1)
attention_backward_product_sm90(const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap dq, const u8* ds,
                                float4* sums, int goes_on, int ends, float scale, int first_head, int heads_q,
                                int group_size, int seqlen_k, int mask_left, int mask_right, int m_blocks, int first_n,
                                int n_blocks) {
  extern __shared__ __align__(1024) u8 raw_smem[];
  using Kernel = ProductKernel<Config>;
  auto& smem = *reinterpret_cast<typename Kernel::Smem*>(raw_smem);
  const Mask<Config::bounded_left, Config::bounded_right> mask{seqlen_k, mask_left, mask_right};
  const int parts = (m_blocks + Config::groups - 1) / Config::groups;
  const int rank = blockIdx.x / parts;  // of the query head in this launch, whose first one is first_head
  const int batch = (first_head + rank) / heads_q, head = (first_head + rank) % heads_q;
  // Under a causal mask the last query tiles have the most to do.
  Kernel kernel{smem, mask, m_blocks, first_n, n_blocks, (parts - 1 - int(blockIdx.x) % parts) * Config::groups};
  // Uniform over the warp, which the compiler has to be told.
  const int warp = __shfl_sync(full_warp, threadIdx.x / 32, 0);

  if (threadIdx.x == 0) {
    smem.ring.init(4 * Config::groups);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (warp < 4) {
    setmaxnreg_dec<Config::producer_registers>();
    if (threadIdx.x == 0)
      kernel.produce(k, ds + u64(rank) * m_blocks * n_blocks * Kernel::DsTile::bytes, head / group_size, batch);
  } else {
    setmaxnreg_inc<Config::consumer_registers>();
    kernel.consume(dq, sums + u64(rank) * m_blocks * (Config::head_dim / 8) * 128, goes_on, ends, scale, warp / 4 - 1,
                   threadIdx.x % 128, head, batch);
  }
}
