// Global-memory accesses that go through L2 and order CTAs (PTX ISA, "ld", "st", "Memory Consistency Model").
#pragma once
#include "types.cuh"

void store_v4(float* p, float a, float b, float c, float d) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

// Past L1, which may hold an older value of what another CTA wrote.
void load_v4_l2(const float* p, float& a, float& b, float& c, float& d) {
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(a), "=f"(b), "=f"(c), "=f"(d) : "l"(p) : "memory");
}

u32 load_acquire(const u32* p) {
  u32 value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

void store_release(u32* p, u32 value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

// Orders this thread's earlier accesses before its later ones, for all threads of the GPU.
void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
