// What starts the pooling kernels on the GPU: their code is in max.cuh and mean.cuh, and compiled by instantiate_pooling.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "problem.h"

namespace fused_conv_bn {

// T: float, float16, bfloat16, double. Asynchronous on `stream`.
template <typename T>
cudaError_t launch_max_pool(const T* input, T* output, const PoolProblem& problem, int multiprocessors,
                            cudaStream_t stream);

// The means of (images, pixels, channels) over the pixels.
template <typename T>
cudaError_t launch_spatial_mean(const T* input, T* output, int64_t images, int64_t pixels, int64_t channels,
                                int multiprocessors, cudaStream_t stream);

}  // namespace fused_conv_bn
