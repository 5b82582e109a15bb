// scale_shift, scale_shift.out and scale_shift_ on the CPU.
#include "scale_shift.h"

namespace fused_conv_bn {

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CPU, m) {
  m.impl("scale_shift", TORCH_BOX(&ScaleShift<run_elementwise_cpu>::functional));
  m.impl("scale_shift.out", TORCH_BOX(&ScaleShift<run_elementwise_cpu>::out));
  m.impl("scale_shift_", TORCH_BOX(&ScaleShift<run_elementwise_cpu>::in_place));
}

}  // namespace fused_conv_bn
