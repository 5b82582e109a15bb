// The elementwise kernels, of every dtype.
#include "scale_shift.cuh"

namespace fused_conv_bn {

#define FCB_INSTANTIATE(T)                                                                                             \
  template cudaError_t launch_scale_shift(const T*, const T*, T*, const Shape&, const AffineTensors&, const Epilogue&, \
                                          cudaStream_t);
FCB_INSTANTIATE(float)
FCB_INSTANTIATE(float16)
FCB_INSTANTIATE(bfloat16)
FCB_INSTANTIATE(double)
#undef FCB_INSTANTIATE

}  // namespace fused_conv_bn
