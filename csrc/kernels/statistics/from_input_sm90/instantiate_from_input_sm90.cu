// The statistics of a convolution from its input, for compute capability 9.0 alone.
#include "kernel.cuh"

namespace fused_conv_bn {

#define FCB_INSTANTIATE(T)                                                                                    \
  template cudaError_t FromInputSm90::launch<T>(const Conv2d&, const ConvOperands&, double*, double*,         \
                                                const TrainParams&, const AffineBuffer&, cudaStream_t) const; \
  template cudaError_t FromInputSm90::launch_sums<T>(const Conv2d&, const void*, double*, double*, cudaStream_t) const;
FCB_INSTANTIATE(float)
FCB_INSTANTIATE(float16)
FCB_INSTANTIATE(bfloat16)
#undef FCB_INSTANTIATE

}  // namespace fused_conv_bn
