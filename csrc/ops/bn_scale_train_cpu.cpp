// bn_scale_train on the CPU: the statistics, then the elementwise kernel.
#include "../kernels/bn_stats_cpu.h"
#include "bn_scale_train.h"
#include "elementwise_cpu.h"

namespace fused_conv_bn {
namespace {

struct CpuKernel {
  template <typename T>
  static void run(const char*, const Elementwise& e, const TrainParams& params) {
    const auto parallel_for = [](int64_t begin, int64_t end, int64_t grain, const auto& body) {
      torch::stable::parallel_for(begin, end, grain, body);
    };
    const std::vector<Moments> moments = channel_moments(static_cast<const T*>(e.input), e.shape, parallel_for);
    std::vector<Affine<acc_t<T>>> affines;
    affines.reserve(moments.size());
    for (const Moments& m : moments) {
      const auto c = static_cast<uint32_t>(affines.size());
      affines.push_back(affine_cast<acc_t<T>>(finish_channel(params, channel_values(params, c), m, c, kElement<T>)));
    }
    run_elementwise_cpu<T, Activation::none, false>(e, [&](uint32_t c) { return affines[c]; });
  }
};

}  // namespace

void apply_bn_scale_train_cpu(const char* op, const Operand& x, const TrainOperands& bn) {
  BnScaleTrain<CpuKernel>::compute(op, x, bn, &x);
}

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CPU, m) {
  m.impl("bn_scale_train", TORCH_BOX(&BnScaleTrain<CpuKernel>::functional));
}

}  // namespace fused_conv_bn
