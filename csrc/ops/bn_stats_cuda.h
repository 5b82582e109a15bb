// The memory that batch statistics pass through on CUDA, for every op that gathers some.
#pragma once

#include "../checks.h"
#include "../kernels/bn_stats.cuh"

namespace fused_conv_bn {

template <typename T>
struct StatsWorkspace {
  Tensor memory;
  Moments* partials;
  AffineBuffer<acc_t<T>> affines;
};

// partials: of all channels together.
template <typename T>
StatsWorkspace<T> make_stats_workspace(int64_t partials, int64_t channels, const Device& device) {
  constexpr auto kDoubles = static_cast<int64_t>(sizeof(Moments) / sizeof(double));
  const int64_t size = partials * kDoubles + 3 * channels, stride = 1;
  const Tensor memory = empty_strided(1, &size, &stride, ScalarType::Double, device);
  auto* doubles = static_cast<double*>(memory.data_ptr());
  return {memory,
          reinterpret_cast<Moments*>(doubles),
          {reinterpret_cast<acc_t<T>*>(doubles + partials * kDoubles), channels}};
}

}  // namespace fused_conv_bn
