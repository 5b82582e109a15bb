// BatchNorm's inference parameters of one channel, and how they fold into one affine.
#pragma once

#include <cmath>
#include <cstdint>

#include "epilogue.h"

namespace fused_conv_bn {

// A per-channel tensor of P. nullptr: it was not given.
template <typename P>
struct ChannelParam {
  const P* data;

  FCB_HD acc_t<P> at(uint32_t c, acc_t<P> missing) const { return data == nullptr ? missing : to_acc(data[c]); }
};

template <typename P>
struct BnParams {
  ChannelParam<P> running_mean;
  ChannelParam<P> running_var;
  ChannelParam<P> weight;
  ChannelParam<P> bias;
  ChannelParam<P> conv_bias;
  double scaling_factor;
  double eps;
};

#if defined(__CUDA_ARCH__)
FCB_HD float rsqrt_acc(float x) { return rsqrtf(x); }
FCB_HD double rsqrt_acc(double x) { return ::rsqrt(x); }
#else
FCB_HD float rsqrt_acc(float x) { return 1.0f / std::sqrt(x); }
FCB_HD double rsqrt_acc(double x) { return 1.0 / std::sqrt(x); }
#endif

// BN and scale of one channel as an affine.
template <typename Acc>
FCB_HD Affine<Acc> fold(Acc mean, Acc var, Acc weight, Acc bias, Acc scaling_factor, Acc eps) {
  return {mean, rsqrt_acc(var + eps) * weight * scaling_factor, bias * scaling_factor};
}

// Whether inputs of T want the center. The pair without it costs an error of about 2^-24 |mean * scale|: nothing beside
// the rounding of a 16-bit result, too much for float where the mean is large.
template <typename T>
constexpr bool kCentered = sizeof(T) > 2;

// BN and scale of one channel for inputs of T, in acc_t<T>.
template <typename T, typename Acc = acc_t<T>>
FCB_HD Affine<Acc> fold_for(Acc mean, Acc var, Acc weight, Acc bias, Acc scaling_factor, Acc eps) {
  const Affine<Acc> affine = fold<Acc>(mean, var, weight, bias, scaling_factor, eps);
  if constexpr (kCentered<T>) {
    return affine;
  } else {
    return {0, affine.scale, affine.shift - affine.center * affine.scale};
  }
}

// Channel c's. (conv_bias belongs to fold_to_pair.)
template <typename T, typename P>
FCB_HD Affine<acc_t<T>> fold_channel(const BnParams<P>& bn, uint32_t c) {
  using Acc = acc_t<T>;
  return fold_for<T>(bn.running_mean.at(c, 0), bn.running_var.at(c, 1), bn.weight.at(c, 1), bn.bias.at(c, 0),
                     static_cast<Acc>(bn.scaling_factor), static_cast<Acc>(bn.eps));
}

// The channel's affine with center 0. Computed in double, whatever the result's type: the difference cancels.
template <typename P>
FCB_HD Affine<double> fold_to_pair(const BnParams<P>& bn, uint32_t c) {
  const double mean = static_cast<double>(bn.running_mean.at(c, 0)) - static_cast<double>(bn.conv_bias.at(c, 0));
  const Affine<double> affine = fold<double>(mean, bn.running_var.at(c, 1), bn.weight.at(c, 1), bn.bias.at(c, 0),
                                             bn.scaling_factor, bn.eps);
  return {0.0, affine.scale, affine.shift - affine.center * affine.scale};
}

}  // namespace fused_conv_bn
