// scale_shift, scale_shift.out and scale_shift_ on the CPU.
#include "elementwise_cpu.h"
#include "scale_shift.h"

namespace fused_conv_bn {
namespace {

Tensor run(const char* op, const Tensor& input, const Tensor& scale, const Tensor& shift,
           const OptionalTensor& residual, StringHandle activation, const Tensor* target, const char* target_name) {
  return call_scale_shift(
      op, input, scale, shift, residual, activation, target, target_name,
      [&](const Elementwise& e, const void* scale_data, const void* shift_data, Activation parsed, ScalarType dtype) {
        dispatch_dtype(dtype, [&](auto tag) {
          using T = typename decltype(tag)::type;
          const auto* scales = static_cast<const acc_t<T>*>(scale_data);
          const auto* shifts = static_cast<const acc_t<T>*>(shift_data);
          const auto affine_of = [&](uint32_t c) { return Affine<acc_t<T>>{0, scales[c], shifts[c]}; };
          dispatch_epilogue(parsed, e.residual != nullptr, [&](auto a, auto has_residual) {
            run_elementwise_cpu<T, a(), has_residual()>(e, affine_of);
          });
        });
      });
}

Tensor scale_shift_cpu(const Tensor input, const Tensor scale, const Tensor shift, const OptionalTensor residual,
                       StringHandle activation) {
  return run("scale_shift", input, scale, shift, residual, activation, nullptr, nullptr);
}

void scale_shift_out_cpu(const Tensor input, const Tensor scale, const Tensor shift, const OptionalTensor residual,
                         StringHandle activation, const Tensor out) {
  run("scale_shift", input, scale, shift, residual, activation, &out, "out");
}

void scale_shift_inplace_cpu(const Tensor input, const Tensor scale, const Tensor shift, const OptionalTensor residual,
                             StringHandle activation) {
  run("scale_shift_", input, scale, shift, residual, activation, &input, "input");
}

}  // namespace
}  // namespace fused_conv_bn

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CPU, m) {
  m.impl("scale_shift", TORCH_BOX(&fused_conv_bn::scale_shift_cpu));
  m.impl("scale_shift.out", TORCH_BOX(&fused_conv_bn::scale_shift_out_cpu));
  m.impl("scale_shift_", TORCH_BOX(&fused_conv_bn::scale_shift_inplace_cpu));
}
