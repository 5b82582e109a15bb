// From dy to dv on the GPU, for kernels that choose the activation at run time.
#pragma once

#include <cuda_runtime.h>

#include "backward.h"

namespace fused_conv_bn {

template <typename T>
struct Derivative {
  Activation activation;
  bool from_result;
  acc_t<T> negative_slope;
};

// f(dv_of), with dv_of(dy, d, other, affine): dv of one element, for d = z - affine.center. The branch for the activation is
// taken once around all of f. kOther: there is a result or a residual. kBounds: the activation is a bound.
template <typename T, bool kOther, bool kBounds, typename F>
__device__ __forceinline__ void with_derivative(const Derivative<T>& how, F&& f) {
  using Acc = acc_t<T>;
  if constexpr (kOther) {
    if (how.from_result) {
      dispatch_some<kBounds>(how.activation, [&](auto a) {
        if constexpr (a() != Activation::none && derives_from_result(a())) {
          f([&](Acc dy, Acc, Acc result, const Affine<Acc>&) { return derivative_from_result<a(), T>(dy, result); });
        }
      });
      return;
    }
  }
  dispatch_some<kBounds>(how.activation, [&](auto a) {
    f([&](Acc dy, Acc d, Acc residual, const Affine<Acc>& affine) {
      if constexpr (a() == Activation::none) {
        return dy;
      }
      Acc v = d * affine.scale + affine.shift;
      if constexpr (kOther) {
        v += residual;
      }
      return derivative_from_input<a(), T>(dy, v, how.negative_slope);
    });
  });
}

}  // namespace fused_conv_bn
