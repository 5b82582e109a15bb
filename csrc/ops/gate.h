// gate, but for the device: a tensor times a gate for each channel of each image, and an epilogue.
#pragma once

#include "elementwise.h"

namespace fused_conv_bn {

// Starts the kernel on checked operands; the gates are dense, pixels are those of an image. One for each library.
using RunGate = void(const char* op, const Elementwise& e, const void* gate, int64_t pixels, ScalarType dtype,
                     const Epilogue& epilogue);
RunGate run_gate_cpu;
RunGate run_gate_cuda;

// Returns the pixels of an image.
inline int64_t check_gates(const char* op, const Operand& x, const Operand& g) {
  int64_t pixels = 1;
  bool fits = g.dim == 2 || g.dim == x.dim;
  for (int64_t d = 0; d < x.dim; ++d) {
    pixels *= d < 2 ? 1 : x.sizes[d];
    fits = fits && (d < 2 ? g.sizes[d] == x.sizes[d] : d >= g.dim || g.sizes[d] == 1);
  }
  if (!fits) {
    fail(op, ": gate has shape ", g.shape(), ", expected [", x.sizes[0], ", ", x.sizes[1],
         "] and perhaps ones, an element for each channel of each image of input");
  }
  if (g.numel > kMaxChannels) {
    fail(op, ": gate has ", g.numel, " elements, expected at most ", kMaxChannels);
  }
  if (g.dtype != x.dtype) {
    fail(op, ": gate has dtype ", dtype_name(g.dtype), ", expected ", dtype_name(x.dtype), ", the dtype of input");
  }
  check_same_device(op, g, x);
  return pixels;
}

// Everything is checked.
template <RunGate* kRun>
Tensor apply_gates(const char* op, const Operand& x, const Operand& g, int64_t pixels, const OptionalOperand& residual,
                   const Epilogue& epilogue) {
  Elementwise e = make_elementwise(x, residual, nullptr);
  if (e.shape.numel > 0) {
    OptionalTensor copy;
    const void* data = dense_data(g, dense_strides(g, false), false, copy);
    kRun(op, e, data, pixels, x.dtype, epilogue);
  }
  return e.output;
}

template <RunGate* kRun>
Tensor gate(Tensor input, Tensor gates, OptionalTensor residual, StringHandle activation, double negative_slope,
            bool residual_last) {
  const char* op = "gate";
  const EpilogueArguments arguments{residual, take_string(activation), negative_slope, residual_last};
  const Operand x("input", input);
  const Operand g("gate", gates);
  check_input(op, x);
  const int64_t pixels = check_gates(op, x, g);
  const OptionalOperand added = optional_operand("residual", residual);
  if (added.has_value()) {
    check_like(op, *added, x);
  }
  return apply_gates<kRun>(op, x, g, pixels, added, check_epilogue(op, arguments));
}

}  // namespace fused_conv_bn
