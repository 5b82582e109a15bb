// max_pool2d_train and max_pool2d_backward on CUDA (kernels/pooling/).
#include "kernels/pooling/launch.cuh"
#include "max_pool2d_train.h"

namespace fused_conv_bn {

void run_max_pool_train_cuda(const MaxPoolCall& call, const void* input, void* output, uint8_t* position) {
  const CudaScope cuda(call.device);
  dispatch_dtype(call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    cuda.check_launch(call.op, launch_max_pool_train(static_cast<const T*>(input), static_cast<T*>(output), position,
                                                     call.problem, multiprocessors(call.device.index), cuda.stream()));
  });
}

void run_max_pool_backward_cuda(const MaxPoolCall& call, const void* gradient, const uint8_t* position, void* result) {
  const CudaScope cuda(call.device);
  dispatch_dtype(call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    cuda.check_launch(call.op,
                      launch_max_pool_backward(static_cast<const T*>(gradient), position, static_cast<T*>(result),
                                               call.problem, multiprocessors(call.device.index), cuda.stream()));
  });
}

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CUDA, m) {
  m.impl("max_pool2d_train", TORCH_BOX(&max_pool2d_train<run_max_pool_train_cuda>));
  m.impl("max_pool2d_backward", TORCH_BOX(&max_pool2d_backward<run_max_pool_backward_cuda>));
}

}  // namespace fused_conv_bn
