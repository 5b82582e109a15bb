// out = epilogue(input * gate), with a gate for each channel of each image: what squeeze-and-excite blocks end with.
//
// The gate is a scale. Contiguous, each plane has its own, and an image is as good as more channels; with channels innermost it
// is what scale_shift's columns kernel computes, image by image.
#pragma once

#include "scale_shift_any.cuh"

namespace fused_conv_bn {

template <bool kResidual, bool kBounds, typename T>
cudaError_t launch_gate_columns(const T* input, const T* gate, const T* residual, T* output, const Shape& shape,
                                int64_t pixels, const Epilogue& epilogue, cudaStream_t stream) {
  constexpr int V = Vec<T>::kSize, kRows = kColumnRows<T>;
  const int64_t image = pixels * shape.channels;
  const int64_t images = std::min<int64_t>(65535, kMaxLaunchElements / image);  // in one launch
  AffineTensors affine;
  affine.wide = std::is_same_v<T, acc_t<T>>;
  int64_t count = 0;
  for (int64_t begin = 0; begin < shape.numel; begin += count) {
    count = std::min(shape.numel - begin, images * image);
    affine.weight = gate + begin / pixels;
    auto p = make_params(input, residual, output, shape, begin, count, AffineSource<T>(affine), epilogue);
    p.image_vectors = static_cast<uint32_t>(image / V);
    const uint32_t threads = set_columns(p, shape.channels, p.image_vectors, kRows);
    const cudaError_t status = launch_threads(scale_shift_columns_kernel<T, kResidual, kBounds, false, kRows>, threads,
                                              static_cast<uint32_t>(count / image), stream, p);
    if (status != cudaSuccess) {
      return status;
    }
  }
  return cudaSuccess;
}

// pixels: of an image. gate: (images, channels), dense.
template <typename T>
cudaError_t launch_gate(const T* input, const T* gate, const T* residual, T* output, const Shape& shape, int64_t pixels,
                        const Epilogue& epilogue, cudaStream_t stream) {
  AffineTensors affine;
  affine.weight = gate;
  affine.wide = std::is_same_v<T, acc_t<T>>;
  if (shape.inner != 1 || pixels == 1) {
    const Shape planes{shape.numel, shape.numel / shape.inner, shape.inner};
    return launch_scale_shift(input, residual, output, planes, affine, epilogue, stream);
  }
  const bool by_vector = shape.channels % Vec<T>::kSize == 0 && misalignment(output) == 0;
  if (!by_vector || pixels * shape.channels > kMaxLaunchElements) {
    Parts<T> whole;
    whole.count = 1;
    whole.data[0] = input;
    whole.first[0] = 0;
    whole.first[1] = static_cast<uint32_t>(shape.channels);
    return launch_any(whole, residual, output, shape, pixels, AffineSource<T>(affine), epilogue, stream);
  }
  const auto with = [&](auto has_residual, auto bounds) {
    return launch_gate_columns<has_residual(), bounds()>(input, gate, residual, output, shape, pixels, epilogue,
                                                         stream);
  };
  const auto with_residual = [&](auto has_residual) {
    return is_bound(epilogue.activation) ? with(has_residual, std::true_type{}) : with(has_residual, std::false_type{});
  };
  return residual != nullptr ? with_residual(std::true_type{}) : with_residual(std::false_type{});
}

}  // namespace fused_conv_bn
