// A convolution's weight times the scale of its output channels, on the CPU.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>

namespace fused_conv_bn {

// to[k][i] = from[k][i] * scale[k]. Returns whether that is as good as scaling the convolution's result: every product is
// finite, and none has lost digits to underflow. A scale of infinity, say, would turn weights of both signs into NaN.
template <typename T, typename ParallelFor>
bool fold_weight(const T* from, const T* scale, T* to, int64_t channels, int64_t inner,
                 const ParallelFor& parallel_for) {
  constexpr int64_t kGrain = 16384;
  constexpr T kLeast = std::numeric_limits<T>::min();
  constexpr T kMost = std::numeric_limits<T>::max();
  std::atomic<bool> exact{true};
  parallel_for(int64_t{0}, channels, kGrain / inner + 1, [&](int64_t begin, int64_t end) {
    int bad = 0;
    for (int64_t k = begin; k < end; ++k) {
      const T factor = scale[k];
      for (int64_t i = k * inner; i < (k + 1) * inner; ++i) {
        const T weight = from[i];
        const T product = weight * factor;
        const T size = std::fabs(product);
        bad |= (size <= kMost ? 0 : 1) | (size < kLeast && std::fabs(weight) >= kLeast ? 1 : 0);
        to[i] = product;
      }
    }
    if (bad != 0) {
      exact = false;
    }
  });
  return exact;
}

}  // namespace fused_conv_bn
