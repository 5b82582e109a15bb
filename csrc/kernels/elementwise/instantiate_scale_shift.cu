// The elementwise kernels, of every dtype.
#include "cat.cuh"
#include "gate.cuh"
#include "scale_shift.cuh"

namespace fused_conv_bn {

#define FCB_INSTANTIATE(T)                                                                                             \
  template cudaError_t launch_scale_shift(const T*, const T*, T*, const Shape&, const AffineTensors&, const Epilogue&, \
                                          cudaStream_t);                                                               \
  template cudaError_t launch_cat(const Parts<T>&, T*, const Shape&, const AffineTensors&, const Epilogue&,            \
                                  cudaStream_t);                                                                       \
  template cudaError_t launch_gate(const T*, const T*, const T*, T*, const Shape&, int64_t, const Epilogue&,           \
                                   cudaStream_t);
FCB_FORALL_ELEMENTS(FCB_INSTANTIATE)
#undef FCB_INSTANTIATE

}  // namespace fused_conv_bn
