// max_pool2d on the CPU: PyTorch's.
#include "max_pool2d.h"

namespace fused_conv_bn {
namespace {

Tensor max_pool2d_cpu(Tensor input, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                      std::vector<int64_t> padding, std::vector<int64_t> dilation, bool ceil_mode) {
  const MaxPoolArguments a = check_max_pool2d("max_pool2d", input, kernel_size, stride, padding, dilation, ceil_mode);
  const auto both = [&](int64_t PoolWindow::* value) {
    return std::vector<int64_t>{a.window[0].*value, a.window[1].*value};
  };
  return torch_max_pool2d(input, both(&PoolWindow::kernel), both(&PoolWindow::stride), both(&PoolWindow::padding),
                          both(&PoolWindow::dilation), ceil_mode);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CPU, m) { m.impl("max_pool2d", TORCH_BOX(&max_pool2d_cpu)); }

}  // namespace fused_conv_bn
