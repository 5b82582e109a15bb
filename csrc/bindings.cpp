// The schemas of torch.ops.fused_conv_bn. Each file in ops/ registers its own kernels for them.
//
// Ops that write to an argument return nothing: of the forms that PyTorch knows it is the one that torch.compile
// functionalises on every torch from 2.10 on. The functions in fused_conv_bn.ops return the tensor that was written.
// (A result that shares no memory with what is written, as those of the *_train ops, is functionalised as well.)
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fused_conv_bn, m) {
  m.def(
      "fold_bn(Tensor running_mean, Tensor running_var, Tensor? weight=None, Tensor? bias=None, "
      "float scaling_factor=1.0, float eps=1e-05, Tensor? conv_bias=None) -> (Tensor scale, Tensor shift)");

  m.def(
      "bn_scale(Tensor input, Tensor running_mean, Tensor running_var, Tensor? weight=None, Tensor? bias=None, "
      "float scaling_factor=1.0, float eps=1e-05) -> Tensor");
  m.def(
      "bn_scale.out(Tensor input, Tensor running_mean, Tensor running_var, Tensor? weight=None, Tensor? bias=None, "
      "float scaling_factor=1.0, float eps=1e-05, *, Tensor(a!) out) -> ()");
  m.def(
      "bn_scale_(Tensor(a!) input, Tensor running_mean, Tensor running_var, Tensor? weight=None, Tensor? bias=None, "
      "float scaling_factor=1.0, float eps=1e-05) -> ()");

  m.def(
      "scale_shift(Tensor input, Tensor scale, Tensor shift, *, Tensor? residual=None, str activation='none') -> "
      "Tensor");
  m.def(
      "scale_shift.out(Tensor input, Tensor scale, Tensor shift, *, Tensor? residual=None, str activation='none', "
      "Tensor(a!) out) -> ()");
  m.def(
      "scale_shift_(Tensor(a!) input, Tensor scale, Tensor shift, *, Tensor? residual=None, str activation='none') -> "
      "()");

  m.def(
      "conv_scale_shift(Tensor input, Tensor weight, Tensor scale, Tensor shift, int[] stride, int[] padding, "
      "int[] dilation, int groups, *, Tensor? residual=None, str activation='none', bool allow_tf32=False) -> Tensor");
  // weight * scale and a scale of ones where that costs no accuracy, else both as they are: what conv_scale_shift does
  // on the CPU in each call, for callers that keep the result.
  m.def("_fold_conv_weight(Tensor weight, Tensor scale) -> (Tensor weight, Tensor scale)");
  // What conv_scale_shift would run on CUDA for a problem and a GPU, both as the numbers of kernels/conv_params.h and
  // conv_config.h in their order; `algorithm` forces one.
  m.def("_conv_config(int[] problem, int[] gpu, str algorithm='', str statistics='none') -> str");

  m.def(
      "bn_scale_train(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, Tensor? bias, "
      "float scaling_factor, float momentum, float eps) -> Tensor");
  m.def(
      "conv_bn_scale_train(Tensor input, Tensor conv_weight, Tensor? conv_bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor? weight, Tensor? bias, float scaling_factor, float momentum, float eps, "
      "int[] stride, int[] padding, int[] dilation, int groups, *, bool allow_tf32=False) -> Tensor");

  // The compute capabilities that the loaded CUDA library has code for; no kernel without one.
  m.def("cuda_archs() -> str");
}
