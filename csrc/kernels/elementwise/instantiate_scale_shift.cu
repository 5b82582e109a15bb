// The elementwise kernels, of every dtype.
#include "scale_shift.cuh"

namespace fused_conv_bn {

#define FCB_INSTANTIATE(T)                                                                                             \
  template cudaError_t launch_scale_shift(const T*, const T*, T*, const Shape&, const AffineTensors&, const Epilogue&, \
                                          cudaStream_t);
FCB_FORALL_ELEMENTS(FCB_INSTANTIATE)
#undef FCB_INSTANTIATE

}  // namespace fused_conv_bn
