// BatchNorm in training mode on the GPU, from its input to its output: which kernels run, in which memory, in which order.
#pragma once

#include <cuda_runtime.h>

#include "kernels/elementwise/launch.cuh"
#include "launch.cuh"

namespace fused_conv_bn {

// A pass over the input for its statistics, their merge, and a pass that applies what comes of it.
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
    const AffineBuffer affines{workspace + stats.partials(shape) * kMomentsDoubles,
                               static_cast<uint32_t>(shape.channels), kElement<T>};
    cudaError_t status = launch_bn_stats(x, shape, stats, partials, stream);
    if (status == cudaSuccess) {
      status = launch_bn_finish(bn, partials, stats.splits, stats.inner, affines, stream);
    }
    if (status == cudaSuccess) {
      status = launch_scale_shift(x, residual, y, shape, affine_of_buffer<T>(affines.data, shape.channels), epilogue,
                                  stream);
    }
    return status;
  }
};

}  // namespace fused_conv_bn
