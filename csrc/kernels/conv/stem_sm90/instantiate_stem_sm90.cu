// The kernels of stem_sm90, for compute capability 9.0a alone.
#include "launch.cuh"

namespace fused_conv_bn {

bool StemSm90::is_compiled() {
#if defined(FCB_HAS_9_0A)
  return true;
#else
  return false;
#endif
}

template cudaError_t StemSm90::launch<float>(const ConvCall&, cudaStream_t) const;
template cudaError_t StemSm90::launch<float16>(const ConvCall&, cudaStream_t) const;
template cudaError_t StemSm90::launch<bfloat16>(const ConvCall&, cudaStream_t) const;

template cudaError_t StemSm90::launch_moments<float>(const ConvCall&, Moments*, cudaStream_t) const;
template cudaError_t StemSm90::launch_moments<float16>(const ConvCall&, Moments*, cudaStream_t) const;
template cudaError_t StemSm90::launch_moments<bfloat16>(const ConvCall&, Moments*, cudaStream_t) const;

}  // namespace fused_conv_bn
