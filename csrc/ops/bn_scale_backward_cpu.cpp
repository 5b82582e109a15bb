// The backward of the elementwise ops, and the moments of channels, on the CPU.
#include "bn_scale_backward.h"
#include "kernels/batch_norm/backward_cpu.h"

namespace fused_conv_bn {

namespace {

constexpr auto parallel_for = [](int64_t begin, int64_t end, int64_t grain, const auto& body) {
  torch::stable::parallel_for(begin, end, grain, body);
};

}  // namespace

void run_backward_cpu(const BackwardCall& call) {
  dispatch_dtype(call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    run_backward(call.tensors<T>(), call.shape, call.bn, call.epilogue, call.given, parallel_for);
  });
}

void run_moments_cpu(const char*, const void* x, const Shape& shape, ScalarType dtype, const Device&, double* moments) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    reduce_channels(static_cast<const T*>(x), shape, parallel_for,
                    [&](int64_t first, int n, double count, const double* mean, const double* m2) {
                      std::fill_n(moments + first, n, count);
                      std::copy_n(mean, n, moments + shape.channels + first);
                      std::copy_n(m2, n, moments + 2 * shape.channels + first);
                    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CPU, m) {
  m.impl("bn_scale_backward", TORCH_BOX(&BnScaleBackward<run_backward_cpu>::all));
  m.impl("bn_scale_backward_sums", TORCH_BOX(&BnScaleBackward<run_backward_cpu>::sums));
  m.impl("bn_scale_backward_apply", TORCH_BOX(&BnScaleBackward<run_backward_cpu>::apply));
  m.impl("bn_moments", TORCH_BOX(&bn_moments<run_moments_cpu>));
}

}  // namespace fused_conv_bn
