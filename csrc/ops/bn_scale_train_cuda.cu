// bn_scale_train on CUDA: the statistics, their merge, then the elementwise kernel; or one kernel for all of it.
#include "bn_scale_train.h"
#include "bn_stats_cuda.h"
#include "elementwise_cuda.h"

namespace fused_conv_bn {
namespace {

struct CudaKernel {
  template <typename T>
  static void run(const char* op, const Elementwise& e, const TrainParams<T>& params) {
    const CudaScope cuda(e.device);
    const T* x = static_cast<const T*>(e.input);
    T* y = static_cast<T*>(e.output.data_ptr());
    const StatsPlan plan = plan_stats<T>(x, y, e.shape, multiprocessors(e.device.index));
    if (plan.channel) {
      cuda.check_launch(op, launch_bn_train_channel(x, y, e.shape, plan, params, cuda.stream()));
      return;
    }
    const StatsWorkspace<T> w = make_stats_workspace<T>(plan.partials(e.shape), e.shape.channels, e.device);
    cuda.check_launch(op, launch_bn_stats(x, e.shape, plan, w.partials, cuda.stream()));
    cuda.check_launch(op, launch_bn_finish(params, w.partials, plan.splits, plan.inner, w.affines, cuda.stream()));
    run_elementwise_cuda<T, Activation::none, false>(op, e, make_batch_source(w.affines));
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
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(T) <= 4) {
      cuda.check_launch(
          op, launch_bn_finish(train_params<T>(bn, dtype), moments, count, 1, {affines, channels}, cuda.stream()));
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CUDA, m) {
  m.impl("bn_scale_train", TORCH_BOX(&BnScaleTrain<CudaKernel>::functional));
}

}  // namespace fused_conv_bn
