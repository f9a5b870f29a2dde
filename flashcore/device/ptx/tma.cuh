// Bulk tensor copies between global and shared memory (PTX ISA, "cp.async.bulk.tensor").
#pragma once
#include "barrier.cuh"

void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Coordinates count elements, innermost dimension first. Elements out of bounds arrive as zeros and still count
// as bytes of the transaction.
void tma_load_4d(void* smem, const TensorMap& map, u64& barrier, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
      ::"r"(smem_address(smem)), "l"(&map), "r"(smem_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

__forceinline__ void tma_load_5d(void* smem, const TensorMap& map, u64& barrier, int c0, int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2];"
      ::"r"(smem_address(smem)), "l"(&map), "r"(smem_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

__forceinline__ void tma_load_3d(void* smem, const TensorMap& map, u64& barrier, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
      ::"r"(smem_address(smem)), "l"(&map), "r"(smem_address(&barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

// The box arrives in every CTA of the cluster whose bit is set in `ctas`, at the place of `smem`, and is counted by
// that CTA's barrier at the place of `barrier`.
__forceinline__ void tma_load_3d_multicast(void* smem, const TensorMap& map, u64& barrier, u16 ctas, int c0, int c1,
                                           int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%4, %5, %6}], [%2], %3;"
      ::"r"(smem_address(smem)), "l"(&map), "r"(smem_address(&barrier)), "h"(ctas), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

// Elements out of bounds are not written.
__forceinline__ void tma_store_3d(const TensorMap& map, const void* smem, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];"
               ::"l"(&map), "r"(smem_address(smem)), "r"(c0), "r"(c1), "r"(c2) : "memory");
}

void tma_store_4d(const TensorMap& map, const void* smem, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
               ::"l"(&map), "r"(smem_address(smem)), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}

__forceinline__ void tma_store_5d(const TensorMap& map, const void* smem, int c0, int c1, int c2, int c3, int c4) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];"
               ::"l"(&map), "r"(smem_address(smem)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory");
}

void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most `pending` store groups of this thread still read shared memory.
template <int pending> void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

// Orders this thread's ordinary shared-memory accesses before later ones of the asynchronous proxy (TMA, WGMMA).
void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
