// The mean over the pixels of a channels_last tensor on the CPU.
#pragma once

#include "kernels/conv/packed_cpu/kernel.h"

namespace fused_conv_bn {

#if defined(__x86_64__)

// A band's sums, which are not long: those of all bands are added up in their turn.
constexpr int64_t kMeanPixels = 64;

FCB_HD void sum_pixels(const float* x, int64_t pixels, int64_t channels, float* sums) {
  const auto add = [&](auto count) __attribute__((always_inline)) {
    constexpr int64_t kPixels = decltype(count)::value;
    for (; pixels >= kPixels; pixels -= kPixels, x += kPixels * channels) {
      for (int64_t c = 0; c < channels; ++c) {
        float sum = x[c];
        for (int64_t i = 1; i < kPixels; ++i) {
          sum += x[i * channels + c];
        }
        sums[c] += sum;
      }
    }
  };
  add(std::integral_constant<int64_t, 4>{});
  add(std::integral_constant<int64_t, 1>{});
}
__attribute__((target("arch=x86-64-v3"))) inline void sum_pixels_v3(const float* x, int64_t pixels, int64_t channels,
                                                                    float* sums) {
  sum_pixels(x, pixels, channels, sums);
}

template <typename ParallelFor>
void launch_mean(const float* x, float* y, int64_t images, int64_t pixels, int64_t channels,
                 const ParallelFor& parallel_for) {
  const int64_t bands = ceil_div(pixels, kMeanPixels);
  constexpr int64_t kLeastValues = 1 << 15;  // to be worth another thread
  std::vector<float> sums(images * bands * channels);
  parallel_for(int64_t{0}, images * bands, ceil_div(kLeastValues, kMeanPixels * channels),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t first = i % bands * kMeanPixels;
                   sum_pixels_v3(x + (i / bands * pixels + first) * channels, std::min(kMeanPixels, pixels - first),
                                 channels, sums.data() + i * channels);
                 }
               });
  const float factor = 1.0f / static_cast<float>(pixels);
  for (int64_t n = 0; n < images; ++n) {
    float* const total = y + n * channels;
    std::fill_n(total, channels, 0.0f);
    sum_pixels_v3(sums.data() + n * bands * channels, bands, channels, total);
    for (int64_t c = 0; c < channels; ++c) {
      total[c] *= factor;
    }
  }
}

#endif

}  // namespace fused_conv_bn
