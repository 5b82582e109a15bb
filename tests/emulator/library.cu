// What tests call of the emulated kernels (emulated.py): the ops' own sequences of launches, with memory from here.
#include <algorithm>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include "kernels/batch_norm/backward.cuh"
#include "kernels/conv/train.cuh"
#include "kernels/conv/wgrad_stem_sm80/operands.h"
#include "kernels/conv/wgrad_stem_sm80/plan.h"
#include "kernels/pooling/launch.cuh"
#include "machine.h"

namespace fused_conv_bn {
namespace {

constexpr int kMultiprocessors = 3;  // so few that blocks have several tiles of a small problem
constexpr int kCapability = __CUDA_ARCH__ / 10;
constexpr bool kLarge = kCapability == 90 || kCapability == 100;
const GpuTraits kGpu{kCapability, kMultiprocessors, kLarge ? 232448 : 101376, kLarge ? 233472 : 102400,
                     kCapability == 90};

template <typename F>
cudaError_t dispatch_element(Element element, const F& f) {
  return element == Element::float32 ? f(float()) : element == Element::float16 ? f(float16()) : f(bfloat16());
}

// For tests: nullptr if all went well, else what is the matter.
const char* answer(cudaError_t status) {
  static std::string message;
  if (status == cudaSuccess) {
    return nullptr;
  }
  message = emulated::problem().empty() ? "the launch was refused" : emulated::problem();
  return message.c_str();
}

void allow_affine(const AffineTensors& affine, int64_t channels, size_t bytes) {
  for (const void* values : {affine.mean, affine.var, affine.weight, affine.bias, affine.conv_bias}) {
    emulated::allow(values, static_cast<size_t>(channels) * bytes);
  }
}

void allow_operands(const Conv2d& c, const ConvOperands& o) {
  const auto elements = [&](int64_t count) { return static_cast<size_t>(count * c.element_bytes); };
  emulated::allow(o.x, elements(c.N * c.C * c.H * c.W));
  const int64_t last_weight = (c.K - 1) * o.w_stride_k + (c.C / c.groups - 1) * o.w_stride_c +
                              (c.R - 1) * o.w_stride_r + (c.S - 1) * o.w_stride_s;
  emulated::allow(o.w, elements(last_weight + 1));
  emulated::allow(o.residual, elements(c.N * c.K * c.P * c.Q));
  emulated::allow(o.y, elements(c.N * c.K * c.P * c.Q));
  emulated::allow(o.gates, elements(c.N * c.C));
  emulated::allow(o.means, elements(c.N * c.K));
  allow_affine(o.affine, c.K, static_cast<size_t>(o.affine.wide ? 4 : c.element_bytes));
}

struct SqueezeNumbers {
  const void* weight1;
  const void* bias1;
  const void* weight2;
  const void* bias2;
  Activation activation;
  Activation gate;
  double negative_slope;
};

size_t bytes_of(Element element) { return element == Element::float64 ? 8 : element == Element::float32 ? 4 : 2; }

void allow_channels(const TrainParams& bn, int64_t channels) {
  for (const ChannelBuffer* b : {&bn.running_mean, &bn.running_var, &bn.weight, &bn.bias, &bn.conv_bias}) {
    emulated::allow(b->data, static_cast<size_t>((channels - 1) * b->stride + 1) * bytes_of(b->element));
  }
}

void allow_saved(const TrainParams& bn, int64_t channels, size_t bytes) {
  for (const void* values : {bn.saved_mean, bn.saved_invstd}) {
    emulated::allow(values, static_cast<size_t>(channels) * bytes);
  }
}

std::vector<double> make_workspace(int64_t doubles) {
  std::vector<double> workspace(static_cast<size_t>(doubles));
  emulated::allow(workspace.data(), workspace.size() * sizeof(double));
  return workspace;
}

// A layout of gemm_sm90 that a test asks for, on a GPU of its own; what came of it. No splits: with halos.
struct GemmSm90Layout {
  int tile, splits, multiprocessors, shared_memory;
  int stages, buffers, rounds;  // rounds: tiles of a block, or of a cluster
  bool resident;
};

std::optional<ConvPlan> make_plan(GemmSm90Layout& asked, const Conv2d& c) {
  const GpuTraits gpu{90, asked.multiprocessors, asked.shared_memory, asked.shared_memory + 1024, true};
  if (!gemm_sm90::supports(c, gpu)) {
    return std::nullopt;
  }
  const int row_bytes = gemm_sm90::row_bytes_of(c, gemm_sm90::kTiles[asked.tile]);
  const auto l = asked.splits == 0   ? gemm_sm90::lay_out_halo(c, gpu, asked.tile, row_bytes)
                 : asked.splits == 1 ? gemm_sm90::lay_out(c, gpu, asked.tile, row_bytes)
                                     : gemm_sm90::lay_out_split(c, gpu, asked.tile, asked.splits, row_bytes);
  if (!l.has_value()) {
    return std::nullopt;
  }
  asked.stages = l->stages;
  asked.buffers = l->buffers;
  asked.rounds = static_cast<int>(ceil_div(
      ceil_div(gemm_sm90::count_pixels(c, *l), gemm_sm90::kTiles[asked.tile].block_pixels()), l->blocks_of_filters));
  asked.resident = l->resident;
  return GemmSm90{*l};
}

}  // namespace

extern "C" {

int emulated_gemm_sm90_tiles() { return gemm_sm90::kTileCount; }
bool emulated_gemm_sm90_fits(const Conv2d* problem, GemmSm90Layout* layout) {
  return make_plan(*layout, *problem).has_value();
}

// Whether a problem of any dimensions is one of two.
bool emulated_narrow(const ConvProblem* whole, Conv2d* problem) {
  const std::optional<Conv2d> narrow = narrow_to_2d(*whole);
  *problem = narrow.value_or(Conv2d{});
  return narrow.has_value();
}
void emulated_set_weight(ConvOperands* operands, const void* data, int64_t dim, const int64_t* sizes,
                         const int64_t* strides) {
  operands->set_weight(data, dim, sizes, strides);
}

// Of the last call.
int emulated_launches() { return static_cast<int>(emulated::launches()); }

// Whether gemm_sm90 takes gates along by its rule, on an H200.
bool emulated_has_faster_gates(const Conv2d* problem) {
  const std::optional<GemmSm90> plan = GemmSm90::make(*problem, {90, 132, 232448, 233472, true});
  return plan.has_value() && plan->takes_gates(*problem) && plan->has_faster_gates(*problem);
}

// layout: of gemm_sm90, or nullptr for the algorithm's choice.
const char* emulated_conv(const Conv2d* problem, const ConvOperands* operands, int element, const Epilogue* epilogue,
                          const char* algorithm, GemmSm90Layout* layout, uint64_t seed) {
  const std::optional<ConvPlan> plan = layout == nullptr ? make_plan(algorithm, *problem, kGpu)
                                                         : make_plan(*layout, *problem);
  if (!plan.has_value() || (operands->gates != nullptr && !takes_gates(*plan, *problem, true)) ||
      (operands->means != nullptr && !parts_of_means(*plan, *problem, kGpu))) {
    return "not covered";
  }
  emulated::begin(seed);
  allow_operands(*problem, *operands);
  ConvOperands given = *operands;
  std::vector<float> sums;
  if (operands->means != nullptr) {  // NaN where nobody writes
    const int64_t count = problem->N * problem->K * *parts_of_means(*plan, *problem, kGpu);
    sums.assign(static_cast<size_t>(count), std::numeric_limits<float>::quiet_NaN());
    given.sums = count > 0 ? sums.data() : nullptr;
    emulated::allow(given.sums, sums.size() * sizeof(float));
  }
  const ConvCall call{*problem, given, kGpu, *epilogue};
  return answer(dispatch_element(static_cast<Element>(element),
                                 [&](auto tag) { return launch_conv<decltype(tag)>(*plan, call, nullptr); }));
}

// statistics: a name of kConvStatistics. layout: as above.
const char* emulated_conv_train(const Conv2d* problem, const ConvOperands* operands, const TrainParams* bn,
                                const Epilogue* epilogue, int element, const char* algorithm, GemmSm90Layout* layout,
                                const char* statistics, uint64_t seed) {
  const Conv2d& c = *problem;
  const std::optional<ConvPlan> plan = layout == nullptr ? make_plan(algorithm, c, kGpu) : make_plan(*layout, c);
  const auto source = std::find_if(std::begin(kConvStatistics), std::end(kConvStatistics),
                                   [&](const auto& known) { return known.first == std::string(statistics); });
  if (!plan.has_value() || !has_statistics(source->second, *plan, c, kGpu)) {
    return "not covered";
  }
  emulated::begin(seed);
  allow_operands(c, *operands);
  allow_channels(*bn, c.K);
  allow_saved(*bn, c.K, sizeof(float));
  return answer(dispatch_element(static_cast<Element>(element), [&](auto tag) {
    using T = decltype(tag);
    const auto train = ConvTrainPlan<T>::make({*plan, source->second}, c, kGpu, static_cast<T*>(operands->y));
    std::vector<double> workspace = make_workspace(train.workspace(c));
    return train.launch({c, *operands, kGpu, *epilogue}, *bn, workspace.data(), nullptr);
  }));
}

const char* emulated_conv_wgrad(const Conv2d* problem, const WgradOperands* operands, int element, uint64_t seed) {
  const Conv2d& c = *problem;
  const WgradOperands& o = *operands;
  const auto plan = WgradStemSm80::make(c, kGpu, o.result != nullptr, o.has_statistics, o.input_sums != nullptr);
  if (!plan.has_value()) {
    return "not covered";
  }
  emulated::begin(seed);
  const auto elements = [&](int64_t count) { return static_cast<size_t>(count * c.element_bytes); };
  emulated::allow(o.x, elements(c.N * c.C * c.H * c.W));
  for (const void* data : {o.dy, o.result}) {
    emulated::allow(data, elements(c.N * c.K * c.P * c.Q));
  }
  for (const void* data : {o.w.data, o.dw.data, o.scaled_weight.data}) {
    emulated::allow(data, elements(c.K * c.C * c.R * c.S));
  }
  for (const ChannelBuffer* b : {&o.mean, &o.var, &o.weight, &o.conv_bias, &o.dweight, &o.dbias, &o.dconv_bias,
                                 &o.input_scale, &o.input_shift}) {
    emulated::allow(b->data, static_cast<size_t>(c.K) * bytes_of(b->element));
  }
  std::vector<double> workspace = make_workspace(plan->workspace());
  return answer(dispatch_element(static_cast<Element>(element), [&](auto tag) {
    return plan->launch<decltype(tag)>({c, o, kGpu}, workspace.data(), nullptr);
  }));
}

// x, the residual and y: dense, with the given shape.
const char* emulated_bn_scale_train(const void* x, const void* residual, void* y, const Shape* shape,
                                    const TrainParams* bn, const Epilogue* epilogue, int element, uint64_t seed) {
  emulated::begin(seed);
  const auto type = static_cast<Element>(element);
  for (const void* data : {x, residual, static_cast<const void*>(y)}) {
    emulated::allow(data, static_cast<size_t>(shape->numel) * bytes_of(type));
  }
  allow_channels(*bn, shape->channels);
  allow_saved(*bn, shape->channels, type == Element::float64 ? 8 : 4);
  const auto run = [&](auto tag) {
    using T = decltype(tag);
    const auto plan = BnTrainPlan<T>::make(static_cast<const T*>(x), *shape, kMultiprocessors);
    std::vector<double> workspace = make_workspace(plan.workspace());
    return plan.launch(static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<T*>(y), *bn, *epilogue,
                       workspace.data(), nullptr);
  };
  return answer(type == Element::float64 ? run(double()) : dispatch_element(type, run));
}

// Operands of bn_scale_backward by address; what belongs to the channels is in `bn`, and for evaluation in `affine` too. given:
// sums, or nullptr.
const char* emulated_backward(const BackwardTensors<void>* tensors, const Shape* shape, const BackwardParams* bn,
                              const AffineTensors* affine, const Epilogue* epilogue, const double* given, int element,
                              uint64_t seed) {
  emulated::begin(seed);
  const auto type = static_cast<Element>(element);
  const auto& t = *tensors;
  for (const void* data : {t.dy, t.z, t.other, static_cast<const void*>(t.dz), static_cast<const void*>(t.dresidual)}) {
    emulated::allow(data, static_cast<size_t>(shape->numel) * bytes_of(type));
  }
  for (const ChannelBuffer* b : {&bn->mean, &bn->var, &bn->invstd, &bn->weight, &bn->bias, &bn->conv_bias, &bn->counts,
                                 &bn->dweight, &bn->dbias, &bn->dconv_bias}) {
    emulated::allow(b->data, static_cast<size_t>(shape->channels) * bytes_of(b->element));
  }
  for (const double* sums : {given, static_cast<const double*>(bn->sums)}) {
    emulated::allow(sums, 2 * static_cast<size_t>(shape->channels) * sizeof(double));
  }
  allow_affine(*affine, shape->channels, affine->wide ? (type == Element::float64 ? 8 : 4) : bytes_of(type));
  const auto run = [&](auto tag) {
    using T = decltype(tag);
    const BackwardTensors<T> typed{static_cast<const T*>(t.dy),    static_cast<const T*>(t.z),
                                   static_cast<const T*>(t.other), static_cast<T*>(t.dz),
                                   static_cast<T*>(t.dresidual),   t.from_result};
    const auto plan = BnBackwardPlan<T>::make(typed, *shape, *bn, given != nullptr, kMultiprocessors);
    std::vector<double> workspace = make_workspace(plan.workspace());
    return plan.launch(typed, *bn, *affine, *epilogue, given, workspace.data(), nullptr);
  };
  return answer(type == Element::float64 ? run(double()) : dispatch_element(type, run));
}

const char* emulated_elementwise(const void* x, const void* residual, void* y, const Shape* shape,
                                 const AffineTensors* affine, const Epilogue* epilogue, int element, uint64_t seed) {
  emulated::begin(seed);
  const auto type = static_cast<Element>(element);
  for (const void* data : {x, residual, static_cast<const void*>(y)}) {
    emulated::allow(data, static_cast<size_t>(shape->numel) * bytes_of(type));
  }
  allow_affine(*affine, shape->channels, affine->wide ? (type == Element::float64 ? 8 : 4) : bytes_of(type));
  const auto run = [&](auto tag) {
    using T = decltype(tag);
    return launch_scale_shift(static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<T*>(y), *shape,
                              *affine, *epilogue, nullptr);
  };
  return answer(type == Element::float64 ? run(double()) : dispatch_element(type, run));
}

// parts: their data, and the channel of the result that each begins with, and one behind the last.
const char* emulated_cat(const void* const* parts, const uint32_t* first, int count, void* y, const Shape* shape,
                         const AffineTensors* affine, const Epilogue* epilogue, int element, uint64_t seed) {
  emulated::begin(seed);
  const auto type = static_cast<Element>(element);
  Parts<void> all;
  all.count = count;
  std::copy_n(parts, count, all.data);
  std::copy_n(first, count + 1, all.first);
  const int64_t pixels = shape->numel / shape->channels;
  for (int i = 0; i < count; ++i) {
    emulated::allow(parts[i], static_cast<size_t>(pixels * (first[i + 1] - first[i])) * bytes_of(type));
  }
  emulated::allow(y, static_cast<size_t>(shape->numel) * bytes_of(type));
  allow_affine(*affine, shape->channels, affine->wide ? (type == Element::float64 ? 8 : 4) : bytes_of(type));
  const auto run = [&](auto tag) {
    using T = decltype(tag);
    return launch_cat(Parts<T>(all), static_cast<T*>(y), *shape, *affine, *epilogue, nullptr);
  };
  return answer(type == Element::float64 ? run(double()) : dispatch_element(type, run));
}

const char* emulated_gate(const void* x, const void* gate, const void* residual, void* y, const Shape* shape,
                          int64_t pixels, const Epilogue* epilogue, int element, uint64_t seed) {
  emulated::begin(seed);
  const auto type = static_cast<Element>(element);
  for (const void* data : {x, residual, static_cast<const void*>(y)}) {
    emulated::allow(data, static_cast<size_t>(shape->numel) * bytes_of(type));
  }
  emulated::allow(gate, static_cast<size_t>(shape->numel / pixels) * bytes_of(type));
  const auto run = [&](auto tag) {
    using T = decltype(tag);
    return launch_gate(static_cast<const T*>(x), static_cast<const T*>(gate), static_cast<const T*>(residual),
                       static_cast<T*>(y), *shape, pixels, *epilogue, nullptr);
  };
  return answer(type == Element::float64 ? run(double()) : dispatch_element(type, run));
}

const char* emulated_max_pool(const void* x, void* y, const PoolProblem* problem, int element, uint64_t seed) {
  emulated::begin(seed);
  const auto type = static_cast<Element>(element);
  const PoolWindow &rows = problem->rows, &columns = problem->columns;
  const auto bytes = static_cast<size_t>(problem->images * problem->channels) * bytes_of(type);
  emulated::allow(x, bytes * static_cast<size_t>(rows.input * columns.input));
  emulated::allow(y, bytes * static_cast<size_t>(rows.output * columns.output));
  const auto run = [&](auto tag) {
    using T = decltype(tag);
    return launch_max_pool(static_cast<const T*>(x), static_cast<T*>(y), *problem, kMultiprocessors, nullptr);
  };
  return answer(type == Element::float64 ? run(double()) : dispatch_element(type, run));
}

const char* emulated_max_pool_train(const void* x, void* y, uint8_t* position, const PoolProblem* problem, int element,
                                    uint64_t seed) {
  emulated::begin(seed);
  const auto type = static_cast<Element>(element);
  const PoolWindow &rows = problem->rows, &columns = problem->columns;
  const auto lines = static_cast<size_t>(problem->images * problem->channels);
  const auto inputs = lines * static_cast<size_t>(rows.input * columns.input);
  const auto outputs = lines * static_cast<size_t>(rows.output * columns.output);
  emulated::allow(x, inputs * bytes_of(type));
  emulated::allow(y, outputs * bytes_of(type));
  emulated::allow(position, outputs);
  const auto run = [&](auto tag) {
    using T = decltype(tag);
    return launch_max_pool_train(static_cast<const T*>(x), static_cast<T*>(y), position, *problem, kMultiprocessors,
                                 nullptr);
  };
  return answer(type == Element::float64 ? run(double()) : dispatch_element(type, run));
}

const char* emulated_max_pool_backward(const void* dy, const uint8_t* position, void* dx, const PoolProblem* problem,
                                       int element, uint64_t seed) {
  emulated::begin(seed);
  const auto type = static_cast<Element>(element);
  const PoolWindow &rows = problem->rows, &columns = problem->columns;
  const auto lines = static_cast<size_t>(problem->images * problem->channels);
  const auto inputs = lines * static_cast<size_t>(rows.input * columns.input);
  const auto outputs = lines * static_cast<size_t>(rows.output * columns.output);
  emulated::allow(dy, outputs * bytes_of(type));
  emulated::allow(position, outputs);
  emulated::allow(dx, inputs * bytes_of(type));
  const auto run = [&](auto tag) {
    using T = decltype(tag);
    return launch_max_pool_backward(static_cast<const T*>(dy), position, static_cast<T*>(dx), *problem,
                                    kMultiprocessors, nullptr);
  };
  return answer(type == Element::float64 ? run(double()) : dispatch_element(type, run));
}

const char* emulated_spatial_mean(const void* x, void* y, int64_t images, int64_t pixels, int64_t channels, int element,
                                  uint64_t seed) {
  emulated::begin(seed);
  const auto type = static_cast<Element>(element);
  const auto bytes = static_cast<size_t>(images * channels) * bytes_of(type);
  emulated::allow(x, bytes * static_cast<size_t>(pixels));
  emulated::allow(y, bytes);
  const auto run = [&](auto tag) {
    using T = decltype(tag);
    return launch_spatial_mean(static_cast<const T*>(x), static_cast<T*>(y), images, pixels, channels, kMultiprocessors,
                               nullptr);
  };
  return answer(type == Element::float64 ? run(double()) : dispatch_element(type, run));
}

// The sequence of launches, with room for the means. "not covered": the kernel's shared memory is too small.
const char* emulated_squeeze(const void* x, const SqueezeNumbers* numbers, void* y, const SqueezeProblem* problem,
                             int element, uint64_t seed) {
  emulated::begin(seed);
  const auto type = static_cast<Element>(element);
  const SqueezeProblem& s = *problem;
  const auto allow = [&](const void* data, int64_t elements) {
    emulated::allow(data, data == nullptr ? 0 : static_cast<size_t>(elements) * bytes_of(type));
  };
  allow(x, s.images * s.pixels * s.channels);
  allow(numbers->weight1, s.hidden * s.channels);
  allow(numbers->bias1, s.hidden);
  allow(numbers->weight2, s.outputs * s.hidden);
  allow(numbers->bias2, s.outputs);
  allow(y, s.images * s.outputs);
  bool covered = true;
  const auto run = [&](auto tag) {
    using T = decltype(tag);
    covered = squeeze_covers<T>(s);
    if (!covered) {
      return cudaSuccess;
    }
    const auto data = [](const void* values) { return static_cast<const T*>(values); };
    const SqueezeOperands<T> operands{data(numbers->weight1), data(numbers->bias1), data(numbers->weight2),
                                      data(numbers->bias2),   numbers->activation,  numbers->gate,
                                      numbers->negative_slope};
    std::vector<T> means(squeeze_needs_means(data(x), s) ? static_cast<size_t>(s.images * s.channels) : 0);
    emulated::allow(means.data(), means.size() * sizeof(T));
    return launch_squeeze(data(x), operands, means.data(), static_cast<T*>(y), s, kMultiprocessors, nullptr);
  };
  const char* found = answer(type == Element::float64 ? run(double()) : dispatch_element(type, run));
  return covered ? found : "not covered";
}

}  // extern "C"
}  // namespace fused_conv_bn
