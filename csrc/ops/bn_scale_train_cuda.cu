// bn_scale_train on CUDA: the statistics, their merge, then the elementwise kernel.
#include "bn_scale_train.h"
#include "bn_stats_cuda.h"

namespace fused_conv_bn {

void run_bn_scale_train_cuda(const char* op, const Elementwise& e, ScalarType dtype, const TrainParams& params,
                             const Epilogue& epilogue) {
  const CudaScope cuda(e.device);
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* x = static_cast<const T*>(e.input);
    const StatsPlan plan = plan_stats<T>(x, e.shape, multiprocessors(e.device.index));
    const StatsWorkspace w = make_stats_workspace(plan.partials(e.shape), e.shape.channels, kElement<T>, e.device);
    cuda.check_launch(op, launch_bn_stats(x, e.shape, plan, w.partials, cuda.stream()));
    cuda.check_launch(op, launch_bn_finish(params, w.partials, plan.splits, plan.inner, w.affines, cuda.stream()));
    run_elementwise_cuda(op, e, dtype, affine_of_buffer<T>(w.affines.data, e.shape.channels), epilogue);
  });
}

void finish_bn_cuda(const char* op, const TrainParams& params, ScalarType dtype, const Device& device,
                    const Moments* moments, int64_t count, int64_t channels, float* affines) {
  const CudaScope cuda(device);
  dispatch_dtype(dtype, [&](auto tag) {
    const AffineBuffer buffer{affines, static_cast<uint32_t>(channels), kElement<typename decltype(tag)::type>};
    cuda.check_launch(op, launch_bn_finish(params, moments, count, 1, buffer, cuda.stream()));
  });
}

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CUDA, m) {
  m.impl("bn_scale_train", TORCH_BOX(&BnScaleTrain<run_bn_scale_train_cuda>::plain));
  m.impl("bn_scale_train_stats", TORCH_BOX(&BnScaleTrain<run_bn_scale_train_cuda>::stats));
  m.impl("bn_scale_train_functional", TORCH_BOX(&BnScaleTrain<run_bn_scale_train_cuda>::functional));
}

}  // namespace fused_conv_bn
