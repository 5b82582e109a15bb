// How a kernel is launched.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernel.cuh"
#include "kernels/ptx/launch.cuh"

namespace fused_conv_bn {

template <typename T>
cudaError_t StemSm80::launch(const ConvCall& call, cudaStream_t stream) const {
  using namespace stem_sm80;
  const auto& [c, operands, gpu, epilogue] = call;
  Params<T> p{};
  p.x = static_cast<const T*>(operands.x);
  p.w = static_cast<const T*>(operands.w);
  p.affine = AffineSource<T>(operands.affine);
  p.residual = static_cast<const T*>(operands.residual);
  p.y = static_cast<T*>(operands.y);
  p.w_stride_k = operands.w_stride_k;
  p.w_stride_c = operands.w_stride_c;
  p.w_stride_r = operands.w_stride_r;
  p.w_stride_s = operands.w_stride_s;
  p.c = narrow(c);
  p.tile = tile;
  p.x_cols = FastDiv(tile.x_cols);
  const int slice = tile.quads_per_tap % 2 == 0 ? 2 * kQuad : kQuad;
  p.pixel_slices = FastDiv(tile.quads_per_tap * kQuad / slice);
  p.whole_slices = c.C % slice == 0;
  p.tile_q = FastDiv(tile.q);
  p.row_vectors = FastDiv(static_cast<uint32_t>(std::max<int64_t>(1, c.W / Vec<T>::kSize)));
  p.channel_vectors = FastDiv(tile.x_rows * p.row_vectors.divisor);
  p.tiles_q = FastDiv(tile.tiles_q);
  p.tiles_p = FastDiv(tile.tiles_p);
  p.tiles = static_cast<uint32_t>(c.N * tile.tiles_p * tile.tiles_q);
  p.tile_p = FastDiv(tile.p);
  const int run_vectors = (tile.q == c.Q ? tile.p * tile.q : tile.q) / Vec<T>::kSize + 1;
  p.run_shift = run_vectors > 16 ? 5 : (run_vectors > 8 ? 4 : 3);
  p.x_vectors = c.channels_last && c.C % kQuad == 0 && is_aligned(p.x) &&
                c.C * c.element_bytes % (tile.quads_per_tap % 2 == 0 ? 16 : 8) == 0;
  p.y_vectors = c.channels_last && c.K * c.element_bytes % kVecBytes == 0 && is_aligned(p.y);
  p.stage_pairs = !c.channels_last && c.Q % 2 == 0 && is_aligned(p.y, 2 * sizeof(T));
  p.run_vectors = p.stage_pairs && tile.q == c.Q && run_vectors > 16 && is_aligned(p.y) &&
                  c.P * c.Q % Vec<T>::kSize == 0 && int64_t{tile.p} * tile.q % Vec<T>::kSize == 0;
  p.split = c.element_bytes == 4 && !c.allow_tf32;
  p.activation = epilogue.activation;
  p.residual_last = epilogue.residual_last;
  p.negative_slope = static_cast<float>(epilogue.negative_slope);
  const auto launch = [&](auto m, auto last, auto alternating) {
    const auto kernel = is_bound(epilogue.activation) ? stem_sm80_kernel<T, m(), last(), alternating(), true>
                                                      : stem_sm80_kernel<T, m(), last(), alternating(), false>;
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                    tile.shared_memory);
    if (status != cudaSuccess) {
      return status;
    }
    const int64_t channel_blocks = ceil_div(c.K, tile.channels);
    const int64_t resident = int64_t{gpu.multiprocessors} * std::max(1, blocks_per_multiprocessor(tile, gpu));
    const int64_t blocks = std::min<int64_t>(ceil_div(p.tiles, thread_groups(alternating())),
                                             ceil_div(resident, channel_blocks));
    return launch_kernel(kernel, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(channel_blocks)),
                         kBlockThreads, tile.shared_memory, true, stream, p);
  };
  using std::false_type;
  using std::true_type;
  using Narrow = std::integral_constant<int, 2>;
  using Full = std::integral_constant<int, 4>;
  if constexpr (std::is_same_v<T, float>) {
    if (tile.alternating && is_aligned(p.x)) {
      return launch(Full{}, false_type{}, true_type{});
    }
  }
  if (c.channels_last) {
    return tile.channels == 64 ? launch(Full{}, true_type{}, false_type{})
                               : launch(Narrow{}, true_type{}, false_type{});
  }
  return tile.channels == 64 ? launch(Full{}, false_type{}, false_type{})
                             : launch(Narrow{}, false_type{}, false_type{});
}

}  // namespace fused_conv_bn
