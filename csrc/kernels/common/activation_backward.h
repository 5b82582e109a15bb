// The activations' derivatives, once, for every kernel on every device: the gradient of an activation's input from that of its
// result.
//
// NaN goes where PyTorch's own *_backward puts it on CUDA: what is compared with bounds passes dy for it.
//
// Nothing divides by IEEE's rules, and nothing cancels: sums over many elements are made of these, so that 16-bit tensors get
// float32's accuracy too. float32 takes at most two special-function instructions. Exponentials are of -|v|, which never
// overflow. At infinities they are 0, and 0 times infinity is the NaN that PyTorch has there as well.
#pragma once

#include <type_traits>

#include "activation.h"

namespace fused_conv_bn {

// Whether the derivative can be computed from the activation's result. From its input it always can.
FCB_HD constexpr bool derives_from_result(Activation a) {
  return a == Activation::none || a == Activation::relu || a == Activation::sigmoid || a == Activation::tanh;
}

FCB_HD float absolute(float x) { return fabsf(x); }
FCB_HD double absolute(double x) { return fabs(x); }

// dy: the gradient of the result y, in acc_t<T> as everything here. A: one that derives_from_result().
template <Activation A, typename T, typename Acc = acc_t<T>>
FCB_HD Acc derivative_from_result(Acc dy, [[maybe_unused]] Acc y) {
  static_assert(derives_from_result(A));
  if constexpr (A == Activation::relu) {
    return y <= 0 ? Acc(0) : dy;
  } else if constexpr (A == Activation::sigmoid) {
    return dy * ((Acc(1) - y) * y);
  } else if constexpr (A == Activation::tanh) {
    return dy * (Acc(1) - y * y);
  } else {
    return dy;
  }
}

// sigmoid(w) and its derivative, w = v / -log2(e).
template <typename Acc>
struct SigmoidParts {
  Acc value;
  Acc slope;

  // By 2^-|v|.
  explicit FCB_HD SigmoidParts(Acc v) {
    const Acc e = exp2_acc(-absolute(v));
    const Acc large = reciprocal(Acc(1) + e);
    const Acc small = e * large;
    value = v > 0 ? small : large;
    slope = small * large;
  }
};

// v: the activation's input.
template <Activation A, typename T, typename Acc = acc_t<T>>
FCB_HD Acc derivative_from_input(Acc dy, [[maybe_unused]] Acc v, [[maybe_unused]] Acc negative_slope) {
  [[maybe_unused]] constexpr Acc kMinusLog2E = Acc(-1.4426950408889634);
  if constexpr (A == Activation::relu) {
    return v <= 0 ? Acc(0) : dy;
  } else if constexpr (A == Activation::relu6) {
    return v <= 0 || v >= 6 ? Acc(0) : dy;
  } else if constexpr (A == Activation::silu) {
    const SigmoidParts<Acc> s(v * kMinusLog2E);
    return dy * (s.value + v * s.slope);
  } else if constexpr (A == Activation::hardswish) {
    const Acc inside = dy * (v * Acc(1.0 / 3) + Acc(0.5));
    return v <= -3 ? Acc(0) : v < 3 ? inside : dy;
  } else if constexpr (A == Activation::gelu) {
    const Acc tail = upper_tail<false>(absolute(v));
    const Acc density = Acc(0.3989422804014327) * exp2_acc(v * v * (kMinusLog2E / 2));
    return dy * ((v < 0 ? tail : Acc(1) - tail) + v * density);
  } else if constexpr (A == Activation::gelu_tanh) {
    // v * sigmoid(2u), with u = sqrt(2 / pi) (v + 0.044715 v^3), whose factor times log2(e) is kFactor.
    constexpr double kFactor = -2.302208198144325, kRoot = 1.5957691216057308;
    const Acc square = v * v;
    const SigmoidParts<Acc> s(v * (Acc(kFactor) + Acc(kFactor * 0.044715) * square));
    return dy * (s.value + v * s.slope * (Acc(kRoot) + Acc(kRoot * 0.134145) * square));
  } else if constexpr (A == Activation::leaky_relu) {
    return v > 0 ? dy : dy * negative_slope;
  } else if constexpr (A == Activation::sigmoid) {
    return dy * SigmoidParts<Acc>(v * kMinusLog2E).slope;
  } else if constexpr (A == Activation::hardsigmoid) {
    return v > -3 && v < 3 ? dy * Acc(1.0 / 6) : Acc(0);  // NaN: 0
  } else if constexpr (A == Activation::mish) {
    // tanh(log(1 + e)) = n / (n + 2) with e = e^v and n = e (e + 2), whose derivative is 4 e (1 + e) / (n + 2)^2. For v >= 0
    // both have e^-2v in numerator and denominator.
    const Acc e = exp2_acc(absolute(v) * kMinusLog2E);
    const bool negative = v < 0;
    const Acc numerator = negative ? e * (e + Acc(2)) : Acc(1) + Acc(2) * e;
    const Acc inverse = reciprocal(numerator + (negative ? Acc(2) : Acc(2) * (e * e)));
    const Acc share = (negative ? e : e * e) * (Acc(1) + e) * inverse;
    return dy * ((numerator + Acc(4) * v * share) * inverse);
  } else if constexpr (A == Activation::tanh) {
    return dy * (Acc(4) * SigmoidParts<Acc>(v * (Acc(2) * kMinusLog2E)).slope);
  } else {
    return dy;
  }
}

}  // namespace fused_conv_bn
