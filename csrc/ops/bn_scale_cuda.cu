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

// By bn_scale's kernels, as there is nothing here that would be worth having others: rsqrt(1 + 0) * scale * 1 is scale.
template <typename T>
void apply_affines_cuda(const char* op, const Elementwise& e, const acc_t<T>* affines) {
  const acc_t<T>* center = kCentered<T> ? affines : nullptr;
  const acc_t<T>* scale = affines + e.shape.channels;
  CudaKernel::run<T>(op, e,
                     BnParams<acc_t<T>>{{center}, {nullptr}, {scale}, {scale + e.shape.channels}, {nullptr}, 1, 0});
}
#define FCB_INSTANTIATE(torch_name, name, T) \
  template void apply_affines_cuda<T>(const char*, const Elementwise&, const acc_t<T>*);
FCB_FORALL_DTYPES(FCB_INSTANTIATE)
#undef FCB_INSTANTIATE

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CUDA, m) {
  m.impl("bn_scale", TORCH_BOX(&BnScale<CudaKernel>::functional));
  m.impl("bn_scale.out", TORCH_BOX(&BnScale<CudaKernel>::out));
  m.impl("bn_scale_", TORCH_BOX(&BnScale<CudaKernel>::in_place));
}

}  // namespace fused_conv_bn
