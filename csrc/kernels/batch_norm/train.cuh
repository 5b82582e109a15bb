// BatchNorm in training mode on the GPU, from its input to its output: which kernels run, in which memory, in which order.
#pragma once

#include <cuda_runtime.h>

#include "kernels/elementwise/launch.cuh"
#include "launch.cuh"

namespace fused_conv_bn {

// What follows when x's moments are there, [splits][channels][inner] of them: their merge, and a pass that applies what comes of
// it. affines: where that is kept, 3 values a channel. x: dense with the given shape. residual: nullptr for none. y may be x.
template <typename T>
cudaError_t launch_bn_normalise(const T* x, const T* residual, T* y, const Shape& shape, const Moments* partials,
                                int64_t splits, int64_t inner, void* affines, const TrainParams& bn,
                                const Epilogue& epilogue, cudaStream_t stream) {
  const AffineBuffer buffer{affines, static_cast<uint32_t>(shape.channels), kElement<T>};
  const cudaError_t status = launch_bn_finish(bn, partials, splits, inner, buffer, stream);
  if (status != cudaSuccess) {
    return status;
  }
  return launch_scale_shift(x, residual, y, shape, affine_of_buffer<T>(affines, shape.channels), epilogue, stream);
}

// A pass over the input for its statistics, and what follows.
template <typename T>
struct BnTrainPlan {
  Shape shape;
  StatsPlan stats;

  // For an x that is dense with the given shape and not empty.
  static BnTrainPlan make(const T* x, const Shape& shape, int multiprocessors) {
    return {shape, plan_stats<T>(x, shape, multiprocessors)};
  }

  // Doubles: the partials, then the affines.
  int64_t workspace() const { return stats.partials(shape) * kMomentsDoubles + 3 * shape.channels; }

  // x: as for make(). residual: nullptr for none. y may be x.
  cudaError_t launch(const T* x, const T* residual, T* y, const TrainParams& bn, const Epilogue& epilogue,
                     double* workspace, cudaStream_t stream) const {
    auto* const partials = reinterpret_cast<Moments*>(workspace);
    const cudaError_t status = launch_bn_stats(x, shape, stats, partials, stream);
    if (status != cudaSuccess) {
      return status;
    }
    return launch_bn_normalise(x, residual, y, shape, partials, stats.splits, stats.inner,
                               workspace + stats.partials(shape) * kMomentsDoubles, bn, epilogue, stream);
  }
};

}  // namespace fused_conv_bn
