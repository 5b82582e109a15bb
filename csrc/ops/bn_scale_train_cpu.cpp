// bn_scale_train on the CPU: the statistics, then the elementwise kernel.
#include "bn_scale_train.h"
#include "kernels/batch_norm/train_cpu.h"

namespace fused_conv_bn {

void run_bn_scale_train_cpu(const char*, const Elementwise& e, ScalarType dtype, const TrainParams& params,
                            const Epilogue& epilogue) {
  const auto parallel_for = [](int64_t begin, int64_t end, int64_t grain, const auto& body) {
    torch::stable::parallel_for(begin, end, grain, body);
  };
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto affines = train_affines(static_cast<const T*>(e.input), e.shape, params, parallel_for);
    const acc_t<T>* center = affines.get();
    const ChannelAffines<acc_t<T>> channels{center, center + e.shape.channels, center + 2 * e.shape.channels};
    launch_scale_shift(static_cast<const T*>(e.input), static_cast<const T*>(e.residual),
                       static_cast<T*>(e.output.data_ptr()), e.fresh, e.shape, channels, epilogue, parallel_for);
  });
}

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CPU, m) {
  m.impl("bn_scale_train", TORCH_BOX(&BnScaleTrain<run_bn_scale_train_cpu>::plain));
  m.impl("bn_scale_train_stats", TORCH_BOX(&BnScaleTrain<run_bn_scale_train_cpu>::stats));
  m.impl("bn_scale_train_functional", TORCH_BOX(&BnScaleTrain<run_bn_scale_train_cpu>::functional));
}

}  // namespace fused_conv_bn
