// How the kernels are launched: the pass over dy and x, in training one over x, then their sums and what comes of them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <numeric>

#include "finish.cuh"
#include "kernel.cuh"
#include "kernels/ptx/launch.cuh"

namespace fused_conv_bn {

namespace wgrad_stem_sm80 {

template <typename T>
Params<T> make_params(const WgradCall& call, const Layout& tile, double* partials) {
  const auto& [c, operands, gpu] = call;
  Params<T> p{};
  static_cast<Extents&>(p) = narrow(c);
  p.x = static_cast<const T*>(operands.x);
  p.dy = static_cast<const T*>(operands.dy);
  p.result = static_cast<const T*>(operands.result);
  p.activation = operands.activation;
  p.partials = partials;
  p.tile = tile;
  p.tiles = static_cast<uint32_t>(c.N * tile.tiles_p * tile.tiles_q);
  p.tiles_q = FastDiv(tile.tiles_q);
  p.tiles_p = FastDiv(tile.tiles_p);
  p.tile_q = FastDiv(tile.q);
  p.phase_cols = FastDiv(tile.phase_cols);
  p.raw_rows = FastDiv(tile.x_rows);
  const auto address = [](const void* data) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) % 16); };
  p.copy_bytes = copy_bytes(c, tile, std::gcd(address(p.dy), address(p.result)));
  p.input_copy_bytes = input_copy_bytes(c, address(p.x));
  p.raw_pieces = FastDiv(tile.raw_pitch * c.element_bytes / p.input_copy_bytes);
  return p;
}

template <typename Kernel, typename T>
cudaError_t launch_kernel_of(Kernel kernel, const Params<T>& p, int blocks, cudaStream_t stream) {
  const Layout& tile = p.tile;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                  tile.shared_memory);
  return status != cudaSuccess ? status
                               : launch_kernel(kernel, dim3(blocks, tile.role_blocks()), tile.threads,
                                               tile.shared_memory, true, stream, p);
}

template <Rows kRows, typename T>
cudaError_t launch_pass(const WgradCall& call, const Layout& tile, int blocks, double* partials, cudaStream_t stream) {
  const Params<T> p = make_params<T>(call, tile, partials);
  const bool last = call.problem.channels_last;
  if (tile.role_units <= kFewUnits) {
    return launch_kernel_of(
        last ? wgrad_stem_sm80_kernel<T, true, kRows, kFewUnits> : wgrad_stem_sm80_kernel<T, false, kRows, kFewUnits>,
        p, blocks, stream);
  }
  return launch_kernel_of(last ? wgrad_stem_sm80_kernel<T, true, kRows, kMostRoleUnits>
                               : wgrad_stem_sm80_kernel<T, false, kRows, kMostRoleUnits>,
                          p, blocks, stream);
}

}  // namespace wgrad_stem_sm80

template <typename T>
cudaError_t WgradStemSm80::launch(const WgradCall& call, double* workspace, cudaStream_t stream) const {
  using namespace wgrad_stem_sm80;
  const Conv2d& c = call.problem;
  double* const patch_partials = workspace + gradient_blocks * gradient_sums();
  double* const all = workspace + partials();
  double* const of_input = all + sums();
  cudaError_t status = launch_pass<Rows::gradient, T>(call, gradient, gradient_blocks, workspace, stream);
  if (status == cudaSuccess && from_input.has_value()) {
    status = from_input->template launch_sums<T>(c, call.operands.x, of_input + FromInputSm90::kSums, of_input, stream);
  } else if (status == cudaSuccess && patch.has_value()) {
    status = launch_pass<Rows::patch, T>(call, *patch, patch_blocks, patch_partials, stream);
  }
  if (status == cudaSuccess) {
    const Partials of_gradient{workspace, gradient_blocks, static_cast<uint32_t>(gradient_sums())};
    const Partials of_patch{patch_partials, patch_blocks, static_cast<uint32_t>(patch_sums())};
    status = launch_kernel(wgrad_reduce_kernel, static_cast<unsigned>(sums() / kReduceSums), kReduceSums * kReduceParts,
                           0, true, stream, of_gradient, of_patch, all);
  }
  if (status == cudaSuccess) {
    const double* const input_sums = from_input ? of_input : call.operands.input_sums;
    const PatchSums patch_sums{patch ? all + gradient_sums() : input_sums, !patch, patch.value_or(gradient)};
    const FinishParams<T> p{call.operands,
                            gradient,
                            all,
                            patch_sums,
                            static_cast<int>(c.C),
                            static_cast<int>(c.R),
                            static_cast<int>(c.S),
                            static_cast<double>(c.N * c.P * c.Q)};
    status = launch_kernel(wgrad_finish_kernel<T>, static_cast<unsigned>(c.K), kFinishThreads, 0, true, stream, p);
  }
  return status;
}

}  // namespace fused_conv_bn
