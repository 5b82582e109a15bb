// The kernels of stem_sm80 for float16 and bfloat16.
#include "launch.cuh"

namespace fused_conv_bn {

template cudaError_t StemSm80::launch<float16>(const ConvCall&, cudaStream_t) const;
template cudaError_t StemSm80::launch<bfloat16>(const ConvCall&, cudaStream_t) const;

}  // namespace fused_conv_bn
