// What kernels with TMA, WGMMA and mbarriers need besides emulation.h. Asynchronous instructions are done when they are
// issued; shared memory is addressed by its offset, 1024-byte swizzle atoms included. A wait of 60 s ends the process.
#pragma once
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <map>
#include <mutex>

#include "emulation.h"

#define __grid_constant__
#define __device__
#define __host__
#undef __forceinline__
#define __forceinline__ inline

struct float2 { float x, y; };
struct int2 { int x, y; };
inline int2 make_int2(int x, int y) { return {x, y}; }

inline u8* aligned_memory() {
  u8* p = shared_memory();
  return p + (1024 - uintptr_t(p) % 1024) % 1024;
}
inline u32 smem_address(const void* p) { return static_cast<const u8*>(p) - aligned_memory(); }
template <class T> T& at(u32 address) { return *reinterpret_cast<T*>(aligned_memory() + address); }
inline u32 __float_as_uint(float x) { return bits(x); }
inline float __uint_as_float(u32 x) { return value(x); }
inline int __float_as_int(float x) { return bits(x); }
inline float __int_as_float(int x) { return value(x); }
inline bool __all_sync(u32 warp, bool x) { return !__any_sync(warp, !x); }
inline u32 __umulhi(u32 a, u32 b) { return u64(a) * b >> 32; }
[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulation, CTA %d thread %d: %s\n", blockIdx.x, threadIdx.x, what);
  _Exit(3);
}
[[noreturn]] inline void __trap() { fail("trap"); }

// ---- barriers ------------------------------------------------------------------------------------------------------

inline std::mutex lock;
inline std::condition_variable changed;
struct Barrier { u32 arrivals, pending, phase; long long bytes; };
inline std::map<const void*, Barrier> barriers;

template <class Condition> void wait_until(std::unique_lock<std::mutex>& held, const char* what, Condition condition) {
  if (!changed.wait_for(held, std::chrono::seconds(60), condition)) fail(what);
}

inline void settle(Barrier& b) {
  if (b.pending == 0 && b.bytes == 0) {
    ++b.phase;
    b.pending = b.arrivals;
    changed.notify_all();
  }
}
inline Barrier& barrier_at(u64& barrier) {
  auto found = barriers.find(&barrier);
  if (found == barriers.end()) fail("a barrier that was not initialised");
  return found->second;
}
inline void mbarrier_init(u64& barrier, u32 arrivals) {
  std::lock_guard held(lock);
  barriers[&barrier] = {arrivals, arrivals, 0, 0};
}
inline void arrive(u64& barrier, long long bytes) {
  std::lock_guard held(lock);
  Barrier& b = barrier_at(barrier);
  if (b.pending == 0) fail("more arrivals than a phase has");
  --b.pending;
  b.bytes += bytes;
  settle(b);
}
inline void mbarrier_arrive(u64& barrier) { arrive(barrier, 0); }
inline void mbarrier_arrive_expect_tx(u64& barrier, u32 bytes) { arrive(barrier, bytes); }
inline void complete(u64& barrier, long long bytes) {
  std::lock_guard held(lock);
  Barrier& b = barrier_at(barrier);
  b.bytes -= bytes;
  settle(b);
}
template <int> void mbarrier_wait(u64& barrier, u32 parity) {
  std::unique_lock held(lock);
  Barrier& b = barrier_at(barrier);
  wait_until(held, "an mbarrier's phase does not end", [&] { return b.phase % 2 != parity; });
}

struct Named { int waiting = 0; u32 phase = 0; };
inline std::map<std::pair<int, int>, Named> named;  // of a CTA and a launch
inline void meet(int id, int threads, bool wait) {
  std::unique_lock held(lock);
  Named& b = named[{blockIdx.x, id}];
  const u32 phase = b.phase;
  if (++b.waiting == threads) {
    b.waiting = 0;
    ++b.phase;
    changed.notify_all();
  } else if (wait) {
    wait_until(held, "a named barrier is not complete", [&] { return b.phase != phase; });
  }
}
inline void named_barrier_sync(int id, int threads) { meet(id, threads, true); }
inline void named_barrier_arrive(int id, int threads) { meet(id, threads, false); }

template <int> void setmaxnreg_dec() {}
template <int> void setmaxnreg_inc() {}
inline void fence_mbarrier_init() {}
inline void fence_async_proxy() {}
inline void fence_async_proxy_global() {}
inline void launch_dependents() {}
inline void wait_for_previous_kernel() {}
inline u32 load_acquire(const u32* p) { return std::atomic_ref(*const_cast<u32*>(p)).load(); }
inline void store_release(u32* p, u32 x) { std::atomic_ref(*p).store(x); }
inline void load_v4_l2(const float* p, float& a, float& b, float& c, float& d) {
  a = p[0], b = p[1], c = p[2], d = p[3];
}

// ---- copies --------------------------------------------------------------------------------------------------------

struct TensorMap { u16* base; u64 rows; long long sizes[5], strides[5]; };  // innermost first, in elements

inline u32 swizzled(u32 address) { return address ^ (address >> 3 & 0x70); }
inline void prefetch_tensor_map(const TensorMap&) {}

