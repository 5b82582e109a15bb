// BatchNorm's backward on the GPU: which kernels run, in which memory, in which order.
#pragma once

#include <cuda_runtime.h>

#include "backward_launch.cuh"

namespace fused_conv_bn {

// A pass for the sums, their merge, and a pass for dz and the residual's gradient; each where it is needed.
template <typename T>
struct BnBackwardPlan {
  Shape shape;
  StatsPlan stats;
  bool gathers;  // the sums
  bool buffers;  // forward's affine and what the sums make of dz: in training, where nothing else has them
  bool applies;

  // For tensors that are dense with the given shape and not empty. given: there are sums already.
  static BnBackwardPlan make(const BackwardTensors<T>& t, const Shape& shape, const BackwardParams& bn, bool given,
                             int multiprocessors) {
    const bool applies = t.dz != nullptr || t.dresidual != nullptr;
    return {shape, plan_stats<T>(t.address(), shape, multiprocessors),
            bn.wants_sums() || (bn.trains() && t.dz != nullptr && !given), bn.trains() && applies, applies};
  }

  int64_t partials() const { return gathers ? 2 * stats.partials(shape) : 0; }
  // Doubles: the partials, then the buffer.
  int64_t workspace() const { return partials() + (buffers ? BackwardBuffer::kArrays * shape.channels : 0); }

  // affine: forward's, in evaluation. given: [s1, s2][channels], or nullptr.
  cudaError_t launch(const BackwardTensors<T>& t, const BackwardParams& bn, const AffineTensors& affine,
                     const Epilogue& epilogue, const double* given, double* workspace, cudaStream_t stream) const {
    const BackwardBuffer buffer{buffers ? workspace + partials() : nullptr, static_cast<uint32_t>(shape.channels),
                                kElement<T>};
    cudaError_t status = cudaSuccess;
    if (gathers) {
      status = launch_backward_sums(t, shape, stats, bn, epilogue, workspace, stream);
      if (status == cudaSuccess) {
        status = launch_backward_finish(bn, workspace, stats.splits, stats.inner, buffer, stream);
      }
    } else if (buffers) {
      status = launch_backward_finish(bn, given, given != nullptr ? 1 : 0, 1, buffer, stream);
    }
    if (status == cudaSuccess && applies) {
      status = launch_backward_apply(t, shape, affine, buffer, epilogue, stream);
    }
    return status;
  }
};

}  // namespace fused_conv_bn
