// The kernel of squeeze-and-excite blocks, of every dtype.
#include "squeeze.cuh"

namespace fused_conv_bn {

#define FCB_INSTANTIATE(T)                                                                                     \
  template bool squeeze_covers<T>(const SqueezeProblem&);                                                      \
  template bool squeeze_needs_means(const T*, const SqueezeProblem&);                                          \
  template cudaError_t launch_squeeze(const T*, const SqueezeOperands<T>&, T*, T*, const SqueezeProblem&, int, \
                                      cudaStream_t);
FCB_FORALL_ELEMENTS(FCB_INSTANTIATE)
#undef FCB_INSTANTIATE

}  // namespace fused_conv_bn
