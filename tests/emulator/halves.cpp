// 16-bit numbers, by the conversions of the CPU's kernels.
#include "kernels/common/scalar.h"
#include "machine.h"

namespace emulated {

using fused_conv_bn::bfloat16;
using fused_conv_bn::float16;

float from_half(Half type, uint16_t bits) {
  return type == Half::float16 ? fused_conv_bn::to_acc(float16{bits}) : fused_conv_bn::to_acc(bfloat16{bits});
}
uint16_t to_half(Half type, float value) {
  return type == Half::float16 ? fused_conv_bn::from_acc<float16>(value).bits
                               : fused_conv_bn::from_acc<bfloat16>(value).bits;
}

}  // namespace emulated
