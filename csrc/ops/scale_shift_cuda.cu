// scale_shift, scale_shift.out and scale_shift_ on CUDA.
#include "elementwise_cuda.h"
#include "scale_shift.h"

namespace fused_conv_bn {
namespace {

struct CudaKernel {
  template <typename T, Activation A, bool kResidual>
  static void run(const char* op, const Elementwise& e, const acc_t<T>* scale, const acc_t<T>* shift) {
    run_elementwise_cuda<T, A, kResidual>(op, e, FoldedSource<acc_t<T>>{{scale}, {shift}});
  }
};

}  // namespace

void apply_scale_shift_cuda(const char* op, const Operand& x, const Operand& scale, const Operand& shift,
                            const OptionalOperand& residual, Activation activation) {
  ScaleShift<CudaKernel>::compute(op, x, scale, shift, residual, activation, &x);
}

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CUDA, m) {
  m.impl("scale_shift", TORCH_BOX(&ScaleShift<CudaKernel>::functional));
  m.impl("scale_shift.out", TORCH_BOX(&ScaleShift<CudaKernel>::out));
  m.impl("scale_shift_", TORCH_BOX(&ScaleShift<CudaKernel>::in_place));
}

}  // namespace fused_conv_bn
