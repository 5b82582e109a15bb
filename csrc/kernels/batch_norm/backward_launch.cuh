// What starts the kernels of BatchNorm's backward: their code is in backward_*.cuh, and compiled by instantiate_backward_*.cu.
#pragma once

#include <cuda_runtime.h>

#include "backward.h"
#include "kernels/elementwise/memory_format.h"
#include "stats_plan.cuh"

namespace fused_conv_bn {

// Leaves the partials of the sums. T: float, float16, bfloat16, double. Asynchronous on `stream`, as everything here.
template <typename T>
cudaError_t launch_backward_sums(const BackwardTensors<T>& t, const Shape& shape, const StatsPlan& plan,
                                 const BackwardParams& bn, const Epilogue& epilogue, double* partials,
                                 cudaStream_t stream);

// Merges partials, [splits][s1, s2][channels][inner], and writes what is made of them: gradients, and the buffer.
cudaError_t launch_backward_finish(const BackwardParams& bn, const double* partials, int64_t splits, int64_t inner,
                                   const BackwardBuffer& buffer, cudaStream_t stream);

// Writes dz and the residual's gradient, whichever is asked for. The affines are those of the buffer, or where that has no data
// those of `affine`.
template <typename T>
cudaError_t launch_backward_apply(const BackwardTensors<T>& t, const Shape& shape, const AffineTensors& affine,
                                  const BackwardBuffer& buffer, const Epilogue& epilogue, cudaStream_t stream);

}  // namespace fused_conv_bn
