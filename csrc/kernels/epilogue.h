// The formula, once, for every kernel on every device:
//
//     activation((x - center) * scale + shift + residual)
//
// with one (center, scale, shift) per channel. A folded scale/shift pair has center 0. bn_scale keeps the running mean
// as the center, because x - mean is exact where x is close to a large mean, and x * scale - mean * scale is not.
#pragma once

#include <cmath>
#include <type_traits>

#include "scalar.h"

namespace fused_conv_bn {

template <typename Acc>
struct Affine {
  Acc center;
  Acc scale;
  Acc shift;
};

enum class Activation { none, relu, relu6, silu, hardswish };

#if defined(__CUDACC__)
FCB_HD float exp_acc(float x) { return expf(x); }
#else
// e^x to about one unit in the last place, without a call, so that loops around it vectorise. Cody-Waite reduction to
// |r| <= ln(2)/2, the Taylor polynomial of degree 7 (truncation error there: 5e-9 relative), and 2^k in two factors, so
// that results run into infinity, subnormals and 0 by themselves. NaN fails both comparisons and stays in p.
FCB_HD float exp_acc(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded value in the sum's low bits
  const float clamped = x < -104.0f ? -104.0f : (x > 89.0f ? 89.0f : x);
  const float shifted = clamped * 1.44269504f + kRound;
  const float k = shifted - kRound;
  const float r = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.98412698e-4f;
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t exponent = static_cast<int32_t>(bits_of(shifted) - bits_of(kRound));
  const int32_t half = exponent >> 1;
  const float first = float_of(static_cast<uint32_t>(half + 127) << 23);
  const float second = float_of(static_cast<uint32_t>(exponent - half + 127) << 23);
  return p * first * second;
}
#endif
FCB_HD double exp_acc(double x) { return exp(x); }

// The larger and the smaller of x and a bound. NaN passes through, as it does in PyTorch.
template <typename Acc>
FCB_HD Acc at_least(Acc x, Acc bound) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<Acc, float>) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(bound));  // one instruction, where the comparison takes two
    return x;
  }
#endif
  return x < bound ? bound : x;
}
template <typename Acc>
FCB_HD Acc at_most(Acc x, Acc bound) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<Acc, float>) {
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(bound));
    return x;
  }
#endif
  return x > bound ? bound : x;
}

template <Activation A, typename Acc>
FCB_HD Acc activate(Acc x) {
  if constexpr (A == Activation::relu) {
    return at_least(x, Acc(0));
  } else if constexpr (A == Activation::relu6) {
    return at_most(at_least(x, Acc(0)), Acc(6));
  } else if constexpr (A == Activation::silu) {
    return x / (Acc(1) + exp_acc(-x));
  } else if constexpr (A == Activation::hardswish) {
    return x * activate<Activation::relu6>(x + Acc(3)) / Acc(6);
  } else {
    return x;
  }
}

template <Activation A, typename Acc>
FCB_HD Acc epilogue(Acc x, const Affine<Acc>& affine) {
  return activate<A>((x - affine.center) * affine.scale + affine.shift);
}
template <Activation A, typename Acc>
FCB_HD Acc epilogue(Acc x, const Affine<Acc>& affine, Acc residual) {
  return activate<A>((x - affine.center) * affine.scale + affine.shift + residual);
}

// f(integral_constant<Activation>): a run-time activation as a compile-time one. On the host or in a kernel, as f is.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <typename F>
FCB_HD void dispatch_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::none:
      return f(std::integral_constant<Activation, Activation::none>{});
    case Activation::relu:
      return f(std::integral_constant<Activation, Activation::relu>{});
    case Activation::relu6:
      return f(std::integral_constant<Activation, Activation::relu6>{});
    case Activation::silu:
      return f(std::integral_constant<Activation, Activation::silu>{});
    case Activation::hardswish:
      return f(std::integral_constant<Activation, Activation::hardswish>{});
  }
}

// The same for the pair (activation, has_residual): f(integral_constant<Activation>, bool_constant).
template <typename F>
void dispatch_epilogue(Activation activation, bool has_residual, F&& f) {
  dispatch_activation(activation, [&](auto a) {
    if (has_residual) {
      f(a, std::true_type{});
    } else {
      f(a, std::false_type{});
    }
  });
}

}  // namespace fused_conv_bn
