// How the ops reach the elementwise kernel on the CPU.
#include "elementwise.h"
#include "kernels/elementwise/scale_shift_cpu.h"

namespace fused_conv_bn {

void run_elementwise_cpu(const char*, const Elementwise& e, ScalarType dtype, const AffineTensors& affine,
                         const Epilogue& epilogue) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const AffineSource<T> source(affine);
    launch_scale_shift(
        static_cast<const T*>(e.input), static_cast<const T*>(e.residual), static_cast<T*>(e.output.data_ptr()),
        e.fresh, e.shape, [&](uint32_t c) { return source.at(c); }, epilogue,
        [](int64_t begin, int64_t end, int64_t grain, const auto& body) {
          torch::stable::parallel_for(begin, end, grain, body);
        });
  });
}

}  // namespace fused_conv_bn
