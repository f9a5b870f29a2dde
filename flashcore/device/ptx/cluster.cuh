// Clusters of CTAs: rank, barrier, and arrivals at another CTA's mbarrier (PTX ISA, "Cluster", "mapa").
#pragma once
#include "barrier.cuh"

u32 cluster_rank() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all CTAs of the cluster; what came before is visible to all of them after.
void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Arrives at the barrier that lies where `barrier` does, in the shared memory of the cluster's CTA `rank`.
__forceinline__ void mbarrier_arrive_cluster(u64& barrier, u32 rank) {
  asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(smem_address(&barrier)), "r"(rank) : "memory");
}
