// The hopper kernels, for compute capability 9.0a alone.
#include "../kernels/conv_hopper.cuh"
#include "../kernels/conv_kernels.h"

namespace fused_conv_bn {

bool conv_hopper_is_compiled() {
#if defined(FCB_HAS_9_0A)
  return true;
#else
  return false;
#endif
}

template cudaError_t launch_conv_hopper<float>(const ConvProblem&, const ConvOperands&, const HopperTile&,
                                               const GpuTraits&, const Epilogue&, Moments*, cudaStream_t);
template cudaError_t launch_conv_hopper<float16>(const ConvProblem&, const ConvOperands&, const HopperTile&,
                                                 const GpuTraits&, const Epilogue&, Moments*, cudaStream_t);
template cudaError_t launch_conv_hopper<bfloat16>(const ConvProblem&, const ConvOperands&, const HopperTile&,
                                                  const GpuTraits&, const Epilogue&, Moments*, cudaStream_t);

}  // namespace fused_conv_bn
