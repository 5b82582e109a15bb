// conv_bn_scale_train on the CPU: the convolution of conv_scale_shift, its statistics, then one pass in place.
#include "bn_scale_train.h"
#include "conv_bn_scale_train.h"
#include "conv_direct_cpu.h"
#include "conv_scale_shift.h"

namespace fused_conv_bn {
namespace {

struct CpuKernel {
  static Tensor run(const char* op, const PlainConv& c, const TrainOperands& bn, bool) {
    const Tensor y = plain(c);
    apply_bn_scale_train_cpu(op, Operand("output", y), bn);
    return y;
  }

 private:
  static Tensor plain(const PlainConv& c) {
    const std::vector<float> ones(c.sizes[1], 1.0f), zeros(c.sizes[1], 0.0f);
    const std::optional<Tensor> direct = direct_convolution(c, ones.data(), zeros.data(), std::nullopt,
                                                            Activation::none);
    return direct.has_value() ? *direct : plain_convolution(c, *c.weight.tensor, nullptr);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CPU, m) {
  m.impl("conv_bn_scale_train", TORCH_BOX(&ConvBnScaleTrain<CpuKernel>::functional));
}

}  // namespace fused_conv_bn
