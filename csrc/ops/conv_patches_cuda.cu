// The statistics of a convolution from its input, for compute capability 9.0 alone.
#include "../kernels/conv_kernels.h"
#include "../kernels/conv_patches.cuh"

namespace fused_conv_bn {

template cudaError_t launch_conv_patches<float>(const ConvProblem&, const ConvOperands&, const PatchPlan&, double*,
                                                const TrainParams&, const AffineBuffer&, cudaStream_t);
template cudaError_t launch_conv_patches<float16>(const ConvProblem&, const ConvOperands&, const PatchPlan&, double*,
                                                  const TrainParams&, const AffineBuffer&, cudaStream_t);
template cudaError_t launch_conv_patches<bfloat16>(const ConvProblem&, const ConvOperands&, const PatchPlan&, double*,
                                                   const TrainParams&, const AffineBuffer&, cudaStream_t);

}  // namespace fused_conv_bn
