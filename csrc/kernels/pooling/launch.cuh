// What starts the pooling kernels on the GPU: their code is in max.cuh, max_train.cuh, max_backward.cuh and mean.cuh, and compiled
// by instantiate_pooling.cu and instantiate_pooling_train.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "problem.h"

namespace fused_conv_bn {

// T: float, float16, bfloat16, double. Asynchronous on `stream`.
template <typename T>
cudaError_t launch_max_pool(const T* input, T* output, const PoolProblem& problem, int multiprocessors,
                            cudaStream_t stream);

// The same, and in `position` where in its window each maximum is, row by row. A window has at most kMostPositions elements.
template <typename T>
cudaError_t launch_max_pool_train(const T* input, T* output, uint8_t* position, const PoolProblem& problem,
                                  int multiprocessors, cudaStream_t stream);

// The gradient of its input. gradient, position: of its output.
template <typename T>
cudaError_t launch_max_pool_backward(const T* gradient, const uint8_t* position, T* result, const PoolProblem& problem,
                                     int multiprocessors, cudaStream_t stream);

// The means of (images, pixels, channels) over the pixels.
template <typename T>
cudaError_t launch_spatial_mean(const T* input, T* output, int64_t images, int64_t pixels, int64_t channels,
                                int multiprocessors, cudaStream_t stream);

}  // namespace fused_conv_bn
