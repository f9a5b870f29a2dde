// CUDA's threads and the PTX layer of the decoding kernel, emulated on a CPU: every CUDA thread is a thread, and whatever
// a warp does together is an exchange between two barriers. Stands in for flashcore/device/ptx; bf16 only.
#pragma once
#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using std::max;
using std::min;
struct Bf16 {};

#define __global__
#define __launch_bounds__(...)
#define __forceinline__ inline

struct float4 { float x, y, z, w; };
struct uint4 { u32 x, y, z, w; };
struct uint2 { u32 x, y; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }

// ---- a cluster of CTAs ---------------------------------------------------------------------------------------------

struct Warp {
  std::barrier<> barrier{32};
  u32 slots[32][6];  // what each lane shows to the others
};

struct Warpgroup {
  std::barrier<> barrier{128};
};

struct Cta {
  explicit Cta(int threads, int smem_bytes)
      : barrier(threads), warps(threads / 32), warpgroups(threads / 128), smem(smem_bytes, 0xff) {}  // NaN
  std::atomic<int> voted{0};
  std::barrier<> barrier;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  std::vector<u8> smem;
};

struct Cluster {
  Cluster(int ctas, int threads, int smem_bytes) : barrier(ctas * threads) {
    for (int rank = 0; rank < ctas; ++rank) this->ctas.push_back(std::make_unique<Cta>(threads, smem_bytes));
  }
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Cta>> ctas;
};

inline thread_local struct { int x; } threadIdx, blockIdx;
inline struct { int x; } gridDim;
inline thread_local Cluster* this_cluster;
inline thread_local Cta* this_cta;
inline thread_local Warp* this_warp;
inline thread_local int this_lane;

inline u8* shared_memory() { return this_cta->smem.data(); }

// Runs `kernel` in every thread of `clusters` clusters, one cluster after the other.
template <class Kernel> void launch(int clusters, int ctas, int threads, int smem_bytes, Kernel kernel) {
  for (int c = 0; c < clusters; ++c) {
    Cluster cluster(ctas, threads, smem_bytes);
    std::vector<std::thread> running;
    for (int rank = 0; rank < ctas; ++rank)
      for (int t = 0; t < threads; ++t)
        running.emplace_back([&, rank, t] {
          threadIdx.x = t, blockIdx.x = c * ctas + rank;
          this_cluster = &cluster, this_cta = cluster.ctas[rank].get();
          this_warp = &this_cta->warps[t / 32], this_lane = t % 32;
          kernel();
        });
    for (std::thread& thread : running) thread.join();
  }
}

inline void __syncwarp() { this_warp->barrier.arrive_and_wait(); }
inline void __syncthreads() { this_cta->barrier.arrive_and_wait(); }
inline int __syncthreads_count(int vote) {
  this_cta->voted += vote != 0;
  __syncthreads();
  const int count = this_cta->voted;
  __syncthreads();
  this_cta->voted = 0;
  __syncthreads();  // or a late reset would meet the next vote
  return count;
}
inline int __syncthreads_or(int vote) { return __syncthreads_count(vote) > 0; }
inline void cluster_sync() { this_cluster->barrier.arrive_and_wait(); }
inline u32 cluster_size() { return this_cluster->ctas.size(); }
inline u32 cluster_rank() { return blockIdx.x % cluster_size(); }

// ---- what a warp does together -------------------------------------------------------------------------------------

constexpr u32 full_warp = 0xffffffff;

inline u32 bits(float x) { u32 r; memcpy(&r, &x, 4); return r; }
inline float value(u32 x) { float r; memcpy(&r, &x, 4); return r; }
inline float low(u32 pair) { return value(pair << 16); }
inline float high(u32 pair) { return value(pair & 0xffff0000); }

// Shows `shown` to the other lanes and returns what `look` makes of everybody's.
template <int n, class Look> auto exchange(const u32 (&shown)[n], Look look) {
  std::copy(shown, shown + n, this_warp->slots[this_lane]);
  __syncwarp();
  auto seen = look(this_warp->slots);
  __syncwarp();
  return seen;
}

inline float __shfl_xor_sync(u32, float x, int mask) {
  return exchange({bits(x)}, [&](auto& lanes) { return value(lanes[this_lane ^ mask][0]); });
}

inline int __shfl_sync(u32, int x, int lane) {
  return exchange({u32(x)}, [&](auto& lanes) { return int(lanes[lane][0]); });
}

inline bool __any_sync(u32, bool x) {
  return exchange({u32(x)}, [](auto& lanes) { return std::any_of(lanes, lanes + 32, [](auto& lane) { return lane[0]; }); });
}

inline u32 transpose_8x8(u32 pair) {
  return exchange({pair}, [](auto& lanes) {
    const int g = this_lane / 4, t = this_lane % 4;
    auto at = [&](int row, int column) { return lanes[4 * row + column / 2][0] >> 16 * (column % 2) & 0xffff; };
    return at(2 * t, g) | at(2 * t + 1, g) << 16;
  });
}

template <class T> void mma_16x8x16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  exchange({a0, a1, a2, a3, b0, b1}, [&](auto& lanes) {
    auto half = [](u32 pair, int k) { return k % 2 ? high(pair) : low(pair); };
    for (int i = 0; i < 4; ++i) {
      const int row = this_lane / 4 + i / 2 * 8, column = this_lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k)
        d[i] += half(lanes[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k) *
                half(lanes[column * 4 + k % 8 / 2][4 + k / 8], k);
    }
    return 0;
  });
}

inline u32 low_halves(u32 a, u32 b) { return (a & 0xffff) | b << 16; }
inline u32 high_halves(u32 a, u32 b) { return a >> 16 | (b & 0xffff0000); }

// ---- arithmetic and memory -----------------------------------------------------------------------------------------

inline float exp2_approx(float x) { return exp2f(x); }
inline float log2_approx(float x) { return log2f(x); }
inline float reciprocal_approx(float x) { return 1 / x; }
inline float tanh_approx(float x) { return tanhf(x); }
template <class T> float widen(u16 x);
template <> inline float widen<Bf16>(u16 x) { return std::bit_cast<float>(u32(x) << 16); }
inline float negative_infinity() { return -INFINITY; }
inline float __fmul_rn(float a, float b) { volatile float product = a * b; return product; }

inline u32 round_bf16(float x) {
  return std::isnan(x) ? 0x7fff : (bits(x) + 0x7fff + (bits(x) >> 16 & 1)) >> 16;
}
template <class T> u32 pack2(float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }

inline const u8 *readable[3][2];  // begin and end of q, k and v
inline std::atomic<int> stray_reads;

inline void load_once_v4(u32 (&r)[4], const void* p) {
  const u8* from = static_cast<const u8*>(p);
  const bool inside = std::any_of(readable, readable + 3, [&](auto& m) { return m[0] <= from && from + 16 <= m[1]; });
  if (inside && uintptr_t(p) % 16 == 0) memcpy(r, p, 16);
  else ++stray_reads;
}

inline void load_shared_v4(u32 (&r)[4], const void* p) { memcpy(r, p, 16); }
inline const u8* cluster_address(const void* p, u32 rank) {
  return this_cluster->ctas[rank]->smem.data() + (static_cast<const u8*>(p) - shared_memory());
}
inline float load_cluster(const u8* p) { float x; memcpy(&x, p, 4); return x; }
inline void load_cluster_v4(float (&r)[4], const u8* p) { memcpy(r, p, 16); }
