// conv_bn_scale_train on CUDA, by the algorithm that conv_scale_shift would choose. With hopper the statistics come first, from
// sums over the input, or from a pass that computes the convolution and writes nothing; then comes the convolution with
// the affine that they make. With the others the convolution is written, its statistics read, and then there is
// one pass in place.
#include "../kernels/conv_kernels.h"
#include "conv_bn_scale_train.h"
#include "conv_cuda.h"

namespace fused_conv_bn {
namespace {

struct CudaKernel {
  static Tensor run(const char* op, const PlainConv& c, const TrainOperands& bn, const SavedStatistics* saved,
                    const OptionalOperand& residual, const Epilogue& epilogue, bool allow_tf32) {
    const CudaConvChoice choice = choose_conv_cuda(op, c, residual.has_value(), true, allow_tf32);
    if (choice.config.algorithm == ConvAlgorithm::hopper) {
      return statistics_first(op, c, bn, saved, residual, epilogue, choice);
    }
    const Tensor y = run_conv_cuda(op, {c, {}, std::nullopt, {}}, choice);
    const Operand result("output", y);
    return apply_bn_scale_train<run_bn_scale_train_cuda>(op, result, bn, saved, residual, epilogue, &result);
  }

  static Tensor statistics_first(const char* op, const PlainConv& c, const TrainOperands& bn,
                                 const SavedStatistics* saved, const OptionalOperand& residual,
                                 const Epilogue& epilogue, const CudaConvChoice& choice) {
    const CudaScope cuda(c.input.device);
    const ConvProblem& problem = choice.problem;
    const ConvConfig& config = choice.config;
    const bool by_patches = config.statistics == ConvStatistics::patches;
    const PatchPlan plan = by_patches ? plan_patches(problem, choice.gpu) : PatchPlan{};
    const int64_t partials = by_patches ? 0 : hopper_partials(problem, config.hopper_moments, choice.gpu);
    // The affines, then sums or moments.
    constexpr auto kDoubles = static_cast<int64_t>(sizeof(Moments) / sizeof(double));
    const int64_t affine_doubles = 2 * problem.K, stride = 1;
    const int64_t doubles = affine_doubles + (by_patches ? patches_workspace(plan) : partials * problem.K * kDoubles);
    const Tensor memory = empty_strided(1, &doubles, &stride, ScalarType::Double, c.input.device);
    auto* const affines = static_cast<float*>(memory.data_ptr());
    auto* const workspace = static_cast<double*>(memory.data_ptr()) + affine_doubles;
    KernelConv conv(c, kHopperAlignment, true);
    const auto launch = [&](const auto& kernel) {
      dispatch_dtype(c.input.dtype, [&](auto tag) {
        if constexpr (sizeof(typename decltype(tag)::type) <= 4) {
          cuda.check_launch(op, kernel(tag));
        }
      });
    };
    const TrainParams params = train_params(bn, saved, true);
    const auto convolve = [&](const HopperTile& tile, Moments* target, const Epilogue& behind) {
      launch([&](auto tag) {
        return launch_conv_hopper<typename decltype(tag)::type>(problem, conv.operands, tile, choice.gpu, behind,
                                                                target, cuda.stream());
      });
    };
    if (by_patches) {
      launch([&](auto tag) {
        using T = typename decltype(tag)::type;
        const AffineBuffer buffer{affines, static_cast<uint32_t>(problem.K), kElement<T>};
        return launch_conv_patches<T>(problem, conv.operands, plan, workspace, params, buffer, cuda.stream());
      });
    } else {
      auto* const moments = reinterpret_cast<Moments*>(workspace);
      convolve(config.hopper_moments, moments, {});
      finish_bn_cuda(op, params, c.input.dtype, c.input.device, moments, partials, problem.K, affines);
    }
    conv.operands.affine.mean = affines;
    conv.operands.affine.weight = affines + problem.K;
    conv.operands.affine.bias = affines + 2 * problem.K;
    conv.operands.late_affine = true;
    conv.operands.residual = residual.has_value() ? conv.copies.data(*residual, conv.channels_last) : nullptr;
    convolve(config.hopper, nullptr, epilogue);
    return conv.y;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CUDA, m) {
  m.impl("conv_bn_scale_train", TORCH_BOX(&ConvBnScaleTrain<CudaKernel>::plain));
  m.impl("conv_bn_scale_train_stats", TORCH_BOX(&ConvBnScaleTrain<CudaKernel>::stats));
  m.impl("conv_bn_scale_train_functional", TORCH_BOX(&ConvBnScaleTrain<CudaKernel>::functional));
}

}  // namespace fused_conv_bn
