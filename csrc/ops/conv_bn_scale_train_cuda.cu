// conv_bn_scale_train on CUDA, by the algorithm that conv_scale_shift would choose (kernels/conv/train.cuh). Behind PyTorch's
// convolution its statistics are read, and then there is one pass in place.
#include "conv_bn_scale_train.h"
#include "conv_cuda.h"
#include "kernels/conv/train.cuh"

namespace fused_conv_bn {
namespace {

struct CudaKernel {
  static Tensor run(const char* op, const PlainConv& c, const TrainOperands& bn, SavedStatistics* saved,
                    const OptionalOperand& residual, const Epilogue& epilogue, bool allow_tf32) {
    const bool keeps_sums = saved != nullptr && saved->input_sums.has_value();
    const CudaConvChoice choice = choose_conv_cuda(op, c, residual.has_value(), true, allow_tf32, keeps_sums);
    if (std::holds_alternative<Aten>(choice.plan)) {
      return normalise_convolution<run_bn_scale_train_cuda>(op, plain_convolution(c), bn, saved, residual, epilogue);
    }
    return run_plan(op, c, bn, saved, residual, epilogue, choice);
  }

  // An algorithm of this package.
  static Tensor run_plan(const char* op, const PlainConv& c, const TrainOperands& bn, SavedStatistics* saved,
                         const OptionalOperand& residual, const Epilogue& epilogue, const CudaConvChoice& choice) {
    const CudaScope cuda(c.input.device);
    KernelConv conv(c, requirements_of(choice.plan, choice.problem));
    dispatch_dtype(c.input.dtype, [&]<typename T>(TypeTag<T>) {
      if constexpr (sizeof(T) <= 4) {  // none is for float64
        const auto plan = ConvTrainPlan<T>::make(choice, choice.problem, choice.gpu, static_cast<T*>(conv.operands.y));
        const Tensor workspace = make_workspace(plan.workspace(choice.problem), c.input.device);
        // Elementwise kernels take any alignment.
        DenseCopies any(1);
        DenseCopies& copies = plan.in_place ? any : conv.copies;
        conv.operands.residual = residual.has_value() ? copies.data(*residual, conv.channels_last) : nullptr;
        double* input_sums = nullptr;
        if (saved != nullptr && saved->input_sums.has_value() && plan.from_input.has_value()) {
          saved->input_sums = make_workspace(FromInputSm90::kSums, c.input.device);
          input_sums = static_cast<double*>(saved->input_sums->data_ptr());
        }
        const ConvCall call{choice.problem, conv.operands, choice.gpu, epilogue};
        cuda.check_launch(op, plan.launch(call, train_params(bn, saved), static_cast<double*>(workspace.data_ptr()),
                                          cuda.stream(), input_sums));
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
  m.impl("_conv_bn_scale_train_sums", TORCH_BOX(&ConvBnScaleTrain<CudaKernel>::sums));
}

}  // namespace fused_conv_bn
