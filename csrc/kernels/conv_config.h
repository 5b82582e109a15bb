// The algorithms that compute a convolution, and what a kernel has to be told besides the problem.
#pragma once

#include "conv_depthwise.h"
#include "conv_few_channels.h"
#include "conv_hopper.h"
#include "conv_params.h"
#include "conv_patches.h"

namespace fused_conv_bn {

enum class ConvAlgorithm {
  aten,          // PyTorch's convolution without a bias, then the epilogue in place
  hopper,        // implicit GEMM of few input channels, wgmma: compute capability 9.0
  few_channels,  // the same on tensor cores, mma.sync: compute capability 8.0 and newer
  depthwise,     // one filter a channel: compute capability 8.0 and newer
};

// Where a batch's statistics come from.
enum class ConvStatistics {
  none,     // there are none to take
  results,  // the convolution's results: hopper computes them twice, the others read what they have written
  patches,  // sums over the input, before hopper's convolution
};

struct ConvConfig {
  ConvAlgorithm algorithm = ConvAlgorithm::aten;
  HopperTile hopper{};
  HopperTile hopper_moments{};  // for the pass that gathers statistics of results
  FewChannelsTile few_channels{};
  DepthwisePlan depthwise{};
  ConvStatistics statistics = ConvStatistics::none;
};

}  // namespace fused_conv_bn
