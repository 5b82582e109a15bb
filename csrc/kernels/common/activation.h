// The activations, once, for every kernel on every device.
//
// No activation divides by IEEE's rules, and none is a call. On the GPU those of float32 take at most two special-function
// instructions (ex2, rcp), which err by a unit in the last place or two, as eager's expf and division do together.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "scalar.h"

namespace fused_conv_bn {

enum class Activation {
  none,
  relu,
  relu6,
  silu,
  hardswish,
  gelu,
  gelu_tanh,
  leaky_relu,
  sigmoid,
  hardsigmoid,
  mish,
  tanh
};
constexpr int kActivations = 12;

// ---- elementary functions --------------------------------------------------------------------------------------------

// By Horner's rule, from the highest power's coefficient to the constant.
template <typename... Coefficients>
FCB_HD float polynomial(float x, float highest, Coefficients... others) {
  float p = highest;
  ((p = p * x + others), ...);
  return p;
}

#if defined(__CUDA_ARCH__)
FCB_HD float exp2_acc(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FCB_HD float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#elif defined(__CUDACC__)
FCB_HD float exp2_acc(float x) { return exp2f(x); }
FCB_HD float reciprocal(float x) { return 1.0f / x; }
#else
// 2^x to about one unit in the last place, without a call, so that loops around it vectorise. 2^x = 2^k 2^f with |f| <= 1/2
// and f exact; 2^f is a minimax polynomial (1.3 * 2^-24 relative). 2^k comes in two factors, so that results run into
// infinity, subnormals and 0 by themselves. NaN fails both comparisons and stays in p.
FCB_HD float exp2_acc(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded value in the sum's low bits
  const float clamped = x < -151.0f ? -151.0f : (x > 129.0f ? 129.0f : x);
  const float shifted = clamped + kRound;
  const float f = clamped - (shifted - kRound);
  const float p = polynomial(f, 1.54762994e-4f, 1.34002697e-3f, 9.61800385e-3f, 5.55032790e-2f, 2.40226507e-1f,
                             6.93147182e-1f, 1.0f);
  const int32_t exponent = static_cast<int32_t>(bits_of(shifted) - bits_of(kRound));
  const int32_t half = exponent >> 1;
  const float first = float_of(static_cast<uint32_t>(half + 127) << 23);
  const float second = float_of(static_cast<uint32_t>(exponent - half + 127) << 23);
  return p * first * second;
}
FCB_HD float reciprocal(float x) { return 1.0f / x; }
#endif
FCB_HD double reciprocal(double x) { return 1.0 / x; }
FCB_HD double exp2_acc(double x) { return exp2(x); }

// e^x. The argument's rounding costs |x| 2^-24, relative: where |x| is large, the result is small beside its neighbours in
// every formula here.
FCB_HD float exp_acc(float x) { return exp2_acc(x * 1.44269504f); }
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

// x within [0, 1], for what x is multiplied by: on the GPU it is a modifier of the instruction before, and makes NaN 0.
template <typename Acc>
FCB_HD Acc saturate(Acc x) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<Acc, float>) {
    return __saturatef(x);
  }
#endif
  return at_most(at_least(x, Acc(0)), Acc(1));
}

// 1 / (1 + 2^v).
template <typename Acc>
FCB_HD Acc inverse_of_1_plus_exp2(Acc v) {
  return reciprocal(Acc(1) + exp2_acc(v));
}

// The argument's rounding costs |x| 2^-24, relative: where |x| is large, the result is small beside its neighbours.
template <typename Acc>
FCB_HD Acc sigmoid(Acc x) {
  return inverse_of_1_plus_exp2(x * Acc(-1.4426950408889634));
}

// The normal distribution's function at -a, for a >= 0. For float32 as 2^P(a), with a minimax polynomial P: the error is at most
// 2^-24, and small beside the result up to a = 4.5 (2^-12). P falls without end, so that the result becomes 0. In kShort the
// error is 2^-12.6 of the result up to a = 5.
template <bool kShort>
FCB_HD float upper_tail(float a) {
  if constexpr (kShort) {
    return exp2_acc(
        polynomial(a, -2.69918819e-4f, 5.29736141e-3f, -4.63193916e-2f, -4.66907382e-1f, -1.14778888f, -1.00022829f));
  }
  return exp2_acc(polynomial(a, -1.23215455e-6f, 2.06172936e-5f, -1.00960846e-4f, -3.29567381e-4f, 7.29391212e-3f,
                             -5.26392907e-2f, -4.59166408e-1f, -1.15110970f, -0.99999994f));
}
template <bool kShort>
FCB_HD double upper_tail(double a) {
  return 0.5 * erfc(a * 0.70710678118654752440);
}

// 1 - 2 / (1 + e^2x) loses digits near 0. float32: there a minimax polynomial takes its place (1.1 * 2^-24 relative). kShort:
// the first term of the series, x, up to 2^-7 (2^-15.6 relative; the other side of it 2^-16).
template <bool kShort>
FCB_HD float tanh_acc(float x) {
  if constexpr (kShort) {
    const float far = 1.0f - reciprocal(0.5f + 0.5f * exp2_acc(x * 2.88539008f));
    return fabsf(x) < 0.0078125f ? x : far;
  }
  const float s = x * x;
  const float p = polynomial(s, -6.28247298e-3f, 2.10777577e-2f, -5.38538583e-2f, 1.33326024e-1f, -3.33333194e-1f);
  const float size = x < 0 ? -x : x;
  const float far = 1.0f - reciprocal(0.5f + 0.5f * exp_acc(2.0f * size));
  return copysignf(size < 0.55f ? size * s * p + size : far, x);  // NaN: by way of far
}
template <bool kShort>
FCB_HD double tanh_acc(double x) {
  return tanh(x);
}

