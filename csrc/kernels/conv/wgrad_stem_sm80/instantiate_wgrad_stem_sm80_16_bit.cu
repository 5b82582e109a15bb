// The kernels of wgrad_stem_sm80 that multiply by mma.sync, for float16 and bfloat16.
#include "launch.cuh"

namespace fused_conv_bn {

template cudaError_t WgradStemSm80::launch<float16>(const WgradCall&, double*, cudaStream_t) const;
template cudaError_t WgradStemSm80::launch<bfloat16>(const WgradCall&, double*, cudaStream_t) const;

}  // namespace fused_conv_bn
