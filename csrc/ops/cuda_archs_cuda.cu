// cuda_archs: which compute capabilities this library was compiled for.
#include "torch/shim.h"

namespace fused_conv_bn {
namespace {

std::string cuda_archs() { return FCB_CUDA_ARCHS; }

}  // namespace
}  // namespace fused_conv_bn

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CompositeExplicitAutograd, m) {
  m.impl("cuda_archs", TORCH_BOX(&fused_conv_bn::cuda_archs));
}
