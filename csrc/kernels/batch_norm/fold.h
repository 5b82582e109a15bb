// BatchNorm's inference parameters of one channel, and how they fold into one affine.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "kernels/common/epilogue.h"

namespace fused_conv_bn {

#if defined(__CUDA_ARCH__)
FCB_HD float rsqrt_acc(float x) { return rsqrtf(x); }
FCB_HD double rsqrt_acc(double x) { return ::rsqrt(x); }
#else
FCB_HD float rsqrt_acc(float x) { return 1.0f / std::sqrt(x); }
FCB_HD double rsqrt_acc(double x) { return 1.0 / std::sqrt(x); }
#endif

FCB_HD float fma_acc(float a, float b, float c) { return fmaf(a, b, c); }
FCB_HD double fma_acc(double a, double b, double c) { return fma(a, b, c); }

// BN and scale of one channel as an affine.
template <typename Acc>
FCB_HD Affine<Acc> fold(Acc mean, Acc var, Acc weight, Acc bias, Acc scaling_factor, Acc eps) {
  return {mean, rsqrt_acc(var + eps) * weight * scaling_factor, bias * scaling_factor};
}

// Whether inputs of T want the center. The pair without it costs an error of about 2^-24 |mean * scale|: nothing beside
// the rounding of a 16-bit result, too much for float where the mean is large.
template <typename T>
constexpr bool kCentered = sizeof(T) > 2;

// Where the affines of channels come from: BatchNorm's own tensors, or a scale and a shift, as weight and bias. Each has one
// element a channel, one behind the other; nullptr: it is missing.
struct AffineTensors {
  const void* mean = nullptr;
  const void* var = nullptr;
  const void* weight = nullptr;
  const void* bias = nullptr;
  const void* conv_bias = nullptr;
  double scaling_factor = 1;
  double eps = 0;    // and a missing var counts as 1, so that its root changes nothing
  bool wide = true;  // the elements are acc_t<T>; else T

  // A scale and a shift, and nothing to fold.
  bool is_pair() const { return mean == nullptr && var == nullptr && conv_bias == nullptr && scaling_factor == 1; }
};

// The same for values of T, which are folded by whoever needs an affine.
template <typename T>
struct AffineSource {
  using Acc = acc_t<T>;

  const void* mean;
  const void* var;
  const void* weight;
  const void* bias;
  const void* conv_bias;
  Acc scaling_factor;
  Acc eps;
  bool wide;

  AffineSource() = default;
  explicit AffineSource(const AffineTensors& t)
      : mean(t.mean),
        var(t.var),
        weight(t.weight),
        bias(t.bias),
        conv_bias(t.conv_bias),
        scaling_factor(static_cast<Acc>(t.scaling_factor)),
        eps(static_cast<Acc>(t.eps)),
        wide(t.wide) {}

  struct Values {
    Acc mean, var, weight, bias, conv_bias;
  };

  template <typename P>
  static FCB_HD Acc value(const void* data, uint32_t c, Acc missing) {
    return data == nullptr ? missing : to_acc(static_cast<const P*>(data)[c]);
  }
  template <typename P>
  FCB_HD Values values_of(uint32_t c) const {
    return {value<P>(mean, c, 0), value<P>(var, c, 1), value<P>(weight, c, 1), value<P>(bias, c, 0),
            value<P>(conv_bias, c, 0)};
  }
  // One branch around all loads, so that they are under way together.
  FCB_HD Values values(uint32_t c) const {
    if constexpr (std::is_same_v<T, Acc>) {
      return values_of<Acc>(c);
    } else {
      return wide ? values_of<Acc>(c) : values_of<T>(c);
    }
  }

  FCB_HD Affine<Acc> centered(uint32_t c) const { return centered_of(values(c)); }
  FCB_HD Affine<Acc> centered_of(const Values& v) const {
    return {v.mean - v.conv_bias, rsqrt_acc(v.var + eps) * v.weight * scaling_factor, v.bias * scaling_factor};
  }
  // With center 0: one rounding of the shift, and the scale's error is the same in both, so that it scales the result.
  FCB_HD Affine<Acc> pair(uint32_t c) const { return pair_of(values(c)); }
  FCB_HD Affine<Acc> pair_of(const Values& v) const {
    const Affine<Acc> affine = centered_of(v);
    // A scale of infinity leaves a shift alone that no mean is to be taken from.
    return {0, affine.scale, affine.center == 0 ? affine.shift : fma_acc(-affine.center, affine.scale, affine.shift)};
  }
  // For values that have no roundings of their own. kFolds: else the tensors are a pair.
  template <bool kFolds = true>
  FCB_HD Affine<Acc> at(uint32_t c) const {
    if constexpr (!kFolds) {
      const bool as_acc = std::is_same_v<T, Acc> || wide;
      return as_acc ? Affine<Acc>{0, value<Acc>(weight, c, 1), value<Acc>(bias, c, 0)}
                    : Affine<Acc>{0, value<T>(weight, c, 1), value<T>(bias, c, 0)};
    } else if constexpr (kCentered<T>) {
      return centered(c);
    } else {
      return pair(c);
    }
  }
};

// A channel's affine with center 0. Computed in double, whatever the tensors' type: the difference cancels.
template <typename T>
FCB_HD Affine<double> fold_to_pair(const AffineSource<T>& source, double scaling_factor, double eps, uint32_t c) {
  const auto v = source.values(c);
  const double mean = static_cast<double>(v.mean) - static_cast<double>(v.conv_bias);
  const Affine<double> affine = fold<double>(mean, v.var, v.weight, v.bias, scaling_factor, eps);
  return {0.0, affine.scale, affine.shift - affine.center * affine.scale};
}

}  // namespace fused_conv_bn
