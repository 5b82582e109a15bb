// gate on CUDA.
#include "gate.h"
#include "kernels/elementwise/launch.cuh"

namespace fused_conv_bn {

void run_gate_cuda(const char* op, const Elementwise& e, const void* gates, int64_t pixels, ScalarType dtype,
                   const Epilogue& epilogue) {
  const CudaScope cuda(e.device);
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    cuda.check_launch(
        op, launch_gate(static_cast<const T*>(e.input), static_cast<const T*>(gates), static_cast<const T*>(e.residual),
                        static_cast<T*>(e.output.data_ptr()), e.shape, pixels, epilogue, cuda.stream()));
  });
}

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CUDA, m) { m.impl("gate", TORCH_BOX(&gate<run_gate_cuda>)); }

}  // namespace fused_conv_bn
