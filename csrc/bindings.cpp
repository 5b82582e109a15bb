// The schemas of torch.ops.fused_conv_bn. Each file in ops/ registers its own kernels for them.
//
// Ops that write to an argument return nothing: of the forms that PyTorch knows it is the one that torch.compile
// functionalises on every torch from 2.10 on. The functions in fused_conv_bn.ops return the tensor that was written.
// (A result that shares no memory with what is written, as those of the *_train ops, is functionalised as well.)
#include <torch/csrc/stable/library.h>

#define FCB_EPILOGUE "Tensor? residual=None, str activation='none', float negative_slope=0.01, bool residual_last=False"
#define FCB_WINDOW "int[1] stride=1, int[1] padding=0, int[1] dilation=1, int groups=1"
#define FCB_BN                                                                                                  \
  "Tensor running_mean, Tensor running_var, Tensor? weight=None, Tensor? bias=None, float scaling_factor=1.0, " \
  "float eps=1e-05"
// running: how running_mean and running_var are annotated.
#define FCB_BN_TRAIN(running_mean, running_var)                                                                       \
  running_mean " running_mean, " running_var                                                                          \
               " running_var, Tensor? weight=None, Tensor? bias=None, float scaling_factor=1.0, float momentum=0.1, " \
               "float eps=1e-05"
#define FCB_UPDATED FCB_BN_TRAIN("Tensor(a!)?", "Tensor(b!)?")
#define FCB_READ FCB_BN_TRAIN("Tensor?", "Tensor?")

