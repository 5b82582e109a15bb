// bn_scale, bn_scale.out and bn_scale_ on the CPU.
#include "bn_scale.h"

namespace fused_conv_bn {

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CPU, m) {
  m.impl("bn_scale", TORCH_BOX(&BnScale<run_elementwise_cpu>::functional));
  m.impl("bn_scale.out", TORCH_BOX(&BnScale<run_elementwise_cpu>::out));
  m.impl("bn_scale_", TORCH_BOX(&BnScale<run_elementwise_cpu>::in_place));
}

}  // namespace fused_conv_bn
