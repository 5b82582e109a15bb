// scale_shift, scale_shift.out and scale_shift_ on the CPU.
#include "elementwise_cpu.h"
#include "scale_shift.h"

namespace fused_conv_bn {
namespace {

struct CpuKernel {
  template <typename T, Activation A, bool kResidual>
  static void run(const char*, const Elementwise& e, const acc_t<T>* scale, const acc_t<T>* shift) {
    const auto affine_of = [&](uint32_t c) { return Affine<acc_t<T>>{0, scale[c], shift[c]}; };
    run_elementwise_cpu<T, A, kResidual>(e, affine_of);
  }
};

}  // namespace

void apply_scale_shift_cpu(const char* op, const Operand& x, const Operand& scale, const Operand& shift,
                           const OptionalOperand& residual, Activation activation) {
  ScaleShift<CpuKernel>::compute(op, x, scale, shift, residual, activation, &x);
}

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CPU, m) {
  m.impl("scale_shift", TORCH_BOX(&ScaleShift<CpuKernel>::functional));
  m.impl("scale_shift.out", TORCH_BOX(&ScaleShift<CpuKernel>::out));
  m.impl("scale_shift_", TORCH_BOX(&ScaleShift<CpuKernel>::in_place));
}

}  // namespace fused_conv_bn
