// bn_scale, bn_scale.out and bn_scale_ on CUDA.
#include "bn_scale.h"
#include "elementwise_cuda.h"

namespace fused_conv_bn {
namespace {

struct CudaKernel {
  template <typename T, typename P>
  static void run(const char* op, const Elementwise& e, const BnParams<P>& params) {
    run_elementwise_cuda<T, Activation::none, false>(op, e, make_bn_source<T>(params));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CUDA, m) {
  m.impl("bn_scale", TORCH_BOX(&BnScale<CudaKernel>::functional));
  m.impl("bn_scale.out", TORCH_BOX(&BnScale<CudaKernel>::out));
  m.impl("bn_scale_", TORCH_BOX(&BnScale<CudaKernel>::in_place));
}

}  // namespace fused_conv_bn
