// The kernels of gemm_sm80.
#include "kernel.cuh"

namespace fused_conv_bn {

template cudaError_t GemmSm80::launch<float>(const ConvCall&, cudaStream_t) const;
template cudaError_t GemmSm80::launch<float16>(const ConvCall&, cudaStream_t) const;
template cudaError_t GemmSm80::launch<bfloat16>(const ConvCall&, cudaStream_t) const;

}  // namespace fused_conv_bn
