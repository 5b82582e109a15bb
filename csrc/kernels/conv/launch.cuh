// What starts the convolution of a plan, whichever algorithm's it is.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>
#include <variant>

#include "registry.h"

namespace fused_conv_bn {

// T: float, float16, bfloat16. The plan is not Aten, whose convolution is PyTorch's to start.
template <typename T>
cudaError_t launch_conv(const ConvPlan& plan, const ConvCall& call, cudaStream_t stream) {
  return std::visit(
      [&]<typename Plan>(const Plan& p) {
        if constexpr (std::is_same_v<Plan, Aten>) {
          return cudaErrorInvalidValue;
        } else {
          return p.template launch<T>(call, stream);
        }
      },
      plan);
}

}  // namespace fused_conv_bn
