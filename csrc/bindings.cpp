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

  m.def("scale_shift(Tensor input, Tensor? scale, Tensor? shift, *, " FCB_EPILOGUE ") -> Tensor");
  m.def("scale_shift.out(Tensor input, Tensor? scale, Tensor? shift, *, " FCB_EPILOGUE ", Tensor(a!) out) -> ()");
  m.def("scale_shift_(Tensor(a!) input, Tensor? scale, Tensor? shift, *, " FCB_EPILOGUE ") -> ()");

  m.def("conv_scale_shift(Tensor input, Tensor weight, Tensor? scale, Tensor? shift, " FCB_WINDOW ", *, " FCB_EPILOGUE
        ", bool allow_tf32=False) -> Tensor");
  m.def("conv_bn_scale(Tensor input, Tensor conv_weight, Tensor? conv_bias, " FCB_BN ", " FCB_WINDOW
        ", *, " FCB_EPILOGUE ", bool allow_tf32=False) -> Tensor");
  // What a convolution op would run, in words. _explain_problem: on CUDA, for a problem and a GPU, both as the numbers of
  // Conv2d and GpuTraits (kernels/conv/problem.h) in their order.
  m.def("_explain(Tensor input, Tensor weight, " FCB_WINDOW
        ", *, bool has_residual=False, bool has_statistics=False, bool allow_tf32=False) -> str");
  m.def("_explain_problem(int[] problem, int[] gpu, str algorithm='', str statistics='none') -> str");

  // What the calling thread's convolutions run on CUDA from now on; returns what it was. Names, 'by rule', 'default' for what
  // the environment says, and '' to leave it as it is. No kernel without a CUDA library: _check_algorithm checks the names.
  m.def("_use_algorithm(str algorithm, str statistics) -> (str algorithm, str statistics)");
  m.def("_check_algorithm(str algorithm, str statistics) -> ()");

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

  // The compute capabilities that the loaded CUDA library has code for; no kernel without one.
  m.def("cuda_archs() -> str");
}
