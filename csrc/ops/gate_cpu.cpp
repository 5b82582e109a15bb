// gate on the CPU.
#include "gate.h"
#include "kernels/elementwise/scale_shift_cpu.h"

namespace fused_conv_bn {

void run_gate_cpu(const char*, const Elementwise& e, const void* gates, int64_t pixels, ScalarType dtype,
                  const Epilogue& epilogue) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_gate(static_cast<const T*>(e.input), static_cast<const T*>(gates), static_cast<const T*>(e.residual),
                static_cast<T*>(e.output.data_ptr()), e.shape, pixels, epilogue,
                [](int64_t begin, int64_t end, int64_t grain, const auto& body) {
                  torch::stable::parallel_for(begin, end, grain, body);
                });
  });
}

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CPU, m) { m.impl("gate", TORCH_BOX(&gate<run_gate_cpu>)); }

}  // namespace fused_conv_bn
