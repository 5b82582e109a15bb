// How the ops reach the elementwise kernels on CUDA.
#include "elementwise.h"
#include "kernels/elementwise/launch.cuh"

namespace fused_conv_bn {

void run_elementwise_cuda(const char* op, const Elementwise& e, ScalarType dtype, const AffineTensors& affine,
                          const Epilogue& epilogue) {
  const CudaScope cuda(e.device);
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    cuda.check_launch(
        op, launch_scale_shift(static_cast<const T*>(e.input), static_cast<const T*>(e.residual),
                               static_cast<T*>(e.output.data_ptr()), e.shape, affine, epilogue, cuda.stream()));
  });
}

}  // namespace fused_conv_bn
