// bn_scale_train on CUDA (kernels/batch_norm/train.cuh).
#include "bn_scale_train.h"
#include "kernels/batch_norm/train.cuh"

namespace fused_conv_bn {

void run_bn_scale_train_cuda(const char* op, const Elementwise& e, ScalarType dtype, const TrainParams& params,
                             const Epilogue& epilogue) {
  const CudaScope cuda(e.device);
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* x = static_cast<const T*>(e.input);
    const auto plan = BnTrainPlan<T>::make(x, e.shape, multiprocessors(e.device.index));
    const Tensor workspace = make_workspace(plan.workspace(), e.device);
    cuda.check_launch(op, plan.launch(x, static_cast<const T*>(e.residual), static_cast<T*>(e.output.data_ptr()),
                                      params, epilogue, static_cast<double*>(workspace.data_ptr()), cuda.stream()));
  });
}

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CUDA, m) {
  m.impl("bn_scale_train", TORCH_BOX(&BnScaleTrain<run_bn_scale_train_cuda>::plain));
  m.impl("bn_scale_train_stats", TORCH_BOX(&BnScaleTrain<run_bn_scale_train_cuda>::stats));
  m.impl("bn_scale_train_functional", TORCH_BOX(&BnScaleTrain<run_bn_scale_train_cuda>::functional));
}

}  // namespace fused_conv_bn
