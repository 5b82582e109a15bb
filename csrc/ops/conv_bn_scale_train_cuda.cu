// conv_bn_scale_train on CUDA: the convolution by the algorithm that conv_scale_shift would choose, its statistics, then
// one pass in place.
#include "bn_scale_train.h"
#include "conv_bn_scale_train.h"
#include "conv_scale_shift.h"

namespace fused_conv_bn {
namespace {

Tensor channel_tensor(const PlainConv& c, double value) {
  const int64_t stride = 1;
  const Tensor t = empty_strided(1, &c.sizes[1], &stride, acc_dtype(c.input.dtype), c.input.device);
  return torch::stable::fill_(t, value);
}

struct CudaKernel {
  static Tensor run(const char* op, const PlainConv& c, const TrainOperands& bn, bool allow_tf32) {
    const CudaConvChoice choice = choose_conv_cuda(op, c, false, allow_tf32);
    const Tensor y = convolve(op, c, choice);
    apply_bn_scale_train_cuda(op, Operand("output", y), bn);
    return y;
  }

  static Tensor convolve(const char* op, const PlainConv& c, const CudaConvChoice& choice) {
    if (choice.config.algorithm == ConvAlgorithm::aten) {
      return plain_convolution(c, *c.weight.tensor, nullptr);
    }
    const Tensor ones = channel_tensor(c, 1), zeros = channel_tensor(c, 0);
    return run_conv_cuda(op, {c, Operand("scale", ones), Operand("shift", zeros), std::nullopt, Activation::none},
                         choice);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CUDA, m) {
  m.impl("conv_bn_scale_train", TORCH_BOX(&ConvBnScaleTrain<CudaKernel>::functional));
}

}  // namespace fused_conv_bn
