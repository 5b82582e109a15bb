// The kernels that gather the sums of a backward, of every dtype, and the one that merges them.
#include "backward_finish.cuh"
#include "backward_sums.cuh"

namespace fused_conv_bn {

#define FCB_INSTANTIATE(T)                                                                             \
  template cudaError_t launch_backward_sums(const BackwardTensors<T>&, const Shape&, const StatsPlan&, \
                                            const BackwardParams&, const Epilogue&, double*, cudaStream_t);
FCB_FORALL_ELEMENTS(FCB_INSTANTIATE)
#undef FCB_INSTANTIATE

}  // namespace fused_conv_bn