STABLE_TORCH_LIBRARY(fused_conv_bn, m) {
  m.def(
      "fold_bn(Tensor running_mean, Tensor running_var, Tensor? weight=None, Tensor? bias=None, "
      "float scaling_factor=1.0, float eps=1e-05, Tensor? conv_bias=None) -> (Tensor scale, Tensor shift)");

  m.def("bn_scale(Tensor input, " FCB_BN ", *, " FCB_EPILOGUE ") -> Tensor");
  m.def("bn_scale.out(Tensor input, " FCB_BN ", *, " FCB_EPILOGUE ", Tensor(a!) out) -> ()");
  m.def("bn_scale_(Tensor(a!) input, " FCB_BN ", *, " FCB_EPILOGUE ") -> ()");

  // Of inputs that are concatenated over their channels, which is never written.
  m.def("bn_scale_cat(Tensor[] inputs, " FCB_BN ", *, str activation='none', float negative_slope=0.01) -> Tensor");
  // Times an element for each channel of each image: (N, C) and perhaps ones.
  m.def("gate(Tensor input, Tensor gate, *, " FCB_EPILOGUE ") -> Tensor");

  // PyTorch's max_pool2d without its indices.
  m.def(
      "max_pool2d(Tensor input, int[2] kernel_size, int[2] stride=[], int[2] padding=0, int[2] dilation=1, "
      "bool ceil_mode=False) -> Tensor");
  // Where its input needs a gradient: position, in uint8, is where in its window each maximum is, row by row.
  m.def(
      "max_pool2d_train(Tensor input, int[2] kernel_size, int[2] stride=[], int[2] padding=0, int[2] dilation=1, "
      "bool ceil_mode=False) -> (Tensor output, Tensor position)");
  m.def(
      "max_pool2d_backward(Tensor grad_output, Tensor position, SymInt input_height, SymInt input_width, "
      "int[2] kernel_size, int[2] stride=[], int[2] padding=0, int[2] dilation=1, bool ceil_mode=False) -> Tensor");
  // The mean of each channel of each image.
  m.def("spatial_mean(Tensor input, *, bool keepdim=False) -> Tensor");

  // gate(weight2 * activation(weight1 * mean + bias1) + bias2) of the mean of each channel of each image: what gate() takes.
  m.def(
      "squeeze_excite(Tensor input, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, *, "
      "str activation='relu', str gate='sigmoid', float negative_slope=0.01) -> Tensor");

  m.def("scale_shift(Tensor input, Tensor? scale, Tensor? shift, *, " FCB_EPILOGUE ") -> Tensor");
  m.def("scale_shift.out(Tensor input, Tensor? scale, Tensor? shift, *, " FCB_EPILOGUE ", Tensor(a!) out) -> ()");
  m.def("scale_shift_(Tensor(a!) input, Tensor? scale, Tensor? shift, *, " FCB_EPILOGUE ") -> ()");

  m.def("conv_scale_shift(Tensor input, Tensor weight, Tensor? scale, Tensor? shift, " FCB_WINDOW ", *, " FCB_EPILOGUE
        ", bool allow_tf32=False) -> Tensor");
  m.def("conv_bn_scale(Tensor input, Tensor conv_weight, Tensor? conv_bias, " FCB_BN ", " FCB_WINDOW
        ", *, " FCB_EPILOGUE ", bool allow_tf32=False) -> Tensor");
  // conv_bn_scale of gate(input, gate), which an algorithm may take along.
  m.def("gate_conv_bn_scale(Tensor input, Tensor gate, Tensor conv_weight, Tensor? conv_bias, " FCB_BN ", " FCB_WINDOW
        ", *, " FCB_EPILOGUE ", bool allow_tf32=False) -> Tensor");
  // And spatial_mean(output, keepdim=True), which an algorithm may put out too.
  m.def("conv_bn_scale_mean(Tensor input, Tensor conv_weight, Tensor? conv_bias, " FCB_BN ", " FCB_WINDOW
        ", *, " FCB_EPILOGUE ", bool allow_tf32=False) -> (Tensor output, Tensor mean)");
  // The gradients of a convolution's weight and of the BatchNorm behind it, on CUDA, for few input channels: from the gradient
  // of the output, `dy`, the input, and the activation's `result` where it has a derivative. has_statistics: BatchNorm took
  // the batch's; then `var` is its inverse deviation. Of what is not asked for, empty tensors. The gradient of the
  // convolution's result, over what is in `scaled_weight` beside the weight, is dy + input_scale * result + input_shift.
  // input_sums: what _conv_bn_scale_train_sums returned for this input.
  m.def(
      "_conv_bn_wgrad(Tensor dy, Tensor? result, Tensor input, Tensor conv_weight, Tensor? conv_bias, Tensor? mean, "
      "Tensor? var, Tensor? weight, float scaling_factor, float eps, " FCB_WINDOW
      ", *, str activation='none', bool has_statistics=False, bool needs_conv_weight=True, bool needs_input=False, "
      "Tensor? input_sums=None) -> (Tensor conv_weight, Tensor weight, Tensor bias, Tensor conv_bias, "
      "Tensor scaled_weight, Tensor input_scale, Tensor input_shift)");

  // For snapshots on the CPU, in float32 and channels_last: a weight that was scaled and packed before, (tiles, R, S, C, tile) of
  // output channels or, depthwise, (R, S, C), and a shift for each output channel of whole tiles. _packed_channels: those of a
  // tile, or 0 where this kernel is not for the processor.
  m.def(
      "_conv_packed(Tensor input, Tensor weight, Tensor shift, int filters, int[1] stride=1, int[1] padding=0, "
      "int[1] dilation=1, *, " FCB_EPILOGUE ") -> Tensor");
  m.def("_packed_channels() -> int");
  // Several of them as one op, with the means and gates of squeeze-and-excite blocks: all weights and shifts one behind the
  // other in `packed`, the numbers of a Step (ops/conv_packed_chain_cpu.cpp) in each row of `steps`, and the names of the
  // activations that those have numbers of, with commas between them. Returns the results of the steps that say so.
  m.def("_conv_packed_chain(Tensor[] inputs, Tensor packed, Tensor steps, str activations) -> Tensor[]");

  // What a convolution op would run, in words. _explain_problem: on CUDA, for a problem and a GPU, both as the numbers of
  // Conv2d and GpuTraits (kernels/conv/problem.h) in their order.
  m.def("_explain(Tensor input, Tensor weight, " FCB_WINDOW
        ", *, bool has_residual=False, bool has_statistics=False, bool allow_tf32=False) -> str");
  m.def("_explain_problem(int[] problem, int[] gpu, str algorithm='', str statistics='none') -> str");

  // What tuning needs to know of a convolution, and takes from what it has measured: which algorithms cover it, and the fastest
  // one for each problem. No numbers and no names where there is nothing to choose. _set_choices replaces all that was set for
  // the CPU, or for a CUDA device of this name; names have commas between them, and problems the numbers of one after the other.
  m.def("_candidates(Tensor input, Tensor weight, " FCB_WINDOW
        ", *, bool has_residual=False, bool has_statistics=False, bool allow_tf32=False) "
        "-> (str device, int[] problem, str algorithms)");
  m.def("_set_choices.cpu(int[] problems, str algorithms) -> ()");
  m.def("_set_choices.cuda(int[] problems, str algorithms, str device) -> ()");

  // What the calling thread's convolutions run on CUDA from now on; returns what it was. Names, 'by rule', 'default' for what
  // the environment says, and '' to leave it as it is. No kernel without a CUDA library: _check_algorithm checks the names.
  m.def("_use_algorithm(str algorithm, str statistics) -> (str algorithm, str statistics)");
  m.def("_check_algorithm(str algorithm, str statistics) -> ()");
  // The names in the environment, FUSED_CONV_BN_CONV and FUSED_CONV_BN_STATISTICS: an unknown one is an error.
  m.def("_check_environment() -> ()");

  // Batch statistics, in three forms. The first returns the result alone; _stats the batch's mean and the inverse of its
  // deviation as well, for a backward; _functional writes to no argument, and returns the updated running statistics, which are
  // empty where there are none. The statistics are those of the convolution without its bias.
#define FCB_TRAIN_FORMS(name, arguments, updated, read, behind)                                      \
  m.def(name "(" arguments updated behind ") -> Tensor");                                            \
  m.def(name "_stats(" arguments updated behind ") -> (Tensor output, Tensor mean, Tensor invstd)"); \
  m.def(name "_functional(" arguments read behind                                                    \
             ") -> (Tensor output, Tensor mean, Tensor invstd, Tensor running_mean, Tensor running_var)");
  FCB_TRAIN_FORMS("bn_scale_train", "Tensor input, ", FCB_UPDATED, FCB_READ, ", *, " FCB_EPILOGUE)
  FCB_TRAIN_FORMS("conv_bn_scale_train", "Tensor input, Tensor conv_weight, Tensor? conv_bias, ", FCB_UPDATED, FCB_READ,
                  ", " FCB_WINDOW ", *, " FCB_EPILOGUE ", bool allow_tf32=False")
#undef FCB_TRAIN_FORMS
  // For _conv_bn_wgrad: and the sums over the input that the statistics come from, in float64; none if they come from elsewhere.
  m.def("_conv_bn_scale_train_sums(Tensor input, Tensor conv_weight, Tensor? conv_bias, " FCB_UPDATED ", " FCB_WINDOW
        ", *, " FCB_EPILOGUE
        ", bool allow_tf32=False) -> (Tensor output, Tensor mean, Tensor invstd, Tensor input_sums)");

  // Gradients of what is before the epilogue's residual_last: y = activation(affine(input) + residual), the affine as bn_scale's
  // with var, as bn_scale_train's with invstd, and as scale_shift's with neither. Each of them in its parameter's dtype; those
  // that are not asked for are undefined. result is y, for activations whose derivatives it tells.
#define FCB_BACKWARD_EPILOGUE "str activation='none', float negative_slope=0.01"
  m.def(
      "bn_scale_backward(Tensor dy, Tensor? input, Tensor? result, Tensor? residual, Tensor? mean, Tensor? var, "
      "Tensor? invstd, Tensor? weight, Tensor? bias, Tensor? conv_bias, float scaling_factor, float eps, "
      "*, " FCB_BACKWARD_EPILOGUE
      ", bool needs_input=False, bool needs_weight=False, bool needs_bias=False, bool needs_conv_bias=False, "
      "bool needs_residual=False) -> (Tensor dinput, Tensor dweight, Tensor dbias, Tensor dconv_bias, Tensor "
      "dresidual)");
  // In two, for a batch that lies in several processes: sums is [2, C] in float64, sum(dv) and sum(dv * (input - mean)), and to
  // be added up over them. mean and invstd are those of the whole batch; count, in float64, says how many values each channel
  // has in it.
  m.def(
      "bn_scale_backward_sums(Tensor dy, Tensor input, Tensor? result, Tensor? residual, Tensor mean, Tensor invstd, "
      "Tensor? weight, Tensor? bias, float scaling_factor, *, " FCB_BACKWARD_EPILOGUE
      ", bool needs_weight=False, bool needs_bias=False) -> (Tensor sums, Tensor dweight, Tensor dbias)");
  m.def(
      "bn_scale_backward_apply(Tensor dy, Tensor input, Tensor? result, Tensor? residual, Tensor mean, Tensor invstd, "
      "Tensor? weight, Tensor? bias, Tensor sums, Tensor count, float scaling_factor, *, " FCB_BACKWARD_EPILOGUE
      ", bool needs_residual=False) -> (Tensor dinput, Tensor dresidual)");
#undef FCB_BACKWARD_EPILOGUE
  // Of each channel how many values it has, their mean, and the sum of their squared distances from it: [3, C] in float64.
  m.def("bn_moments(Tensor input) -> Tensor");

  // The compute capabilities that the loaded CUDA library has code for; no kernel without one.
  m.def("cuda_archs() -> str");
}
