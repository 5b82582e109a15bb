// bn_scale, bn_scale.out and bn_scale_ on the CPU.
#include "bn_scale.h"
#include "elementwise_cpu.h"

namespace fused_conv_bn {
namespace {

struct CpuKernel {
  template <typename T, typename P>
  static void run(const char*, const Elementwise& e, const BnParams<P>& params) {
    const auto affine_of = [&](uint32_t c) { return fold_channel<T>(params, c); };
    run_elementwise_cpu<T, Activation::none, false>(e, affine_of);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CPU, m) {
  m.impl("bn_scale", TORCH_BOX(&BnScale<CpuKernel>::functional));
  m.impl("bn_scale.out", TORCH_BOX(&BnScale<CpuKernel>::out));
  m.impl("bn_scale_", TORCH_BOX(&BnScale<CpuKernel>::in_place));
}

}  // namespace fused_conv_bn
