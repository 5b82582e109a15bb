// Moments of a channel in parts, and what BatchNorm in training mode makes of them.
//
// A kernel that gathers statistics leaves partials: an array [partials][channels] of Moments in float64, each about its
// own mean, for any disjoint parts of the channel's elements, of any size or none. A merge of two is exact but for
// roundings of float64, however large the mean is beside the deviation, so all that a kernel has to see to is that the
// sums within a part are short, or about a pivot near the mean. Partials are merged in a fixed order.
#pragma once

#include <cstdint>

#include "epilogue.h"
#include "fold.h"

namespace fused_conv_bn {

// Of some values: how many, their mean, and the sum of their squared distances from it.
struct Moments {
  double count;
  double mean;
  double m2;
};

// Of the values of both (Chan, Golub and LeVeque, 1979). NaN stays NaN.
FCB_HD Moments merge(const Moments& a, const Moments& b) {
  const double count = a.count + b.count;
  const double share = count > 0 ? b.count / count : 0;
  const double delta = b.mean - a.mean;
  return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * (a.count * share)};
}

// Of `count` values whose distances from the pivot have this sum and this sum of squares.
FCB_HD Moments from_sums(double count, double pivot, double sum, double squares) {
  if (!(count > 0)) {
    return {0, 0, 0};
  }
  const double mean = sum / count;
  const double m2 = squares - sum * mean;
  return {count, pivot + mean, m2 < 0 ? 0 : m2};
}

// A tensor of one element a channel as it lies, read and written: of T, or, if `wide`, of acc_t<T>.
template <typename T>
struct ChannelBuffer {
  void* data;  // nullptr: it was not given
  int64_t stride;
  bool wide;

  FCB_HD double at(uint32_t c, double missing) const {
    if (data == nullptr) {
      return missing;
    }
    return wide ? static_cast<double>(static_cast<const acc_t<T>*>(data)[c * stride])
                : static_cast<double>(to_acc(static_cast<const T*>(data)[c * stride]));
  }
  FCB_HD void set(uint32_t c, double value) const {
    if (wide) {
      static_cast<acc_t<T>*>(data)[c * stride] = static_cast<acc_t<T>>(value);
    } else {
      static_cast<T*>(data)[c * stride] = from_acc<T>(static_cast<acc_t<T>>(value));
    }
  }
};

// BatchNorm's arguments in training mode. T: the input's element type.
template <typename T>
struct TrainParams {
  ChannelBuffer<T> running_mean;  // with running_var or not at all
  ChannelBuffer<T> running_var;
  ChannelBuffer<T> weight;
  ChannelBuffer<T> bias;
  ChannelBuffer<T> conv_bias;  // is in the running mean alone: the batch's own mean takes it away again
  double scaling_factor;
  double momentum;
  double eps;
};

// Channel c's affine by its batch's moments; updates its running statistics. In double throughout and rounded once.
template <typename T>
FCB_HD Affine<acc_t<T>> finish_channel(const TrainParams<T>& p, const Moments& m, uint32_t c) {
  using Acc = acc_t<T>;
  if (p.running_mean.data != nullptr) {
    const double mean = m.mean + p.conv_bias.at(c, 0);
    const double unbiased = m.m2 / (m.count - 1);
    p.running_mean.set(c, (1 - p.momentum) * p.running_mean.at(c, 0) + p.momentum * mean);
    p.running_var.set(c, (1 - p.momentum) * p.running_var.at(c, 0) + p.momentum * unbiased);
  }
  const Affine<double> affine = fold<double>(m.mean, m.m2 / m.count, p.weight.at(c, 1), p.bias.at(c, 0),
                                             p.scaling_factor, p.eps);
  // What rounding takes from the center goes into the shift.
  const Acc center = kCentered<T> ? static_cast<Acc>(affine.center) : Acc(0);
  return {center, static_cast<Acc>(affine.scale),
          static_cast<Acc>(affine.shift + (static_cast<double>(center) - affine.center) * affine.scale)};
}

}  // namespace fused_conv_bn
