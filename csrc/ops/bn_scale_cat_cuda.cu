// bn_scale_cat on CUDA.
#include "bn_scale_cat.h"
#include "kernels/elementwise/launch.cuh"

namespace fused_conv_bn {

void run_cat_cuda(const char* op, const Parts<void>& parts, const Tensor& output, const Shape& shape, ScalarType dtype,
                  const Device& device, const AffineTensors& affine, const Epilogue& epilogue) {
  const CudaScope cuda(device);
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    cuda.check_launch(
        op, launch_cat(Parts<T>(parts), static_cast<T*>(output.data_ptr()), shape, affine, epilogue, cuda.stream()));
  });
}

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CUDA, m) { m.impl("bn_scale_cat", TORCH_BOX(&bn_scale_cat<run_cat_cuda>)); }

}  // namespace fused_conv_bn
