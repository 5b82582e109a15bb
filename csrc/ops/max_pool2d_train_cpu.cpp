// max_pool2d_train and max_pool2d_backward on the CPU (kernels/pooling/max_train_cpu.h).
#include "kernels/pooling/max_train_cpu.h"
#include "max_pool2d_train.h"

namespace fused_conv_bn {

namespace {

constexpr auto parallel_for = [](int64_t begin, int64_t end, int64_t grain, const auto& body) {
  torch::stable::parallel_for(begin, end, grain, body);
};

}  // namespace

void run_max_pool_train_cpu(const MaxPoolCall& call, const void* input, void* output, uint8_t* position) {
  dispatch_dtype(call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    max_pool_train(static_cast<const T*>(input), static_cast<T*>(output), position, call.problem, parallel_for);
  });
}

void run_max_pool_backward_cpu(const MaxPoolCall& call, const void* gradient, const uint8_t* position, void* result) {
  dispatch_dtype(call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    max_pool_backward(static_cast<const T*>(gradient), position, static_cast<T*>(result), call.problem, parallel_for);
  });
}

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CPU, m) {
  m.impl("max_pool2d_train", TORCH_BOX(&max_pool2d_train<run_max_pool_train_cpu>));
  m.impl("max_pool2d_backward", TORCH_BOX(&max_pool2d_backward<run_max_pool_backward_cpu>));
}

}  // namespace fused_conv_bn
