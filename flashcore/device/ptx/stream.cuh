// Memory that is read once, and the shared memory of the other CTAs of a cluster (PTX ISA, "ld", "mapa").
#pragma once
#include "barrier.cuh"

// 16 bytes of memory that nobody writes while the kernel runs, and whose line is wanted, too. L1 is left to other data.
__forceinline__ void load_once_v4(u32 (&r)[4], const void* p) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "l"(p));
}

// Not kept in registers over a loop, as what C++ reads from shared memory may be.
__forceinline__ void load_shared_v4(u32 (&r)[4], const void* p) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem_address(p)) : "memory");
}

u32 cluster_size() {
  u32 size;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  return size;
}

// Where the cluster's CTA `rank` has what this one has at `p`.
u32 cluster_address(const void* p, u32 rank) {
  u32 address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(smem_address(p)), "r"(rank));
  return address;
}

float load_cluster(u32 address) {
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

void load_cluster_v4(float (&r)[4], u32 address) {
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(r[0]), "=f"(r[1]), "=f"(r[2]), "=f"(r[3]) : "r"(address) : "memory");
}
