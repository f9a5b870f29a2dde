// Which keys a query sees: between two diagonals (the device side of mask.py, whose tests hold the two together).
#pragma once
#include "../ptx/types.cuh"

// Query i sees the keys i + left to i + right, both included, that exist. The host adds seqlen_k - seqlen_q to the bounds
// of the problem's mask. Which bounds hide anything is a fact of the kernel: what does not is not compared.
template <bool bounded_left, bool bounded_right> struct Mask {
  int seqlen_k;
  int left, right;

  // Keys begin(i) to end(i) - 1; none if end(i) <= begin(i). Neither ever falls from one query to the next.
  __forceinline__ int begin(int query) const { return bounded_left ? max(query + left, 0) : 0; }
  __forceinline__ int end(int query) const { return bounded_right ? min(query + right + 1, seqlen_k) : seqlen_k; }
};
