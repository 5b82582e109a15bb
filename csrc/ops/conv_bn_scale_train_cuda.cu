// conv_bn_scale_train on CUDA, by the algorithm that conv_scale_shift would choose. hopper computes the convolution twice: once
// for its statistics, which writes nothing else, and once with the affine that comes of them. With the others the
// convolution is written, its statistics read, and then there is one pass in place.
#include "../kernels/conv_kernels.h"
#include "bn_scale_train.h"
#include "conv_bn_scale_train.h"
#include "conv_cuda.h"
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
    if (choice.config.algorithm == ConvAlgorithm::hopper) {
      return convolve_twice(op, c, bn, choice);
    }
    const Tensor y = convolve(op, c, choice);
    apply_bn_scale_train_cuda(op, Operand("output", y), bn);
    return y;
  }

  static Tensor convolve_twice(const char* op, const PlainConv& c, const TrainOperands& bn,
                               const CudaConvChoice& choice) {
    const CudaScope cuda(c.input.device);
    const ConvProblem& problem = choice.problem;
    const int64_t partials = hopper_partials(problem, choice.config.hopper_moments, choice.gpu);
    constexpr auto kDoubles = static_cast<int64_t>(sizeof(Moments) / sizeof(double));
    const int64_t doubles = partials * problem.K * kDoubles + 2 * problem.K, stride = 1;
    const Tensor memory = empty_strided(1, &doubles, &stride, ScalarType::Double, c.input.device);
    auto* const moments = static_cast<Moments*>(memory.data_ptr());
    auto* const affines = reinterpret_cast<float*>(moments + partials * problem.K);
    KernelConv conv(c, kHopperAlignment);
    const auto launch = [&](const HopperTile& tile, Moments* target) {
      dispatch_dtype(c.input.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if constexpr (sizeof(T) <= 4) {
          cuda.check_launch(op, launch_conv_hopper<T>(problem, conv.operands, tile, choice.gpu, Activation::none,
                                                      target, cuda.stream()));
        }
      });
    };
    launch(choice.config.hopper_moments, moments);
    finish_bn_cuda(op, bn, c.input.dtype, c.input.device, moments, partials, problem.K, affines);
    conv.operands.center = affines;
    conv.operands.scale = affines + problem.K;
    conv.operands.shift = affines + 2 * problem.K;
    launch(choice.config.hopper, nullptr);
    return conv.y;
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
