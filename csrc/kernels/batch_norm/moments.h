// Moments of a channel in parts, and what BatchNorm in training mode makes of them.
//
// A kernel that gathers statistics leaves partials: an array [partials][channels] of Moments in float64, each about its
// own mean, for any disjoint parts of the channel's elements, of any size or none. A merge of two is exact but for
// roundings of float64, however large the mean is beside the deviation, so all that a kernel has to see to is that the
// sums within a part are short, or about a pivot near the mean. Partials are merged in a fixed order.
#pragma once

#include <cstdint>

#include "fold.h"
#include "kernels/common/epilogue.h"

namespace fused_conv_bn {

// Of some values: how many, their mean, and the sum of their squared distances from it.
struct Moments {
  double count;
  double mean;
  double m2;
};
constexpr int64_t kMomentsDoubles = sizeof(Moments) / sizeof(double);

// Of the values of both (Chan, Golub and LeVeque, 1979). NaN stays NaN.
FCB_HD Moments merge(const Moments& a, const Moments& b) {
  const double count = a.count + b.count;
  const double share = count > 0 ? b.count / count : 0;
  const double delta = b.mean - a.mean;
  return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * (a.count * share)};
}

// value / count, which on the GPU, for a count of 0, is NaN whatever the value. As CUDA's own division, but for results
// that are subnormal, and without the code for those, which is as long as a small kernel.
FCB_HD double divide_by_count(double value, double count) {
#if defined(__CUDA_ARCH__)
  double inverse;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(inverse) : "d"(count));  // to 2^-20 or so, which each step squares
  inverse = fma(fma(-count, inverse, 1.0), inverse, inverse);
  inverse = fma(fma(-count, inverse, 1.0), inverse, inverse);
  const double quotient = value * inverse;
  const double rest = fma(-count, quotient, value);
  return isfinite(quotient) ? fma(rest, inverse, quotient) : quotient;
#else
  return value / count;
#endif
}

// Of `count` values whose distances from the pivot have this sum and this sum of squares.
FCB_HD Moments from_sums(double count, double pivot, double sum, double squares) {
  if (!(count > 0)) {
    return {0, 0, 0};
  }
  const double mean = divide_by_count(sum, count);
  const double m2 = squares - sum * mean;
  return {count, pivot + mean, m2 < 0 ? 0 : m2};
}

// A tensor of one element a channel as it lies, read and written.
struct ChannelBuffer {
  void* data;  // nullptr: it was not given
  int64_t stride;
  Element element;

  FCB_HD double at(uint32_t c, double missing) const { return as<double>(c, missing); }
  template <typename Acc>
  FCB_HD Acc as(uint32_t c, Acc missing) const {
    if (data == nullptr) {
      return missing;
    }
    switch (element) {
      case Element::float16:
        return static_cast<Acc>(to_acc(static_cast<const float16*>(data)[c * stride]));
      case Element::bfloat16:
        return static_cast<Acc>(to_acc(static_cast<const bfloat16*>(data)[c * stride]));
      case Element::float32:
        return static_cast<Acc>(static_cast<const float*>(data)[c * stride]);
      default:
        return static_cast<Acc>(static_cast<const double*>(data)[c * stride]);
    }
  }
  FCB_HD void set(uint32_t c, double value) const {
    switch (element) {
      case Element::float16:
        static_cast<float16*>(data)[c * stride] = from_acc<float16>(static_cast<float>(value));
        return;
      case Element::bfloat16:
        static_cast<bfloat16*>(data)[c * stride] = from_acc<bfloat16>(static_cast<float>(value));
        return;
      case Element::float32:
        static_cast<float*>(data)[c * stride] = static_cast<float>(value);
        return;
      default:
        static_cast<double*>(data)[c * stride] = value;
    }
  }
};

template <typename Acc>
FCB_HD Affine<Acc> affine_cast(const Affine<double>& affine) {
  return {static_cast<Acc>(affine.center), static_cast<Acc>(affine.scale), static_cast<Acc>(affine.shift)};
}

