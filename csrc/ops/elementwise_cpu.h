// How the elementwise ops reach the CPU kernel.
#pragma once

#include "../checks.h"
#include "../kernels/scale_shift_cpu.h"

namespace fused_conv_bn {

// affine_of(channel): the affine of a channel, in acc_t<T>.
template <typename T, Activation A, bool kResidual, typename AffineOf>
void run_elementwise_cpu(const Elementwise& e, const AffineOf& affine_of) {
  launch_scale_shift<A, kResidual>(static_cast<const T*>(e.input), static_cast<const T*>(e.residual),
                                   static_cast<T*>(e.output.data_ptr()), e.fresh, e.shape, affine_of,
                                   [](int64_t begin, int64_t end, int64_t grain, const auto& body) {
                                     torch::stable::parallel_for(begin, end, grain, body);
                                   });
}

}  // namespace fused_conv_bn
