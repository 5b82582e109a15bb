// An affine and an epilogue element by element, for what has no vectors: inputs that are concatenated or gated, with odd channel
// counts, misaligned, or with images of more than 2^30 elements.
#pragma once

#include "parts.h"
#include "scale_shift.cuh"

namespace fused_conv_bn {

template <typename T>
struct AnyParams {
  Parts<T> input;
  const T* residual;  // nullptr: none
  T* output;
  Shape shape;
  int64_t pixels;  // of an image, which has affines of its own; 0: images share theirs
  AffineSource<T> source;
  Activation activation;
  bool residual_last;
  acc_t<T> negative_slope;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) scale_shift_any_kernel(const AnyParams<T> p) {
  wait_for_previous();
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t e = int64_t{blockIdx.x} * kThreads + threadIdx.x; e < p.shape.numel; e += step) {
    const int64_t plane = e / p.shape.inner;
    const int64_t row = plane / p.shape.channels;
    const auto c = static_cast<uint32_t>(plane - row * p.shape.channels);
    const int64_t image = p.pixels == 0 ? 0 : row / p.pixels;
    const T* data = p.input.plane(row, c, p.shape.inner) + (e - plane * p.shape.inner);
    const auto affine = p.source.at(static_cast<uint32_t>(image * p.shape.channels + c));
    acc_t<T> x[1] = {apply_affine(to_acc(*data), affine)};
    const acc_t<T> residual = p.residual == nullptr ? 0 : to_acc(p.residual[e]);
    if (p.residual != nullptr && !p.residual_last) {
      x[0] += residual;
    }
    activate_all<T, false>(p.activation, p.negative_slope, x);
    if (p.residual != nullptr && p.residual_last) {
      x[0] += residual;
    }
    p.output[e] = from_acc<T>(x[0]);
  }
}

template <typename T>
cudaError_t launch_any(const Parts<T>& input, const T* residual, T* output, const Shape& shape, int64_t pixels,
                       const AffineSource<T>& source, const Epilogue& epilogue, cudaStream_t stream) {
  const AnyParams<T> p{input,
                       residual,
                       output,
                       shape,
                       pixels,
                       source,
                       epilogue.activation,
                       epilogue.residual_last,
                       static_cast<acc_t<T>>(epilogue.negative_slope)};
  const auto threads = static_cast<uint32_t>(std::min(shape.numel, kMaxLaunchElements));
  return launch_threads(scale_shift_any_kernel<T>, threads, 1, stream, p);
}

}  // namespace fused_conv_bn
