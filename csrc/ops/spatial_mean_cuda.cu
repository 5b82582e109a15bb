// spatial_mean on CUDA.
#include "kernels/pooling/launch.cuh"
#include "spatial_mean.h"

namespace fused_conv_bn {

Tensor spatial_mean_cuda(Tensor input, bool keepdim) {
  const char* op = "spatial_mean";
  const Operand x = check_spatial_mean(input);
  const int64_t sizes[kMaxDim] = {x.sizes[0], x.sizes[1], 1, 1, 1};
  const int64_t dim = keepdim ? x.dim : 2;
  Tensor output = empty_strided(dim, sizes, dense_strides(dim, sizes, false).data(), x.dtype, x.device);
  const int64_t planes = x.sizes[0] * x.sizes[1];
  if (planes > 0) {
    const bool channels_last = computes_channels_last(x);
    OptionalTensor copy;
    const void* data = dense_data(x, dense_strides(x, channels_last), channels_last, copy);
    const int64_t channels = channels_last ? x.sizes[1] : 1;
    const CudaScope cuda(x.device);
    dispatch_dtype(x.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      cuda.check_launch(
          op, launch_spatial_mean(static_cast<const T*>(data), static_cast<T*>(output.data_ptr()), planes / channels,
                                  x.numel / planes, channels, multiprocessors(x.device.index), cuda.stream()));
    });
  }
  return output;
}

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CUDA, m) { m.impl("spatial_mean", TORCH_BOX(&spatial_mean_cuda)); }

}  // namespace fused_conv_bn
