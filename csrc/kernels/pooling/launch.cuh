// What starts the pooling kernels on the GPU: their code is in max.cuh, max_train.cuh, max_backward.cuh, mean.cuh and
// squeeze.cuh, and compiled by instantiate_pooling.cu, instantiate_pooling_train.cu and instantiate_squeeze.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/common/activation.h"
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

// The same of sums over parts of the pixels, (images, parts, channels), of a multiple of 4 channels. T: float16, bfloat16.
template <typename T>
cudaError_t launch_mean_of_sums(const float* sums, T* output, int64_t images, int64_t parts, int64_t channels,
                                int64_t pixels, int multiprocessors, cudaStream_t stream);

// The weights of a squeeze-and-excite block's layers, dense: (hidden, channels) and (outputs, hidden). No biases: nullptr.
template <typename T>
struct SqueezeOperands {
  const T* weight1;
  const T* bias1;
  const T* weight2;
  const T* bias2;
  Activation activation;
  Activation gate;
  double negative_slope;
};

// Whether the kernel has the shared memory for such layers.
template <typename T>
bool squeeze_covers(const SqueezeProblem& problem);

// Whether another kernel takes the means of these pixels first.
template <typename T>
bool squeeze_needs_means(const T* input, const SqueezeProblem& problem);

// gate(weight2 activation(weight1 mean(input) + bias1) + bias2), (images, outputs). means: room for (images, channels), where it
// needs them.
template <typename T>
cudaError_t launch_squeeze(const T* input, const SqueezeOperands<T>& operands, T* means, T* output,
                           const SqueezeProblem& problem, int multiprocessors, cudaStream_t stream);

}  // namespace fused_conv_bn
