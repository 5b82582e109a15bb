// The kernels of pointwise.
#include "kernel.cuh"

namespace fused_conv_bn {

template cudaError_t Pointwise::launch<float>(const ConvCall&, cudaStream_t) const;
template cudaError_t Pointwise::launch<float16>(const ConvCall&, cudaStream_t) const;
template cudaError_t Pointwise::launch<bfloat16>(const ConvCall&, cudaStream_t) const;

}  // namespace fused_conv_bn