// ---- activations -----------------------------------------------------------------------------------------------------

// T: what the result is rounded to. In 16 bits polynomials are short.
template <Activation A, typename T, typename Acc = acc_t<T>>
FCB_HD Acc activate(Acc x, [[maybe_unused]] Acc negative_slope) {
  [[maybe_unused]] constexpr bool kShort = sizeof(T) == 2;
  if constexpr (A == Activation::relu) {
    return at_least(x, Acc(0));
  } else if constexpr (A == Activation::relu6) {
    return at_most(at_least(x, Acc(0)), Acc(6));
  } else if constexpr (A == Activation::silu) {
    return x * sigmoid(x);
  } else if constexpr (A == Activation::hardswish) {
    return x * saturate(x * Acc(1.0 / 6) + Acc(0.5));  // NaN and -Inf: NaN
  } else if constexpr (A == Activation::gelu) {
    const Acc tail = upper_tail<kShort>(x < 0 ? -x : x);
    return x * (x < 0 ? tail : Acc(1) - tail);
  } else if constexpr (A == Activation::gelu_tanh) {
    // 1 + tanh(u) = 2 / (1 + e^-2u), with u = sqrt(2 / pi) (x + 0.044715 x^3). -2 sqrt(2 / pi) log2(e) is -2.302...
    constexpr double kFactor = -2.302208198144325;
    return x * inverse_of_1_plus_exp2(x * (Acc(kFactor) + Acc(kFactor * 0.044715) * (x * x)));
  } else if constexpr (A == Activation::leaky_relu) {
    return x > 0 ? x : x * negative_slope;
  } else if constexpr (A == Activation::sigmoid) {
    return sigmoid(x);
  } else if constexpr (A == Activation::hardsigmoid) {
    return at_most(at_least(x * Acc(1.0 / 6) + Acc(0.5), Acc(0)), Acc(1));
  } else if constexpr (A == Activation::mish) {
    // tanh(log(1 + e)) = n / (n + 2) with n = e (e + 2), which is 1 from e^20 on.
    const Acc e = exp_acc(at_most(x, Acc(20)));
    const Acc n = e * (e + Acc(2));
    return x * (n * reciprocal(n + Acc(2)));
  } else if constexpr (A == Activation::tanh) {
    return tanh_acc<kShort>(x);
  } else {
    return x;
  }
}

// Activations that are bounds. Kernels that are short have a copy for these alone, so that the code of the others, which is
// twice as long as all the rest, is not in the way: 5 to 14% of their time.
FCB_HD constexpr bool is_bound(Activation activation) { return activation <= Activation::relu6; }
// Activations of three instructions at most.
FCB_HD constexpr bool is_short(Activation activation) {
  return is_bound(activation) || activation == Activation::hardswish || activation == Activation::leaky_relu ||
         activation == Activation::hardsigmoid;
}

// f(integral_constant<Activation>): a run-time activation as a compile-time one. On the host or in a kernel, as f is.
#define FCB_CASE(name)   \
  case Activation::name: \
    return f(std::integral_constant<Activation, Activation::name>{});
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <typename F>
FCB_HD void dispatch_bound(Activation activation, F&& f) {
  switch (activation) {
    FCB_CASE(relu)
    FCB_CASE(relu6)
    default:
      return f(std::integral_constant<Activation, Activation::none>{});
  }
}
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <typename F>
FCB_HD void dispatch_activation(Activation activation, F&& f) {
  switch (activation) {
    FCB_CASE(none)
    FCB_CASE(relu)
    FCB_CASE(relu6)
    FCB_CASE(silu)
    FCB_CASE(hardswish)
    FCB_CASE(gelu)
    FCB_CASE(gelu_tanh)
    FCB_CASE(leaky_relu)
    FCB_CASE(sigmoid)
    FCB_CASE(hardsigmoid)
    FCB_CASE(mish)
    FCB_CASE(tanh)
  }
}
#undef FCB_CASE

#if defined(__CUDACC__)
// The one of these that a kernel has. kBounds: only bounds come.
template <bool kBounds, typename F>
__device__ __forceinline__ void dispatch_some(Activation activation, F&& f) {
  if constexpr (kBounds) {
    dispatch_bound(activation, f);
  } else {
    dispatch_activation(activation, f);
  }
}

// All of z. Every loop is unrolled: the branch is taken once for all elements, and they stay in registers. half_way(): called when
// half of them are done.
template <typename T, bool kBounds, int kCount, typename F>
__device__ __forceinline__ void activate_all(Activation activation, acc_t<T> negative_slope, acc_t<T> (&z)[kCount],
                                             F&& half_way) {
  dispatch_some<kBounds>(activation, [&](auto a) {
    if constexpr (a() != Activation::none) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (i == kCount / 2) {
          half_way();
        }
        z[i] = activate<a(), T>(z[i], negative_slope);
      }
    }
  });
}
template <typename T, bool kBounds, int kCount>
__device__ __forceinline__ void activate_all(Activation activation, acc_t<T> negative_slope, acc_t<T> (&z)[kCount]) {
  activate_all<T, kBounds>(activation, negative_slope, z, [] {});
}
#endif

}  // namespace fused_conv_bn
