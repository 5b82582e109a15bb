// The algorithms that compute a convolution, and what a kernel has to be told besides the problem.
#pragma once

#include "conv_depthwise.h"
#include "conv_few_channels.h"
#include "conv_hopper.h"
#include "conv_params.h"

namespace fused_conv_bn {

enum class ConvAlgorithm {
  aten,          // PyTorch's convolution without a bias, then the epilogue in place
  hopper,        // implicit GEMM of few input channels, wgmma: compute capability 9.0
  few_channels,  // the same on tensor cores, mma.sync: compute capability 8.0 and newer
  depthwise,     // one filter a channel: compute capability 8.0 and newer
};

struct ConvConfig {
  ConvAlgorithm algorithm = ConvAlgorithm::aten;
  HopperTile hopper{};
  HopperTile hopper_moments{};  // for the pass that gathers statistics
  FewChannelsTile few_channels{};
  DepthwisePlan depthwise{};
};

}  // namespace fused_conv_bn
