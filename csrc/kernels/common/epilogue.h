// The formula, once, for every kernel on every device:
//
//     activation((x - center) * scale + shift + residual), or
//     activation((x - center) * scale + shift) + residual
//
// with one (center, scale, shift) per channel. A folded scale/shift pair has center 0. bn_scale keeps the running mean
// as the center, because x - mean is exact where x is close to a large mean, and x * scale - mean * scale is not.
#pragma once

#include "activation.h"

namespace fused_conv_bn {

template <typename Acc>
struct Affine {
  Acc center;
  Acc scale;
  Acc shift;
};

// What comes behind the affine, chosen at run time.
struct Epilogue {
  Activation activation = Activation::none;
  bool residual_last = false;    // the residual is added behind the activation
  double negative_slope = 0.01;  // of leaky_relu
};

template <typename Acc>
FCB_HD Acc apply_affine(Acc x, const Affine<Acc>& affine) {
  return (x - affine.center) * affine.scale + affine.shift;
}

}  // namespace fused_conv_bn
