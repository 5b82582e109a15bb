// What BatchNorm in training mode makes of its batch's moments on the CPU, for some channels at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "moments.h"
#include "stats_cpu.h"

namespace fused_conv_bn {

// Adds up the partials of n channels, [parts][stride] of means and m2s, in their order.
FCB_HD void merge_parts(int n, int64_t parts, const double* counts, const double* means, const double* m2s,
                        int64_t stride, double* mean, double* m2) {
  std::copy_n(means, n, mean);
  std::copy_n(m2s, n, m2);
  double count = counts[0];
  for (int64_t p = 1; p < parts; ++p) {
    for (int k = 0; k < n; ++k) {
      const Moments m = merge({count, mean[k], m2[k]}, {counts[p], means[p * stride + k], m2s[p * stride + k]});
      mean[k] = m.mean;
      m2[k] = m.m2;
    }
    count += counts[p];
  }
}

// f(a null pointer to the element type).
template <typename F>
FCB_HD void with_element(Element element, const F& f) {
  switch (element) {
    case Element::float16:
      return f(static_cast<float16*>(nullptr));
    case Element::bfloat16:
      return f(static_cast<bfloat16*>(nullptr));
    case Element::float32:
      return f(static_cast<float*>(nullptr));
    default:
      return f(static_cast<double*>(nullptr));
  }
}

// ChannelBuffer's at() and set() for n channels from the first one on.
FCB_HD void read_channels(const ChannelBuffer& from, int64_t first, int n, double missing, double* to) {
  if (from.data == nullptr) {
    std::fill_n(to, n, missing);
    return;
  }
  with_element(from.element, [&](auto* type) __attribute__((always_inline)) {
    const auto* data = static_cast<decltype(type)>(from.data) + first * from.stride;
    if (from.stride == 1) {
      for (int k = 0; k < n; ++k) {
        to[k] = static_cast<double>(to_acc(data[k]));
      }
    } else {
      for (int k = 0; k < n; ++k) {
        to[k] = static_cast<double>(to_acc(data[k * from.stride]));
      }
    }
  });
}
FCB_HD void write_channels(const double* from, int64_t first, int n, const ChannelBuffer& to) {
  with_element(to.element, [&](auto* type) __attribute__((always_inline)) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* data = static_cast<T*>(to.data) + first * to.stride;
    if (to.stride == 1) {
      for (int k = 0; k < n; ++k) {
        data[k] = from_acc<T>(static_cast<acc_t<T>>(from[k]));
      }
    } else {
      for (int k = 0; k < n; ++k) {
        data[k * to.stride] = from_acc<T>(static_cast<acc_t<T>>(from[k]));
      }
    }
  });
}

// finish_channel for n <= kPartChannels channels from the first one on, whose affines become center[k], scale[k] and
// shift[k].
template <typename T>
FCB_HD void finish_channels(const TrainParams& p, int64_t first, int n, double count, const double* mean,
                            const double* m2, acc_t<T>* center, acc_t<T>* scale, acc_t<T>* shift) {
  double running_mean[kPartChannels], running_var[kPartChannels], weight[kPartChannels], bias[kPartChannels],
      conv_bias[kPartChannels], new_mean[kPartChannels], new_var[kPartChannels];
  read_channels(p.running_mean, first, n, 0, running_mean);
  read_channels(p.running_var, first, n, 0, running_var);
  read_channels(p.weight, first, n, 1, weight);
  read_channels(p.bias, first, n, 0, bias);
  read_channels(p.conv_bias, first, n, 0, conv_bias);
  TrainParams local = p;
  local.running_mean = {new_mean, 1, Element::float64};
  local.running_var = {new_var, 1, Element::float64};
  if (p.saved_mean != nullptr) {
    local.saved_mean = static_cast<acc_t<T>*>(p.saved_mean) + first;
    local.saved_invstd = static_cast<acc_t<T>*>(p.saved_invstd) + first;
  }
  for (int k = 0; k < n; ++k) {
    const Affine<double> affine = finish_channel(local,
                                                 {running_mean[k], running_var[k], weight[k], bias[k], conv_bias[k]},
                                                 {count, mean[k], m2[k]}, static_cast<uint32_t>(k), kElement<T>);
    center[k] = static_cast<acc_t<T>>(affine.center);
    scale[k] = static_cast<acc_t<T>>(affine.scale);
    shift[k] = static_cast<acc_t<T>>(affine.shift);
  }
  if (p.running_mean.data != nullptr) {
    write_channels(new_mean, first, n, p.running_mean);
    write_channels(new_var, first, n, p.running_var);
  }
}

}  // namespace fused_conv_bn
