// The pooling kernels, of every dtype.
#include "max.cuh"
#include "mean.cuh"

namespace fused_conv_bn {

#define FCB_INSTANTIATE(T)                                                                   \
  template cudaError_t launch_max_pool(const T*, T*, const PoolProblem&, int, cudaStream_t); \
  template cudaError_t launch_spatial_mean(const T*, T*, int64_t, int64_t, int64_t, int, cudaStream_t);
FCB_FORALL_ELEMENTS(FCB_INSTANTIATE)
#undef FCB_INSTANTIATE

template cudaError_t launch_mean_of_sums(const float*, float16*, int64_t, int64_t, int64_t, int64_t, int, cudaStream_t);
template cudaError_t launch_mean_of_sums(const float*, bfloat16*, int64_t, int64_t, int64_t, int64_t, int,
                                         cudaStream_t);

}  // namespace fused_conv_bn
