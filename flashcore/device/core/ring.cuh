// A ring of shared-memory slots that one producer thread fills by TMA and all consumer warpgroups empty, in the
// same order. full[stage]: one arrival (the producer's expect_tx) and the bytes of the slot. empty[stage]: one
// arrival per consumer warpgroup.
#pragma once
#include "../ptx/barrier.cuh"

template <int stages> struct RingBarriers {
  u64 full[stages];
  u64 empty[stages];

  void init(int consumers) {
    for (int i = 0; i < stages; ++i) {
      mbarrier_init(full[i], 1);
      mbarrier_init(empty[i], consumers);
    }
  }
};

// Position in the ring: the slot, and the parity of the pass through the ring.
template <int stages> struct RingCursor {
  int stage = 0;
  u32 phase = 0;

  void advance() {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};
