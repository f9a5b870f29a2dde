// mbarrier and named-barrier instructions, one function each (PTX ISA, "Parallel Synchronization").
#pragma once
#include "types.cuh"

u32 smem_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

void mbarrier_init(u64& barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(&barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the asynchronous proxy (TMA) and to the other CTAs of the cluster.
void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

void mbarrier_arrive(u64& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(&barrier)) : "memory");
}

void mbarrier_arrive_expect_tx(u64& barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(&barrier)), "r"(bytes)
               : "memory");
}

__forceinline__ bool mbarrier_try_wait(u64& barrier, u32 parity) {
  u32 done;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done) : "r"(smem_address(&barrier)), "r"(parity) : "memory");
  return done;
}

// Blocks until the phase with this parity has completed. With a limit, a wait that would hang traps instead, so that
// a protocol error ends the kernel; that loop is opaque, or its exit would change how the compiler schedules WGMMA.
template <int max_tries> __forceinline__ void mbarrier_wait(u64& barrier, u32 parity) {
  if constexpr (max_tries == 0) {
    while (!mbarrier_try_wait(barrier, parity)) {}
  } else {
    asm volatile("{\n.reg .pred p;\n.reg .u32 tries;\nmov.u32 tries, 0;\n"
        "again:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra finished;\n"
        "add.u32 tries, tries, 1;\nsetp.lt.u32 p, tries, %2;\n@p bra again;\ntrap;\nfinished:\n}"
        ::"r"(smem_address(&barrier)), "r"(parity), "n"(max_tries) : "memory");
  }
}

void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
