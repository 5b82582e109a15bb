// The kernels of stem_sm80 for float32.
#include "launch.cuh"

namespace fused_conv_bn {

template cudaError_t StemSm80::launch<float>(const ConvCall&, cudaStream_t) const;

}  // namespace fused_conv_bn
