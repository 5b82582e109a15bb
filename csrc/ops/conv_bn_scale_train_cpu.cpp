// conv_bn_scale_train on the CPU: the convolution of conv_scale_shift, its statistics, then one pass in place.
#include "conv_bn_scale_train.h"
#include "conv_direct_cpu.h"

namespace fused_conv_bn {
namespace {

struct CpuKernel {
  static Tensor run(const char* op, const PlainConv& c, const TrainOperands& bn, const SavedStatistics* saved,
                    const OptionalOperand& residual, const Epilogue& epilogue, bool) {
    const std::optional<Tensor> direct = direct_convolution({c, {}, std::nullopt, {}},
                                                            choose_conv_cpu(c, residual.has_value(), true));
    const Tensor y = direct.has_value() ? *direct : plain_convolution(c);
    return normalise_convolution<run_bn_scale_train_cpu>(op, y, bn, saved, residual, epilogue);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CPU, m) {
  m.impl("conv_bn_scale_train", TORCH_BOX(&ConvBnScaleTrain<CpuKernel>::plain));
  m.impl("conv_bn_scale_train_stats", TORCH_BOX(&ConvBnScaleTrain<CpuKernel>::stats));
  m.impl("conv_bn_scale_train_functional", TORCH_BOX(&ConvBnScaleTrain<CpuKernel>::functional));
}

}  // namespace fused_conv_bn
