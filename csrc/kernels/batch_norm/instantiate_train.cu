// The kernels that gather a batch's statistics, of every dtype, and the one that merges them.
#include "finish.cuh"
#include "stats.cuh"

namespace fused_conv_bn {

#define FCB_INSTANTIATE(T) \
  template cudaError_t launch_bn_stats(const T*, const Shape&, const StatsPlan&, Moments*, cudaStream_t);
FCB_FORALL_ELEMENTS(FCB_INSTANTIATE)
#undef FCB_INSTANTIATE

}  // namespace fused_conv_bn
