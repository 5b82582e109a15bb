// bn_scale_train on CUDA: the statistics, their merge, then the elementwise kernel.
#include "bn_scale_train.h"
#include "bn_stats_cuda.h"
#include "elementwise_cuda.h"

namespace fused_conv_bn {
namespace {

struct CudaKernel {
  template <typename T>
  static void run(const char* op, const Elementwise& e, const TrainParams& params) {
    const CudaScope cuda(e.device);
    const T* x = static_cast<const T*>(e.input);
    const StatsPlan plan = plan_stats<T>(x, e.shape, multiprocessors(e.device.index));
    const StatsWorkspace w = make_stats_workspace(plan.partials(e.shape), e.shape.channels, kElement<T>, e.device);
    cuda.check_launch(op, launch_bn_stats(x, e.shape, plan, w.partials, cuda.stream()));
    cuda.check_launch(op, launch_bn_finish(params, w.partials, plan.splits, plan.inner, w.affines, cuda.stream()));
    apply_affines_cuda<T>(op, e, static_cast<const acc_t<T>*>(w.affines.data));
  }
};

}  // namespace

void apply_bn_scale_train_cuda(const char* op, const Operand& x, const TrainOperands& bn) {
  BnScaleTrain<CudaKernel>::compute(op, x, bn, &x);
}

void finish_bn_cuda(const char* op, const TrainOperands& bn, ScalarType dtype, const Device& device,
                    const Moments* moments, int64_t count, int64_t channels, float* affines) {
  const CudaScope cuda(device);
  dispatch_dtype(dtype, [&](auto tag) {
    const AffineBuffer buffer{affines, static_cast<uint32_t>(channels), kElement<typename decltype(tag)::type>};
    cuda.check_launch(op, launch_bn_finish(train_params(bn, true), moments, count, 1, buffer, cuda.stream()));
  });
}

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CUDA, m) {
  m.impl("bn_scale_train", TORCH_BOX(&BnScaleTrain<CudaKernel>::functional));
}

}  // namespace fused_conv_bn
