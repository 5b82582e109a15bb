// max_pool2d on CUDA.
#include "kernels/pooling/launch.cuh"
#include "max_pool2d.h"

namespace fused_conv_bn {
namespace {

Tensor max_pool2d_cuda(Tensor input, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                       std::vector<int64_t> padding, std::vector<int64_t> dilation, bool ceil_mode) {
  const char* op = "max_pool2d";
  const MaxPoolArguments a = check_max_pool2d(op, input, kernel_size, stride, padding, dilation, ceil_mode);
  const Operand& x = a.input;
  const bool channels_last = computes_channels_last(x);
  const PoolProblem problem = pool_problem(op, x.sizes, channels_last, a.window);
  const int64_t sizes[] = {x.sizes[0], x.sizes[1], a.window[0].output, a.window[1].output};
  Tensor output = empty_strided(4, sizes, dense_strides(4, sizes, channels_last).data(), x.dtype, x.device);
  if (x.numel > 0) {
    OptionalTensor copy;
    const void* data = dense_data(x, dense_strides(x, channels_last), channels_last, copy);
    const CudaScope cuda(x.device);
    dispatch_dtype(x.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      cuda.check_launch(op, launch_max_pool(static_cast<const T*>(data), static_cast<T*>(output.data_ptr()), problem,
                                            multiprocessors(x.device.index), cuda.stream()));
    });
  }
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CUDA, m) { m.impl("max_pool2d", TORCH_BOX(&max_pool2d_cuda)); }

}  // namespace fused_conv_bn
