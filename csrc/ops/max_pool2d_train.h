// max_pool2d_train and max_pool2d_backward, but for the device: F.max_pool2d where its input needs a gradient. Of each maximum its
// position is kept, a byte, where PyTorch keeps an index of 8.
#pragma once

#include <tuple>

#include "max_pool2d.h"

namespace fused_conv_bn {

// One of each for each library. Pointers to dense memory in one layout; not empty.
struct MaxPoolCall {
  const char* op;
  ScalarType dtype;
  Device device;
  PoolProblem problem;
};
using RunMaxPoolTrain = void(const MaxPoolCall& call, const void* input, void* output, uint8_t* position);
RunMaxPoolTrain run_max_pool_train_cpu;
RunMaxPoolTrain run_max_pool_train_cuda;
using RunMaxPoolBackward = void(const MaxPoolCall& call, const void* gradient, const uint8_t* position, void* result);
RunMaxPoolBackward run_max_pool_backward_cpu;
RunMaxPoolBackward run_max_pool_backward_cuda;

inline void check_positions(const char* op, const PoolWindow (&window)[2]) {
  const int64_t kernel[] = {window[0].kernel, window[1].kernel};
  if (kernel[0] > kMostPositions || kernel[1] > kMostPositions || kernel[0] * kernel[1] > kMostPositions) {
    fail(op, ": kernel_size is ", list_text(kernel, 2), ", expected a window of at most ", kMostPositions,
         " elements, whose positions fit into a byte");
  }
}

template <RunMaxPoolTrain* kRun>
std::tuple<Tensor, Tensor> max_pool2d_train(Tensor input, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                                            std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                            bool ceil_mode) {
  const char* op = "max_pool2d_train";
  const MaxPoolArguments a = check_max_pool2d(op, input, kernel_size, stride, padding, dilation, ceil_mode);
  check_positions(op, a.window);
  const Operand& x = a.input;
  const bool channels_last = suggests_channels_last(x);
  const PoolProblem problem = pool_problem(op, x.sizes, channels_last, a.window);
  const int64_t sizes[] = {x.sizes[0], x.sizes[1], a.window[0].output, a.window[1].output};
  const Strides strides = dense_strides(4, sizes, channels_last);
  Tensor output = empty_strided(4, sizes, strides.data(), x.dtype, x.device);
  Tensor position = empty_strided(4, sizes, strides.data(), ScalarType::Byte, x.device);
  if (x.numel > 0) {
    OptionalTensor copy;
    const void* data = dense_data(x, dense_strides(x, channels_last), channels_last, copy);
    kRun({op, x.dtype, x.device, problem}, data, output.data_ptr(), static_cast<uint8_t*>(position.data_ptr()));
  }
  return {output, position};
}

// The result lies as the positions say: as the input, of the forward.
template <RunMaxPoolBackward* kRun>
Tensor max_pool2d_backward(Tensor grad_output, Tensor position, int64_t input_height, int64_t input_width,
                           std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                           std::vector<int64_t> dilation, bool ceil_mode) {
  const char* op = "max_pool2d_backward";
  const Operand dy("grad_output", grad_output), of("position", position);
  if (dy.dim != 4) {
    fail(op, ": grad_output has shape ", dy.shape(), ", expected 4 dimensions: (N, C, H, W)");
  }
  check_input(op, dy);
  const int64_t sizes[] = {dy.sizes[0], dy.sizes[1], input_height, input_width};
  PoolWindow window[2];
  check_pool_windows(op, sizes, kernel_size, stride, padding, dilation, ceil_mode, window);
  check_positions(op, window);
  for (int d = 0; d < 2; ++d) {
    if (dy.sizes[d + 2] != window[d].output) {
      fail(op, ": grad_output has shape ", dy.shape(), ", expected ", window[0].output, " rows of ", window[1].output,
           " elements, as many as an input of shape ", list_text(sizes, 4), " has windows");
    }
  }
  if (!of.same_shape(dy)) {
    fail(op, ": position has shape ", of.shape(), ", expected ", dy.shape(), ", the shape of grad_output");
  }
  if (of.dtype != ScalarType::Byte) {
    fail(op, ": position has dtype ", dtype_name(of.dtype), ", expected uint8, as max_pool2d_train puts it out");
  }
  check_same_device(op, of, dy);
  const bool channels_last = suggests_channels_last(of);
  const PoolProblem problem = pool_problem(op, sizes, channels_last, window);
  Tensor result = empty_strided(4, sizes, dense_strides(4, sizes, channels_last).data(), dy.dtype, dy.device);
  if (dy.numel > 0) {
    const Strides strides = dense_strides(dy, channels_last);
    OptionalTensor copies[2];
    const void* gradient = dense_data(dy, strides, channels_last, copies[0]);
    const void* positions = dense_data(of, strides, channels_last, copies[1]);
    kRun({op, dy.dtype, dy.device, problem}, gradient, static_cast<const uint8_t*>(positions), result.data_ptr());
  }
  return result;
}

}  // namespace fused_conv_bn
