// The backward of the elementwise ops, and the moments of channels, on CUDA (kernels/batch_norm/backward.cuh).
#include "bn_scale_backward.h"
#include "bn_scale_train.h"
#include "kernels/batch_norm/backward.cuh"
#include "kernels/batch_norm/launch.cuh"

namespace fused_conv_bn {

void run_backward_cuda(const BackwardCall& call) {
  const CudaScope cuda(call.device);
  dispatch_dtype(call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto tensors = call.tensors<T>();
    const auto plan = BnBackwardPlan<T>::make(tensors, call.shape, call.bn, call.given != nullptr,
                                              multiprocessors(call.device.index));
    OptionalTensor workspace;
    double* memory = nullptr;
    if (plan.workspace() > 0) {
      workspace = make_workspace(plan.workspace(), call.device);
      memory = static_cast<double*>(workspace->data_ptr());
    }
    cuda.check_launch(call.op,
                      plan.launch(tensors, call.bn, call.affine, call.epilogue, call.given, memory, cuda.stream()));
  });
}

void run_moments_cuda(const char* op, const void* data, const Shape& shape, ScalarType dtype, const Device& device,
                      double* moments) {
  const CudaScope cuda(device);
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* x = static_cast<const T*>(data);
    const StatsPlan plan = plan_stats<T>(x, shape, multiprocessors(device.index));
    const Tensor workspace = make_workspace(plan.partials(shape) * kMomentsDoubles, device);
    auto* const partials = reinterpret_cast<Moments*>(workspace.data_ptr());
    cudaError_t status = launch_bn_stats(x, shape, plan, partials, cuda.stream());
    if (status == cudaSuccess) {
      status = launch_bn_moments(partials, plan.splits, plan.inner, moments, shape.channels, cuda.stream());
    }
    cuda.check_launch(op, status);
  });
}

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CUDA, m) {
  m.impl("bn_scale_backward", TORCH_BOX(&BnScaleBackward<run_backward_cuda>::all));
  m.impl("bn_scale_backward_sums", TORCH_BOX(&BnScaleBackward<run_backward_cuda>::sums));
  m.impl("bn_scale_backward_apply", TORCH_BOX(&BnScaleBackward<run_backward_cuda>::apply));
  m.impl("bn_moments", TORCH_BOX(&bn_moments<run_moments_cuda>));
}

}  // namespace fused_conv_bn
