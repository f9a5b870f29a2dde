// What becomes of scores before the softmax, and sinks (the device side of score.py). In front of every kernel of
// attention stands a `struct Score`, printed on the host:
//   plain      scores stay as they are; their scale is part of the exponent
//   apply(s, batch, head, query, key, query_f, key_f, offset)   the changed score, of a scaled one; positions twice, as
//              floats for the arithmetic
//   has_sink   exp(sink(head)) joins the denominator of every row
// and SCORE_PARAMETERS, the entry's parameters for it, of which SCORE_VALUE makes one.
#pragma once
#include "../ptx/math.cuh"

constexpr float log2_e = 1.4426950408889634f;
constexpr float ln_2 = 0.6931471805599453f;

// A row's sum of exponentials and the sink: what the output is multiplied with, and the LSE.
struct Denominator {
  float inverse, lse;

  // sum: of exponentials relative to row_max, which is -inf in a row without keys; 0 there.
  __forceinline__ Denominator(float row_max, float sum, float scale_log2) {
    inverse = sum == 0 ? 0 : reciprocal_approx(sum);
    lse = sum == 0 ? negative_infinity() : (row_max * scale_log2 + log2_approx(sum)) * ln_2;
  }
  __forceinline__ Denominator(float row_max, float sum, float scale_log2, float sink) {
    const float of_keys = sum == 0 ? negative_infinity() : row_max * scale_log2, of_sink = sink * log2_e;
    const float top = fmaxf(of_keys, of_sink), origin = top == negative_infinity() ? 0 : top;
    const float weight = exp2_approx(of_keys - origin), total = sum * weight + exp2_approx(of_sink - origin);
    inverse = total == 0 ? 0 : weight / total;
    lse = total == 0 ? negative_infinity() : (origin + log2_approx(total)) * ln_2;
  }
};
