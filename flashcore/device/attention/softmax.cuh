// Online softmax of one warpgroup's 64 rows, on accumulator fragments (core/fragment.cuh), base 2.
//
// row_max is the maximum that the exponentials of a row refer to. It is set from the first block of a tile and may then
// lag behind the true maximum: the running sum and the output are rescaled only when some score of the warp passes its
// row's threshold. A skipped rescale costs neither shuffles nor multiplications. What lagging costs is the exactness of
// the largest probability: 2^0 = 1 needs no rounding to 16 bits, 2^x does. So a threshold lets a probability grow to
// about half of the row's sum, as it was when the threshold was set, and no further: a row that one key dominates refers
// to that key. It also stays below 2^headroom, which fp16, bf16 and the fp32 sums hold. docs/log/0007.
//
// Floats of equal sign order like their bit patterns: as integers, positive floats compare right with each other,
// and above all negative ones, and negative ones the wrong way round. So maxima are taken of integers, which Hopper
// does three operands at a time: the greatest integer, and only where that is negative the least.
//
// The exponent is one fused multiply-add, s * scale_log2 - round(row_max * scale_log2). The rounding of the second term
// is a factor that all exponentials of a row share, but it grows with the maximum: where that is huge, row_max is
// subtracted from the scores first, which leaves exactly 0 at the maximum.
#pragma once
#include "../core/fragment.cuh"

struct Softmax {
  static constexpr float headroom = 8.0f;
  static constexpr float huge_exponent = 16384.0f;  // from here on the rounding is 2^-11 or more

  const float scale_log2;
  const float unit;    // a factor of two in units of the raw scores
  float row_max[2];    // in units of the raw scores; -inf while a row has seen no key
  float row_sum[2];    // this thread's share
  float threshold[2];  // in units of the raw scores
  float rescale[2];    // factors for the output when update() returned true
  bool fast;           // no threshold in this warp is negative
  bool huge;           // some maximum in this warp is

  Softmax(float scale_log2) : scale_log2(scale_log2), unit(1 / scale_log2) {}

  // Greatest and least bit pattern among this thread's scores of a row and a first one.
  template <int n> static __forceinline__ int greatest(const float (&s)[n], int slot, int m) {
#pragma unroll
    for (int i = 2 * slot; i < n; i += 4) m = max(max(m, __float_as_int(s[i])), __float_as_int(s[i + 1]));
    return m;
  }
  template <int n> static __forceinline__ int least(const float (&s)[n], int slot, int m) {
#pragma unroll
    for (int i = 2 * slot; i < n; i += 4) m = min(min(m, __float_as_int(s[i])), __float_as_int(s[i + 1]));
    return m;
  }

  __forceinline__ void set_thresholds() {
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      const float half = log2_approx(quad_sum(row_sum[slot])) - 1;
      threshold[slot] = row_max[slot] + fminf(fmaxf(half, 0), headroom) * unit;
    }
    fast = __all_sync(full_warp, threshold[0] >= 0 && threshold[1] >= 0);
  }

  // A row without keys keeps row_max = -inf: it refers to 0, so that its exponentials are 0, not NaN.
  __forceinline__ float origin(int slot) const { return row_max[slot] == negative_infinity() ? 0 : row_max[slot]; }

  __forceinline__ void set_huge() {
    huge = __any_sync(full_warp, fmaxf(fabsf(origin(0)), fabsf(origin(1))) * scale_log2 >= huge_exponent);
  }

  // s becomes exp2((s - row_max) * scale_log2), and is added to the row sums.
  template <int n> __forceinline__ void exponentiate(float (&s)[n]) {
    float offset[2] = {origin(0) * scale_log2, origin(1) * scale_log2};
    if (huge) {
#pragma unroll
      for (int i = 0; i < n; ++i) s[i] -= origin(fragment_slot(i));
      offset[0] = offset[1] = 0;
    }
#pragma unroll
    for (int i = 0; i < n; ++i) {
      s[i] = exp2_approx(s[i] * scale_log2 - offset[fragment_slot(i)]);
      row_sum[fragment_slot(i)] += s[i];
    }
  }

  // First block of a tile.
  template <int n> __forceinline__ void start(float (&s)[n]) {
    int top[2];
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      top[slot] = greatest(s, slot, __float_as_int(s[2 * slot]));
      row_max[slot] = quad_max(__int_as_float(top[slot]));
      row_sum[slot] = 0;
    }
    if (__any_sync(full_warp, (__float_as_int(row_max[0]) | __float_as_int(row_max[1])) < 0)) {  // a negative row
#pragma unroll
      for (int slot = 0; slot < 2; ++slot)
        row_max[slot] = quad_max(__int_as_float(top[slot] >= 0 ? top[slot] : least(s, slot, top[slot])));
    }
    set_huge();
    exponentiate(s);
    set_thresholds();
  }

  // Later blocks. Returns, uniformly per warp, whether the output of earlier blocks must be rescaled.
  template <int n> __forceinline__ bool update(float (&s)[n]) {
    float top[2];  // max(threshold, scores of this thread)
    if (fast) {
#pragma unroll
      for (int slot = 0; slot < 2; ++slot)
        top[slot] = __int_as_float(greatest(s, slot, __float_as_int(threshold[slot])));
    } else {
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) {
        const int first = __float_as_int(threshold[slot]), most = greatest(s, slot, first);
        top[slot] = __int_as_float(most >= 0 ? most : least(s, slot, first));
      }
    }
    const bool grew = __any_sync(full_warp, top[0] > threshold[0] || top[1] > threshold[1]);
    if (grew) {
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) {
        const float m = quad_max(top[slot]);
        const bool row_grew = m > threshold[slot];
        rescale[slot] = row_grew ? exp2_approx((row_max[slot] - m) * scale_log2) : 1.0f;
        row_sum[slot] *= rescale[slot];
        if (row_grew) row_max[slot] = m;
      }
      set_huge();
      set_thresholds();
    }
    exponentiate(s);
    return grew;
  }

  template <int cols> __forceinline__ void rescale_output(float (&o)[cols]) {
#pragma unroll
    for (int i = 0; i < cols; ++i) o[i] *= rescale[fragment_slot(i)];
  }
};
