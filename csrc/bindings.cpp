// The schemas of torch.ops.fused_conv_bn. Each file in ops/ registers its own kernels for them.
//
// Ops that write to an argument return nothing: of the forms that PyTorch knows it is the one that torch.compile
// functionalises on every torch from 2.10 on. The functions in fused_conv_bn.ops return the tensor that was written.
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

  // The compute capabilities that the loaded CUDA library has code for; no kernel without one.
  m.def("cuda_archs() -> str");
}
