// bn_scale_cat on the CPU.
#include "bn_scale_cat.h"
#include "kernels/elementwise/scale_shift_cpu.h"

namespace fused_conv_bn {

void run_cat_cpu(const char*, const Parts<void>& parts, const Tensor& output, const Shape& shape, ScalarType dtype,
                 const Device&, const AffineTensors& affine, const Epilogue& epilogue) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const AffineSource<T> source(affine);
    launch_cat(
        Parts<T>(parts), static_cast<T*>(output.data_ptr()), shape, [&](uint32_t c) { return source.at(c); }, epilogue,
        [](int64_t begin, int64_t end, int64_t grain, const auto& body) {
          torch::stable::parallel_for(begin, end, grain, body);
        });
  });
}

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CPU, m) { m.impl("bn_scale_cat", TORCH_BOX(&bn_scale_cat<run_cat_cpu>)); }

}  // namespace fused_conv_bn
