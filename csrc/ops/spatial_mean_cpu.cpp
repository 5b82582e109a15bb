// spatial_mean on the CPU: PyTorch's mean.
#include "spatial_mean.h"

namespace fused_conv_bn {

Tensor spatial_mean_cpu(Tensor input, bool keepdim) {
  const Operand x = check_spatial_mean(input);
  std::vector<int64_t> dims;
  for (int64_t d = 2; d < x.dim; ++d) {
    dims.push_back(d);
  }
  return torch::stable::contiguous(torch_mean(input, dims, keepdim));
}

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CPU, m) { m.impl("spatial_mean", TORCH_BOX(&spatial_mean_cpu)); }

}  // namespace fused_conv_bn
