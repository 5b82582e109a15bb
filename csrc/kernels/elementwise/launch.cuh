// What starts the elementwise kernels on the GPU: their code is in scale_shift.cuh, and compiled by instantiate_scale_shift.cu.
#pragma once

#include <cuda_runtime.h>

#include "kernels/batch_norm/fold.h"
#include "memory_format.h"
#include "parts.h"

namespace fused_conv_bn {

// T: float, float16, bfloat16, double. input, residual and output are dense with the given shape; output may be input;
// residual: nullptr for none. Asynchronous on `stream`.
template <typename T>
cudaError_t launch_scale_shift(const T* input, const T* residual, T* output, const Shape& shape,
                               const AffineTensors& affine, const Epilogue& epilogue, cudaStream_t stream);

// The same of inputs that are concatenated over their channels, without a residual. shape: of the result.
template <typename T>
cudaError_t launch_cat(const Parts<T>& parts, T* output, const Shape& shape, const AffineTensors& affine,
                       const Epilogue& epilogue, cudaStream_t stream);

// epilogue(input * gate). gate: dense, an element for each channel of each image; pixels: of an image.
template <typename T>
cudaError_t launch_gate(const T* input, const T* gate, const T* residual, T* output, const Shape& shape, int64_t pixels,
                        const Epilogue& epilogue, cudaStream_t stream);

}  // namespace fused_conv_bn
