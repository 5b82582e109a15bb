// The memory that batch statistics pass through on CUDA, for every op that gathers some.
#pragma once

#include "kernels/batch_norm/stats.cuh"
#include "torch/checks.h"

namespace fused_conv_bn {

struct StatsWorkspace {
  Tensor memory;
  Moments* partials;
  AffineBuffer affines;
};

// partials: of all channels together. element: of the input.
inline StatsWorkspace make_stats_workspace(int64_t partials, int64_t channels, Element element, const Device& device) {
  constexpr auto kDoubles = static_cast<int64_t>(sizeof(Moments) / sizeof(double));
  const int64_t size = partials * kDoubles + 3 * channels, stride = 1;
  const Tensor memory = empty_strided(1, &size, &stride, ScalarType::Double, device);
  auto* doubles = static_cast<double*>(memory.data_ptr());
  return {memory,
          reinterpret_cast<Moments*>(doubles),
          {doubles + partials * kDoubles, static_cast<uint32_t>(channels), element}};
}

}  // namespace fused_conv_bn
