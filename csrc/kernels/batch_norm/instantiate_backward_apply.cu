// The kernels that write the gradients of the elementwise pass, of every dtype.
#include "backward_apply.cuh"

namespace fused_conv_bn {

#define FCB_INSTANTIATE(T)                                                                                  \
  template cudaError_t launch_backward_apply(const BackwardTensors<T>&, const Shape&, const AffineTensors&, \
                                             const BackwardBuffer&, const Epilogue&, cudaStream_t);
FCB_FORALL_ELEMENTS(FCB_INSTANTIATE)
#undef FCB_INSTANTIATE

}  // namespace fused_conv_bn
