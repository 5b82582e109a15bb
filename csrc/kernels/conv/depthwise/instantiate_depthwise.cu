// The depthwise kernels.
#include "kernel.cuh"

namespace fused_conv_bn {

template cudaError_t Depthwise::launch<float>(const ConvCall&, cudaStream_t) const;
template cudaError_t Depthwise::launch<float16>(const ConvCall&, cudaStream_t) const;
template cudaError_t Depthwise::launch<bfloat16>(const ConvCall&, cudaStream_t) const;

}  // namespace fused_conv_bn
