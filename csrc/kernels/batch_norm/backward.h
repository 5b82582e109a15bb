// The backward of y = activation(affine(z) + residual), but for how tensors are walked: what all devices share.
//
// With dv = dy * activation'(v) and, of each channel,
//
//     s1 = sum(dv),  s2 = sum(dv * (z - mean)),  scale = weight * invstd * scaling_factor
//
// the gradients are
//
//     dresidual = dv    dbias = s1 * scaling_factor    dweight = s2 * invstd * scaling_factor
//     dz = scale * dv                                                in evaluation, where dconv_bias = scale * s1
//     dz = scale * (dv - s1 / n - (z - mean) * invstd^2 * s2 / n)    in training
//
// A kernel that gathers the sums leaves partials in float64, [splits][s1, s2][columns], for any disjoint parts of the channels.
// They are merged in a fixed order.
#pragma once

#include <cstdint>

#include "kernels/common/activation_backward.h"
#include "moments.h"

namespace fused_conv_bn {

// A tensor's memory, dense, in one layout with all the others; nullptr: it was not given, or is not asked for.
template <typename T>
struct BackwardTensors {
  const T* dy;
  const T* z;      // what the affine is applied to
  const T* other;  // the result, if from_result, else the residual
  T* dz;
  T* dresidual;
  bool from_result;  // else the derivative is computed from the activation's input: z and the residual

  // Of all that is read: their bits.
  uintptr_t address() const {
    return reinterpret_cast<uintptr_t>(dy) | reinterpret_cast<uintptr_t>(z) | reinterpret_cast<uintptr_t>(other);
  }
};

// Of the channels.
struct BackwardParams {
  ChannelBuffer mean;
  ChannelBuffer var;     // in evaluation; a missing one leaves invstd at 1
  ChannelBuffer invstd;  // in training, the inverse of the batch's deviation
  ChannelBuffer weight;
  ChannelBuffer bias;
  ChannelBuffer conv_bias;  // is not in z, and in the mean of evaluation
  double scaling_factor;
  double eps;
  // How many values the statistics are of: of each channel, or else of all.
  ChannelBuffer counts;
  double count;
  // Where gradients go; data is nullptr for those that are not asked for.
  ChannelBuffer dweight;
  ChannelBuffer dbias;
  ChannelBuffer dconv_bias;
  double* sums;  // [s1, s2][channels]

  // Whether the mean and the deviation depend on z.
  bool trains() const { return invstd.data != nullptr; }
  bool wants_sums() const {
    return dweight.data != nullptr || dbias.data != nullptr || dconv_bias.data != nullptr || sums != nullptr;
  }
};

template <typename Acc>
FCB_HD Acc inverse_deviation(const BackwardParams& p, uint32_t c) {
  if (p.invstd.data != nullptr) {
    return p.invstd.template as<Acc>(c, 1);
  }
  return p.var.data == nullptr ? Acc(1) : rsqrt_acc(p.var.template as<Acc>(c, 1) + static_cast<Acc>(p.eps));
}

// The affine that forward applied.
template <typename Acc>
FCB_HD Affine<Acc> backward_affine(const BackwardParams& p, uint32_t c) {
  const auto factor = static_cast<Acc>(p.scaling_factor);
  return {p.mean.template as<Acc>(c, 0) - p.conv_bias.template as<Acc>(c, 0),
          inverse_deviation<Acc>(p, c) * p.weight.template as<Acc>(c, 1) * factor,
          p.bias.template as<Acc>(c, 0) * factor};
}

// dz = affine.scale * dv + (z - affine.center) * slope + offset.
template <typename Acc>
struct BackwardAffine {
  Affine<Acc> affine;
  Acc slope;
  Acc offset;
};

// These of each channel, in training: five arrays of acc_t<T>, for tensors of T.
struct BackwardBuffer {
  void* data;  // nullptr: in evaluation
  uint32_t channels;
  Element element;  // T

  static constexpr int64_t kArrays = 5;

  FCB_HD void set(uint32_t c, const BackwardAffine<double>& b) const {
    const double numbers[] = {b.affine.center, b.affine.scale, b.affine.shift, b.slope, b.offset};
    for (uint32_t i = 0; i < kArrays; ++i) {
      const int64_t at = static_cast<int64_t>(i) * channels + c;
      if (element == Element::float64) {
        static_cast<double*>(data)[at] = numbers[i];
      } else {
        static_cast<float*>(data)[at] = static_cast<float>(numbers[i]);
      }
    }
  }
  template <typename T>
  FCB_HD BackwardAffine<acc_t<T>> at(uint32_t c) const {
    const auto* from = static_cast<const acc_t<T>*>(data) + c;
    const int64_t n = channels;
    return {{kCentered<T> ? from[0] : acc_t<T>(0), from[n], from[2 * n]}, from[3 * n], from[4 * n]};
  }
};

// What is made of a channel's sums. In double throughout.
FCB_HD void finish_backward(const BackwardParams& p, uint32_t c, double s1, double s2, const BackwardBuffer& buffer) {
  const double invstd = inverse_deviation<double>(p, c);
  Affine<double> affine = backward_affine<double>(p, c);
  const bool trains = p.invstd.data != nullptr;
  if (p.sums != nullptr) {
    p.sums[c] = s1;
    p.sums[static_cast<int64_t>(buffer.channels) + c] = s2;
  }
  if (p.dbias.data != nullptr) {
    p.dbias.set(c, s1 * p.scaling_factor);
  }
  if (p.dweight.data != nullptr) {
    p.dweight.set(c, s2 * invstd * p.scaling_factor);
  }
  if (p.dconv_bias.data != nullptr) {
    p.dconv_bias.set(c, trains ? 0 : s1 * affine.scale);  // the batch's mean takes it away again
  }
  if (buffer.data == nullptr) {
    return;
  }
  const double count = p.counts.at(c, p.count);
  const double slope = -affine.scale * invstd * invstd * divide_by_count(s2, count);
  double offset = -affine.scale * divide_by_count(s1, count);
  if (buffer.element == Element::float16 || buffer.element == Element::bfloat16) {  // which take no center
    offset -= slope * affine.center;
    affine = {0, affine.scale, affine.shift - affine.center * affine.scale};
  }
  buffer.set(c, {affine, slope, offset});
}

}  // namespace fused_conv_bn