// BatchNorm's arguments in training mode.
struct TrainParams {
  ChannelBuffer running_mean;  // with running_var or not at all
  ChannelBuffer running_var;
  ChannelBuffer weight;
  ChannelBuffer bias;
  ChannelBuffer conv_bias;  // is in the running mean alone: the batch's own mean takes it away again
  double scaling_factor;
  double momentum;
  double eps;
  // What is to be normalised has roundings of its own, so that a mean within the deviation can as well go into the shift.
  bool spare_centers;
  // Where the batch's mean and the inverse of its deviation go, in acc_t<T>; nullptr: nowhere.
  void* saved_mean;
  void* saved_invstd;
};

// What a channel's result depends on besides its moments, so that it can be read long before they are there.
struct ChannelValues {
  double running_mean, running_var, weight, bias, conv_bias;
};
FCB_HD ChannelValues channel_values(const TrainParams& p, uint32_t c) {
  return {p.running_mean.at(c, 0), p.running_var.at(c, 0), p.weight.at(c, 1), p.bias.at(c, 0), p.conv_bias.at(c, 0)};
}

// Channel c's affine by its batch's moments, for inputs of `element`; updates its running statistics. In double
// throughout; the caller rounds to acc_t<T>, which the center is a value of already.
FCB_HD Affine<double> finish_channel(const TrainParams& p, const ChannelValues& v, const Moments& m, uint32_t c,
                                     Element element) {
  if (p.running_mean.data != nullptr) {
    const double mean = m.mean + v.conv_bias;
    const double unbiased = divide_by_count(m.m2, m.count - 1);
    p.running_mean.set(c, (1 - p.momentum) * v.running_mean + p.momentum * mean);
    p.running_var.set(c, (1 - p.momentum) * v.running_var + p.momentum * unbiased);
  }
  const double var = divide_by_count(m.m2, m.count);
  const Affine<double> affine = fold<double>(m.mean, var, v.weight, v.bias, p.scaling_factor, p.eps);
  if (p.saved_mean != nullptr) {
    const double invstd = rsqrt_acc(var + p.eps);
    if (element == Element::float64) {
      static_cast<double*>(p.saved_mean)[c] = m.mean;
      static_cast<double*>(p.saved_invstd)[c] = invstd;
    } else {
      static_cast<float*>(p.saved_mean)[c] = static_cast<float>(m.mean);
      static_cast<float*>(p.saved_invstd)[c] = static_cast<float>(invstd);
    }
  }
  // What rounding takes from the center goes into the shift.
  const bool spared = p.spare_centers && m.mean * m.mean * m.count <= m.m2;
  const double center = element == Element::float64 ? affine.center
                        : element == Element::float32 && !spared
                            ? static_cast<double>(static_cast<float>(affine.center))
                            : 0;
  return {center, affine.scale, affine.shift + (center - affine.center) * affine.scale};
}

// center, scale and shift of each channel, in this order: acc_t<T>, for inputs of T.
struct AffineBuffer {
  void* data;
  uint32_t channels;
  Element element;  // T

  FCB_HD void set(uint32_t c, const Affine<double>& affine) const {
    const double numbers[] = {affine.center, affine.scale, affine.shift};
    for (uint32_t i = 0; i < 3; ++i) {
      const int64_t at = static_cast<int64_t>(i) * channels + c;
      if (element == Element::float64) {
        static_cast<double*>(data)[at] = numbers[i];
      } else {
        static_cast<float*>(data)[at] = static_cast<float>(numbers[i]);
      }
    }
  }
};

// What such a buffer holds, as kernels take it. Inputs of 16 bits have no centers.
template <typename T>
AffineTensors affine_of_buffer(const void* data, int64_t channels) {
  const auto* values = static_cast<const acc_t<T>*>(data);
  AffineTensors affine;
  affine.mean = kCentered<T> ? values : nullptr;
  affine.weight = values + channels;
  affine.bias = values + 2 * channels;
  return affine;
}

}  // namespace fused_conv_bn
