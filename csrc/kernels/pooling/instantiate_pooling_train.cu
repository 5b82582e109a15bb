// The kernels of max pooling that gradients need, of every dtype.
#include "max_backward.cuh"
#include "max_train.cuh"

namespace fused_conv_bn {

#define FCB_INSTANTIATE(T)                                                                                   \
  template cudaError_t launch_max_pool_train(const T*, T*, uint8_t*, const PoolProblem&, int, cudaStream_t); \
  template cudaError_t launch_max_pool_backward(const T*, const uint8_t*, T*, const PoolProblem&, int, cudaStream_t);
FCB_FORALL_ELEMENTS(FCB_INSTANTIATE)
#undef FCB_INSTANTIATE

}  // namespace fused_conv_bn
