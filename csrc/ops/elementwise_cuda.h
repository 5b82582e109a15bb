// How the elementwise ops reach the CUDA kernels.
#pragma once

#include "../checks.h"
#include "../kernels/scale_shift.cuh"

namespace fused_conv_bn {

template <typename T, Activation A, bool kResidual, typename Source>
void run_elementwise_cuda(const char* op, const Elementwise& e, const Source& source) {
  const CudaScope cuda(e.device);
  const cudaError_t status = launch_scale_shift<A, kResidual>(
      static_cast<const T*>(e.input), static_cast<const T*>(e.residual), static_cast<T*>(e.output.data_ptr()), e.shape,
      source, cuda.stream());
  cuda.check_launch(op, status);
}

// The affine of each channel, as three arrays in a row: center, scale and shift. T is one of dtype.h's.
template <typename T>
void apply_affines_cuda(const char* op, const Elementwise& e, const acc_t<T>* affines);

}  // namespace fused_conv_bn
