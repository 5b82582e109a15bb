// conv_bn_scale_train on the CPU: PyTorch's convolution, its statistics, then one pass in place.
#include "bn_scale_train.h"
#include "conv_bn_scale_train.h"
#include "conv_scale_shift.h"

namespace fused_conv_bn {
namespace {

struct CpuKernel {
  static Tensor run(const char* op, const PlainConv& c, const TrainOperands& bn, bool) {
    const Tensor y = plain_convolution(c, *c.weight.tensor, nullptr);
    apply_bn_scale_train_cpu(op, Operand("output", y), bn);
    return y;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CPU, m) {
  m.impl("conv_bn_scale_train", TORCH_BOX(&ConvBnScaleTrain<CpuKernel>::functional));
}

}  // namespace fused_conv_bn
