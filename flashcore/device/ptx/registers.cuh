// What the compiler believes about registers.
#pragma once
#include "types.cuh"

// Their old values are not needed any more. An accumulator that a WGMMA overwrites counts as read by it, so without this
// it would be kept from its last use on.
template <int n> __forceinline__ void forget(float (&r)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "=f"(r[i]));
}
