// Ordering of asynchronous warpgroup matrix instructions.
#pragma once
#include "types.cuh"

// Before the first wgmma, and whenever its registers were touched by other instructions.
void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Returns when at most `pending` committed groups of this warpgroup are unfinished; they finish in order.
template <int pending> void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory"); }

// Empty asm that "writes" the registers: the compiler may move no access to them across this point. Needed on
// both sides of asynchronous instructions whose register use the compiler cannot see.
__forceinline__ void pin(u32& r) { asm volatile("" : "+r"(r)::"memory"); }
template <int n> __forceinline__ void pin(float (&r)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(r[i])::"memory");
}
template <int n> __forceinline__ void pin(u32 (&r)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+r"(r[i])::"memory");
}
