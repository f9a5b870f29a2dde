// Bulk copies and sums of contiguous memory (PTX ISA, "cp.async.bulk", "cp.reduce.async.bulk"), their completion, and
// the order of kernels that overlap ("griddepcontrol"). Addresses and sizes are multiples of 16 bytes. Stores and sums
// are grouped by tma_store_commit(), like those of tensor maps.
#pragma once
#include "barrier.cuh"

void bulk_load(void* smem, const void* global, u32 bytes, u64& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(smem_address(smem)), "l"(global), "r"(bytes), "r"(smem_address(&barrier)) : "memory");
}

void bulk_store(void* global, const void* smem, u32 bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
               ::"l"(global), "r"(smem_address(smem)), "r"(bytes) : "memory");
}

// Adds fp32 numbers to those in global memory.
void bulk_add(float* global, const void* smem, u32 bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
               ::"l"(global), "r"(smem_address(smem)), "r"(bytes) : "memory");
}

// Waits until at most `pending` groups of this thread are unfinished: the others' writes are done and visible to it.
template <int pending> void bulk_wait() { asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory"); }

// Orders this thread's accesses to global memory, and what it knows to be done, before later ones of the asynchronous
// proxy, and the other way round.
void fence_async_proxy_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Lets the next kernel of the stream start, if it was launched to overlap; it waits for this one's results itself.
void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Waits for the kernel before, with all that it wrote; returns at once if this one was not launched to overlap.
void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
