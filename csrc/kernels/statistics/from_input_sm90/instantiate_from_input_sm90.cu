// The statistics of a convolution from its input, for compute capability 9.0 alone.
#include "kernel.cuh"

namespace fused_conv_bn {

template cudaError_t launch_conv_patches<float>(const Conv2d&, const ConvOperands&, const PatchPlan&, double*,
                                                const TrainParams&, const AffineBuffer&, cudaStream_t);
template cudaError_t launch_conv_patches<float16>(const Conv2d&, const ConvOperands&, const PatchPlan&, double*,
                                                  const TrainParams&, const AffineBuffer&, cudaStream_t);
template cudaError_t launch_conv_patches<bfloat16>(const Conv2d&, const ConvOperands&, const PatchPlan&, double*,
                                                   const TrainParams&, const AffineBuffer&, cudaStream_t);

}  // namespace fused_conv_bn
