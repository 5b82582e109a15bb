// What starts the kernels of batch statistics: their code is in stats.cuh and finish.cuh, and compiled by instantiate_train.cu.
#pragma once

#include <cuda_runtime.h>

#include "moments.h"
#include "stats_plan.cuh"

namespace fused_conv_bn {

// Leaves the partials of x, which is dense with the given shape. T: float, float16, bfloat16, double. Asynchronous on `stream`, as
// everything here.
template <typename T>
cudaError_t launch_bn_stats(const T* x, const Shape& shape, const StatsPlan& plan, Moments* partials,
                            cudaStream_t stream);

// Merges partials, [splits][channels][inner], and makes affines of them.
cudaError_t launch_bn_finish(const TrainParams& params, const Moments* partials, int64_t splits, int64_t inner,
                             const AffineBuffer& affines, cudaStream_t stream);

// Merges partials into [count, mean, m2][channels].
cudaError_t launch_bn_moments(const Moments* partials, int64_t splits, int64_t inner, double* moments, int64_t channels,
                              cudaStream_t stream);

}  // namespace fused_conv_bn
