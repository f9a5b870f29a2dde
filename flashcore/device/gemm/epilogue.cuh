// What happens to an accumulator before it is stored.
#pragma once
#include "../core/fragment.cuh"

enum Activation { identity = 0, gelu = 1, silu = 2, swiglu = 3 };

// x * sigmoid(t)
float gated(float x, float t) {
  constexpr float log2_e = 1.4426950408889634f;
  return x * reciprocal_approx(1 + exp2_approx(-log2_e * t));
}

// GELU is its tanh form: 1 + tanh(u) = 2 sigmoid(2 u).
template <int activation> float activate(float x) {
  if constexpr (activation == gelu) return gated(x, 1.5957691216057308f * (x + 0.044715f * x * x * x));
  if constexpr (activation == silu || activation == swiglu) return gated(x, x);
  return x;
}

// On values rounded to T and packed. For SwiGLU x is the gate and `up` its factor.
template <int activation, class T> u32 activate_pair(u32 x, u32 up) {
  if constexpr (activation == identity) return x;
  float low, high;
  unpack2<T>(x, low, high);
  low = activate<activation>(low);
  high = activate<activation>(high);
  if constexpr (activation == swiglu) {
    float up_low, up_high;
    unpack2<T>(up, up_low, up_high);
    low *= up_low;
    high *= up_high;
  }
  return pack2<T>(low, high);
}
