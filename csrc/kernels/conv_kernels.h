// The convolution kernels' launchers. Each is compiled by a file of its own in ops/, as it takes long.
#pragma once

#include <cuda_runtime.h>

#include "conv_config.h"
#include "epilogue.h"
#include "moments.h"

namespace fused_conv_bn {

// T: float, float16, bfloat16. The tile was made for the problem.
template <typename T>
cudaError_t launch_conv_few_channels(const ConvProblem& problem, const ConvOperands& operands,
                                     const FewChannelsTile& tile, const GpuTraits& gpu, const Epilogue& epilogue,
                                     cudaStream_t stream);

// T: float, float16, bfloat16. The plan was made for the problem.
template <typename T>
cudaError_t launch_conv_depthwise(const ConvProblem& problem, const ConvOperands& operands, const Epilogue& epilogue,
                                  const DepthwisePlan& plan, int multiprocessors, cudaStream_t stream);

// T: float, float16, bfloat16. The tile was made for the problem.
template <typename T>
cudaError_t launch_conv_hopper(const ConvProblem& problem, const ConvOperands& operands, const HopperTile& tile,
                               const GpuTraits& gpu, const Epilogue& epilogue, Moments* moments, cudaStream_t stream);

// T: float, float16, bfloat16. The plan was made for the problem; the workspace has patches_workspace(plan) doubles. Leaves the
// channels' affines, and their running statistics.
template <typename T>
cudaError_t launch_conv_patches(const ConvProblem& problem, const ConvOperands& operands, const PatchPlan& plan,
                                double* workspace, const TrainParams& bn, const AffineBuffer& affines,
                                cudaStream_t stream);

// Whether this library has the two above: a build for other GPUs alone has not.
bool conv_hopper_is_compiled();

}  // namespace fused_conv_bn
