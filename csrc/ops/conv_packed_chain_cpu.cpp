// _conv_packed_chain: consecutive convolutions of _conv_packed as one op, with the means and gates of squeeze-and-excite blocks
// between them. What lies between two steps shares one piece of memory, so that it stays in the caches.
#include <algorithm>
#include <array>
#include <sstream>

#include "conv_packed.h"
#include "kernels/conv/packed_cpu/mean.h"
#include "torch/checks.h"

#if defined(__x86_64__)

namespace fused_conv_bn {
namespace {

constexpr const char* kOp = "_conv_packed_chain";

enum StepKind : int64_t { kConv, kDepthwise, kMean, kGate, kKinds };

// A row of `steps`, whose numbers are in this order. Values are numbered: the inputs, then each step's result.
struct Step {
  int64_t kind;
  int64_t input, residual, gate;  // values; -1: none
  int64_t weight, shift, slope;   // where in `packed` they begin
  int64_t channels, filters, filter_h, filter_w;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t activation;  // of the op's names
  int64_t residual_last;
  int64_t is_result;
};
constexpr int64_t kNumbers = 20;
static_assert(sizeof(Step) == kNumbers * sizeof(int64_t));

// A channels_last tensor of float32.
struct Value {
  std::array<int64_t, 4> sizes;  // N, C, H, W
  int64_t last_reader;
  float* data = nullptr;
  int64_t at = 0;  // where it begins in the memory that is shared

  int64_t numel() const { return sizes[0] * sizes[1] * sizes[2] * sizes[3]; }
};

// Places in memory that is shared by values of which not all live at once.
class Places {
 public:
  // As near to the beginning as it fits.
  int64_t take(int64_t size) {
    size = round_up(size, kLineBytes / static_cast<int64_t>(sizeof(float)));
    int64_t at = 0;
    auto next = taken_.begin();
    for (; next != taken_.end() && next->first - at < size; ++next) {
      at = next->second;
    }
    taken_.insert(next, {at, at + size});
    size_ = std::max(size_, at + size);
    return at;
  }
  void give_back(int64_t at) {
    std::erase_if(taken_, [&](const auto& place) { return place.first == at; });
  }
  int64_t size() const { return size_; }

