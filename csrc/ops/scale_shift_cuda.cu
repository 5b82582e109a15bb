// scale_shift, scale_shift.out and scale_shift_ on CUDA.
#include "scale_shift.h"

namespace fused_conv_bn {

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CUDA, m) {
  m.impl("scale_shift", TORCH_BOX(&ScaleShift<run_elementwise_cuda>::functional));
  m.impl("scale_shift.out", TORCH_BOX(&ScaleShift<run_elementwise_cuda>::out));
  m.impl("scale_shift_", TORCH_BOX(&ScaleShift<run_elementwise_cuda>::in_place));
}

}  // namespace fused_conv_bn
