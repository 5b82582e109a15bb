// Division by a number that the host knows, without the division.
#pragma once

#include <cstdint>

#include "scalar.h"

namespace fused_conv_bn {

// Division of n < 2^31 by a fixed 1 <= d < 2^31 as a multiplication (Granlund and Montgomery, PLDI 1994).
struct FastDiv {
  uint32_t divisor;
  uint32_t multiplier;
  uint32_t shift;

  FastDiv() = default;
  explicit FastDiv(uint32_t d) : divisor(d), multiplier(0), shift(0) {
    while ((uint64_t{1} << shift) < d) {
      ++shift;
    }
    multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - d) << 32) / d + 1);
  }

  FCB_HD uint32_t div(uint32_t n) const {
#if defined(__CUDA_ARCH__)
    const uint32_t high = __umulhi(n, multiplier);
#else
    const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(n) * multiplier) >> 32);
#endif
    return (high + n) >> shift;
  }
};

// The quotient; n becomes the remainder.
FCB_HD uint32_t div_mod(const FastDiv& d, uint32_t& n) {
  const uint32_t q = d.div(n);
  n -= q * d.divisor;
  return q;
}

}  // namespace fused_conv_bn
