// conv_bn_scale_train on CUDA, by the algorithm that conv_scale_shift would choose. With an algorithm that gathers moments
// the statistics come first, from
// sums over the input, or from a pass that computes the convolution and writes nothing; then comes the convolution with
// the affine that they make. With the others the convolution is written, its statistics read, and then there is
// one pass in place.
#include "conv_bn_scale_train.h"
#include "conv_cuda.h"

namespace fused_conv_bn {
namespace {

struct CudaKernel {
  static Tensor run(const char* op, const PlainConv& c, const TrainOperands& bn, const SavedStatistics* saved,
                    const OptionalOperand& residual, const Epilogue& epilogue, bool allow_tf32) {
    const CudaConvChoice choice = choose_conv_cuda(op, c, residual.has_value(), true, allow_tf32);
    return std::visit(
        [&]<typename Plan>(const Plan& plan) {
          if constexpr (Plan::kGathersMoments) {
            return statistics_first(op, c, bn, saved, residual, epilogue, choice, plan);
          } else {
            const Tensor y = run_conv_cuda(op, {c, {}, std::nullopt, {}}, choice);
            const Operand result("output", y);
            return apply_bn_scale_train<run_bn_scale_train_cuda>(op, result, bn, saved, residual, epilogue, &result);
          }
        },
        choice.choice.plan);
  }

  template <typename Plan>
  static Tensor statistics_first(const char* op, const PlainConv& c, const TrainOperands& bn,
                                 const SavedStatistics* saved, const OptionalOperand& residual,
                                 const Epilogue& epilogue, const CudaConvChoice& choice, const Plan& plan) {
    const CudaScope cuda(c.input.device);
    const Conv2d& problem = choice.problem;
    const bool from_input = choice.choice.statistics == ConvStatistics::from_input;
    const PatchPlan sums = from_input ? plan_patches(problem, choice.gpu) : PatchPlan{};
    const int64_t partials = from_input ? 0 : plan.partials(problem, choice.gpu);
    // The affines, then sums or moments.
    constexpr auto kDoubles = static_cast<int64_t>(sizeof(Moments) / sizeof(double));
    const int64_t affine_doubles = 2 * problem.K, stride = 1;
    const int64_t doubles = affine_doubles + (from_input ? patches_workspace(sums) : partials * problem.K * kDoubles);
    const Tensor memory = empty_strided(1, &doubles, &stride, ScalarType::Double, c.input.device);
    auto* const affines = static_cast<float*>(memory.data_ptr());
    auto* const workspace = static_cast<double*>(memory.data_ptr()) + affine_doubles;
    auto* const moments = reinterpret_cast<Moments*>(workspace);
    KernelConv conv(c, plan.requirements(problem));
    const TrainParams params = train_params(bn, saved, true);
    dispatch_dtype(c.input.dtype, [&]<typename T>(TypeTag<T>) {
      if constexpr (sizeof(T) <= 4) {
        if (from_input) {
          const AffineBuffer buffer{affines, static_cast<uint32_t>(problem.K), kElement<T>};
          cuda.check_launch(
              op, launch_conv_patches<T>(problem, conv.operands, sums, workspace, params, buffer, cuda.stream()));
        } else {
          const ConvCall call{problem, conv.operands, choice.gpu, Epilogue{}};
          cuda.check_launch(op, plan.template launch_moments<T>(call, moments, cuda.stream()));
          finish_bn_cuda(op, params, c.input.dtype, c.input.device, moments, partials, problem.K, affines);
        }
        conv.operands.affine.mean = affines;
        conv.operands.affine.weight = affines + problem.K;
        conv.operands.affine.bias = affines + 2 * problem.K;
        conv.operands.late_affine = true;
        conv.operands.residual = residual.has_value() ? conv.copies.data(*residual, conv.channels_last) : nullptr;
        const ConvCall call{problem, conv.operands, choice.gpu, epilogue};
        cuda.check_launch(op, plan.template launch<T>(call, cuda.stream()));
      }
    });
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
