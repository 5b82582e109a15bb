// The kernels of wgrad_stem_sm80 that multiply by mma.sync, for float32.
#include "launch.cuh"

namespace fused_conv_bn {

template cudaError_t WgradStemSm80::launch<float>(const WgradCall&, double*, cudaStream_t) const;

}  // namespace fused_conv_bn
