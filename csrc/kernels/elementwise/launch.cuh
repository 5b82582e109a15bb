// What starts the elementwise kernels on the GPU: their code is in scale_shift.cuh, and compiled by instantiate_scale_shift.cu.
#pragma once

#include <cuda_runtime.h>

#include "kernels/batch_norm/fold.h"
#include "memory_format.h"

namespace fused_conv_bn {

// T: float, float16, bfloat16, double. input, residual and output are dense with the given shape; output may be input;
// residual: nullptr for none. Asynchronous on `stream`.
template <typename T>
cudaError_t launch_scale_shift(const T* input, const T* residual, T* output, const Shape& shape,
                               const AffineTensors& affine, const Epilogue& epilogue, cudaStream_t stream);

}  // namespace fused_conv_bn