// Calls visit(element in shared memory, element in global memory or null) for every element of a box.
// As on a GPU, addresses are counted modulo 2^64.
template <class Visit> void visit_box(const void* smem, const TensorMap& map, const int (&c)[5], Visit visit) {
  const u32 start = smem_address(smem);
  if (start % 1024) fail("a box that does not begin with a swizzle atom");
  for (int row = 0; row < int(map.rows); ++row)
    for (int col = 0; col < 64; ++col) {
      const long long at_[5] = {c[0] + col, c[1] + row, c[2], c[3], c[4]};
      bool inside = true;
      u64 element = u64(map.base);
      for (int i = 0; i < 5; ++i) {
        inside = inside && at_[i] >= 0 && at_[i] < map.sizes[i];
        element += u64(at_[i]) * u64(map.strides[i]) * 2;
      }
      visit(at<u16>(swizzled(start + row * 128 + col * 2)), inside ? reinterpret_cast<u16*>(element) : nullptr);
    }
}
inline void tma_load_5d(void* smem, const TensorMap& map, u64& barrier, int c0, int c1, int c2, int c3, int c4) {
  visit_box(smem, map, {c0, c1, c2, c3, c4}, [](u16& here, u16* there) { here = there ? *there : 0; });
  complete(barrier, map.rows * 128);
}
inline void tma_store_5d(const TensorMap& map, const void* smem, int c0, int c1, int c2, int c3, int c4) {
  visit_box(smem, map, {c0, c1, c2, c3, c4}, [](u16& here, u16* there) { if (there) *there = here; });
}
inline void tma_load_4d(void* smem, const TensorMap& map, u64& barrier, int c0, int c1, int c2, int c3) {
  tma_load_5d(smem, map, barrier, c0, c1, c2, c3, 0);
}
inline void tma_store_4d(const TensorMap& map, const void* smem, int c0, int c1, int c2, int c3) {
  tma_store_5d(map, smem, c0, c1, c2, c3, 0);
}
inline void bulk_load(void* smem, const void* global, u32 bytes, u64& barrier) {
  memcpy(smem, global, bytes);
  complete(barrier, bytes);
}
inline void bulk_store(void* global, const void* smem, u32 bytes) { memcpy(global, smem, bytes); }
inline void bulk_add(float* global, const void* smem, u32 bytes) {
  for (u32 i = 0; i < bytes / 4; ++i) global[i] += static_cast<const float*>(smem)[i];
}
inline void tma_store_commit() {}
template <int> void tma_store_wait_read() {}
template <int> void bulk_wait() {}

inline void stmatrix_x4(u32 address, u32 r0, u32 r1, u32 r2, u32 r3) {
  exchange({r0, r1, r2, r3}, [&](auto& lanes) {
    for (int i = 0; i < 4; ++i) at<u32>(address + 4 * i) = lanes[this_lane % 8 * 4 + i][this_lane / 8];
    return 0;
  });
}
inline void store_shared_v2(u32 address, float a, float b) { at<float>(address) = a, at<float>(address + 4) = b; }

// ---- matrix products -----------------------------------------------------------------------------------------------

inline void wgmma_fence() {}
inline void wgmma_commit() {}
// A product is of all four warps of a warpgroup. Kernels in which one thread speaks for all four count on that; for others
// it is enough, and faster here, that a warp is together.
template <int> void wgmma_wait() {
#ifdef ONE_SPEAKS_FOR_FOUR_WARPS
  this_cta->warpgroups[threadIdx.x / 128].barrier.arrive_and_wait();
#else
  __syncwarp();
#endif
}
template <class T> void pin(T&) {}
template <class T> void forget(T& r) { for (auto& x : r) x = NAN; }

// Element (row or column mn, k) of an operand in shared memory, 128-byte swizzle.
inline float operand(u64 descriptor, bool transposed, int mn, int k) {
  const u32 start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
  const u32 stride = (descriptor >> 32 & 0x3fff) << 4;
  const u32 address = transposed ? start + mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2
                                 : start + mn / 8 * stride + mn % 8 * 128 + k * 2;
  return low(at<u16>(swizzled(address)));
}

template <class T, int N> struct Wgmma {
  template <class A> static void product(float (&d)[N / 2], A a, u64 b, int transpose_b, bool accumulate) {
    const int row = threadIdx.x % 128 / 32 * 16 + this_lane / 4;
    float rows[2][16];
    for (int k = 0; k < 16; ++k) rows[0][k] = a(row, k), rows[1][k] = a(row + 8, k);
    for (int group = 0; group < N / 8; ++group)
      for (int j = 0; j < 2; ++j) {
        const int col = 8 * group + 2 * (this_lane % 4) + j;
        float sum[2] = {};
        for (int k = 0; k < 16; ++k) {
          const float x = operand(b, transpose_b, col, k);
          sum[0] += rows[0][k] * x, sum[1] += rows[1][k] * x;
        }
        for (int slot = 0; slot < 2; ++slot) {
          float& to = d[4 * group + 2 * slot + j];
          to = accumulate ? to + sum[slot] : sum[slot];
        }
      }
  }
  template <int transpose_a, int transpose_b> static void ss(float (&d)[N / 2], u64 a, u64 b, bool accumulate) {
    product(d, [&](int row, int k) { return operand(a, transpose_a, row, k); }, b, transpose_b, accumulate);
  }
  template <int transpose_b>
  static void rs(float (&d)[N / 2], u32 a0, u32 a1, u32 a2, u32 a3, u64 b, bool accumulate) {
    float mine[2][16];
    exchange({a0, a1, a2, a3}, [&](auto& lanes) {
      for (int k = 0; k < 16; ++k)
        for (int slot = 0; slot < 2; ++slot) {
          const u32 pair = lanes[this_lane / 4 * 4 + k % 8 / 2][slot + k / 8 * 2];
          mine[slot][k] = k % 2 ? high(pair) : low(pair);
        }
      return 0;
    });
    const int first = threadIdx.x % 128 / 32 * 16 + this_lane / 4;
    product(d, [&](int row, int k) { return mine[row == first ? 0 : 1][k]; }, b, transpose_b, accumulate);
  }
};

template <class T> void unpack2(u32 pair, float& a, float& b) { a = low(pair), b = high(pair); }
