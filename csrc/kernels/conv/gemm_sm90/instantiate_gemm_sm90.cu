// The kernels of gemm_sm90, for compute capability 9.0a alone.
#include "launch.cuh"

namespace fused_conv_bn {

template cudaError_t GemmSm90::launch<float>(const ConvCall&, cudaStream_t) const;
template cudaError_t GemmSm90::launch<float16>(const ConvCall&, cudaStream_t) const;
template cudaError_t GemmSm90::launch<bfloat16>(const ConvCall&, cudaStream_t) const;
template cudaError_t GemmSm90::launch_with_moments<float>(const ConvCall&, Moments*, cudaStream_t) const;
template cudaError_t GemmSm90::launch_with_moments<float16>(const ConvCall&, Moments*, cudaStream_t) const;
template cudaError_t GemmSm90::launch_with_moments<bfloat16>(const ConvCall&, Moments*, cudaStream_t) const;

}  // namespace fused_conv_bn