 private:
  std::vector<std::pair<int64_t, int64_t>> taken_;  // [first, last), in their order
  int64_t size_ = 0;
};

std::vector<Epilogue> epilogues(const std::string& activations) {
  std::vector<Epilogue> result;
  std::istringstream names(activations);
  const OptionalTensor no_residual;
  for (std::string name; std::getline(names, name, ',');) {
    result.push_back(check_epilogue(kOp, {no_residual, name, 0, false}));
  }
  return result;
}

Conv2d problem_of(const Step& s, const Value& x) {
  Conv2d p{};
  p.N = x.sizes[0], p.C = x.sizes[1], p.H = x.sizes[2], p.W = x.sizes[3], p.K = s.filters;
  p.R = s.filter_h, p.S = s.filter_w;
  p.stride_h = s.stride_h, p.stride_w = s.stride_w, p.pad_h = s.pad_h, p.pad_w = s.pad_w;
  p.dilation_h = s.dilation_h, p.dilation_w = s.dilation_w;
  set_output_size(p);
  return p;
}

// The sizes of a step's result, after all checks. Of two factors the smaller one is the gate.
std::array<int64_t, 4> sizes_of(Step& s, const std::vector<Value>& values, int64_t numbers, size_t activations) {
  const auto known = [&](int64_t v) { return v >= 0 && v < static_cast<int64_t>(values.size()); };
  const auto fits = [&](int64_t at, int64_t count) { return at >= 0 && count >= 0 && at <= numbers - count; };
  bool good = s.kind >= 0 && s.kind < kKinds && known(s.input) && (s.residual == -1 || known(s.residual)) &&
              (s.kind == kGate) == (s.gate != -1) && (s.gate == -1 || known(s.gate)) && s.activation >= 0 &&
              s.activation < static_cast<int64_t>(activations) && fits(s.slope, 1);
  if (!good) {
    fail(kOp, ": steps is no list of steps that follow each other");
  }
  if (s.kind == kGate && values[s.input].numel() < values[s.gate].numel()) {
    std::swap(s.input, s.gate);
  }
  const Value& x = values[s.input];
  std::array<int64_t, 4> sizes = x.sizes;
  if (s.kind == kMean) {
    sizes[2] = sizes[3] = 1;
    good = s.residual == -1;
  } else if (s.kind == kGate) {
    good = values[s.gate].sizes == std::array<int64_t, 4>{sizes[0], sizes[1], 1, 1};
  } else {
    good = std::min({s.filters, s.filter_h, s.filter_w, s.stride_h, s.stride_w, s.dilation_h, s.dilation_w}) > 0 &&
           std::min(s.pad_h, s.pad_w) >= 0 && x.sizes[1] == s.channels;
    const Conv2d p = good ? problem_of(s, x) : Conv2d{};
    const int64_t channels = round_up(s.filters, packed_kernel().channels);
    const int64_t weights = p.R * p.S * (s.kind == kDepthwise ? p.C : p.C * channels);
    good = good && p.P > 0 && p.Q > 0 && (s.kind == kDepthwise ? takes_depthwise(p) : p.dilation_w == 1) &&
           fits(s.weight, weights) && fits(s.shift, channels);
    sizes = {p.N, p.K, p.P, p.Q};
  }
  if (!good || (s.residual != -1 && values[s.residual].sizes != sizes)) {
    fail(kOp, ": a step has an input of shape ", list_text(x.sizes.data(), 4), ", and is not for it");
  }
  return sizes;
}

std::vector<Tensor> conv_packed_chain(std::vector<Tensor> inputs, Tensor packed, Tensor steps,
                                      StringHandle activations) {
  std::vector<Epilogue> known = epilogues(take_string(activations));
  const Operand numbers("packed", packed), rows("steps", steps);
  const bool are_steps = rows.dtype == ScalarType::Long && rows.device.is_cpu() && rows.dim == 2 &&
                         rows.sizes[1] == kNumbers && is_dense(rows) && numbers.device.is_cpu() &&
                         numbers.dtype == ScalarType::Float && numbers.dim == 1 && is_dense(numbers);
  if (!use_v3() || !are_steps) {
    fail(kOp, ": steps has shape ", rows.shape(), ", expected rows of ", kNumbers, " numbers");
  }
  const auto* const first = static_cast<const Step*>(steps.data_ptr());
  const auto* const data = static_cast<const float*>(packed.data_ptr());
  std::vector<Step> list(first, first + rows.sizes[0]);
  const auto inputs_count = static_cast<int64_t>(inputs.size());

  // What there is, and for how long.
  std::vector<OptionalTensor> copies(inputs.size());
  std::vector<Value> values;
  values.reserve(inputs.size() + list.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Operand x("inputs", inputs[i]);
    if (x.dim != 4 || x.dtype != ScalarType::Float || !x.device.is_cpu() || x.numel == 0) {
      fail(kOp, ": inputs has a tensor of shape ", x.shape(), ", expected four dimensions in float32 on the CPU");
    }
    Value& value = values.emplace_back();
    std::copy_n(x.sizes, 4, value.sizes.begin());
    value.data = const_cast<float*>(channels_last_data(x, copies[i]));
  }
  for (size_t i = 0; i < list.size(); ++i) {
    Step& s = list[i];
    Value value{};
    value.sizes = sizes_of(s, values, numbers.numel, known.size());
    for (const int64_t read : {s.input, s.residual, s.gate}) {
      if (read >= 0) {
        values[read].last_reader = static_cast<int64_t>(i);
      }
    }
    values.push_back(value);
  }

  // Where it is. A gate may write to what it reads.
  std::vector<Tensor> results;
  Places places;
  for (size_t i = 0; i < list.size(); ++i) {
    const Step& s = list[i];
    Value& value = values[inputs.size() + i];
    const auto ends_here = [&](int64_t v) {
      return v >= inputs_count && !list[v - inputs_count].is_result && values[v].last_reader == static_cast<int64_t>(i);
    };
    const bool in_place = s.kind == kGate && !s.is_result && ends_here(s.input) && s.residual != s.input;
    if (s.is_result) {
      const Strides strides = dense_strides(4, value.sizes.data(), true);
      results.push_back(empty_strided(4, value.sizes.data(), strides.data(), ScalarType::Float, rows.device));
      value.data = static_cast<float*>(results.back().data_ptr());
    } else {
      value.at = in_place ? values[s.input].at : places.take(value.numel());
    }
    for (const int64_t read : {s.input, s.residual, s.gate}) {
      if (ends_here(read) && !(in_place && read == s.input)) {
        places.give_back(values[read].at);
      }
    }
  }
  const int64_t size[] = {places.size()}, one[] = {1};
  const Tensor shared = empty_strided(1, size, one, ScalarType::Float, rows.device);
  for (size_t i = 0; i < list.size(); ++i) {
    if (!list[i].is_result) {
      values[inputs.size() + i].data = static_cast<float*>(shared.data_ptr()) + values[inputs.size() + i].at;
    }
  }

  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  for (size_t i = 0; i < list.size(); ++i) {
    const Step& s = list[i];
    const Value& x = values[s.input];
    const Value& y = values[inputs.size() + i];
    const float* const residual = s.residual < 0 ? nullptr : values[s.residual].data;
    Epilogue epilogue = known[s.activation];
    epilogue.negative_slope = data[s.slope];
    epilogue.residual_last = s.residual_last != 0;
    const int64_t pixels = x.sizes[2] * x.sizes[3];
    if (s.kind == kMean) {
      launch_mean(x.data, y.data, x.sizes[0], pixels, x.sizes[1], parallel_for);
    } else if (s.kind == kGate) {
      launch_gate(x.data, values[s.gate].data, residual, y.data, {y.numel(), x.sizes[1], 1}, pixels, epilogue,
                  parallel_for);
    } else {
      const Conv2d p = problem_of(s, x);
      const PackedCall call{.problem = p,
                            .x = x.data,
                            .weight = data + s.weight,
                            .shift = data + s.shift,
                            .residual = residual,
                            .y = y.data,
                            .epilogue = epilogue,
                            .threads = threads};
      run_packed(call, s.kind == kDepthwise);
    }
  }
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_conv_bn, CPU, m) { m.impl("_conv_packed_chain", TORCH_BOX(&conv_packed_chain)); }

}  // namespace fused_conv_bn

#endif
