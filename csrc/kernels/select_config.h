// Which algorithm computes a convolution, by name and by rule.
//
// configure() knows each algorithm's domain; select_config() knows which of them to prefer. Both are pure: plain numbers
// in, a configuration out, no GPU needed.
#pragma once

#include <optional>
#include <string>
#include <utility>

#include "conv_config.h"

namespace fused_conv_bn {

constexpr std::pair<const char*, ConvAlgorithm> kConvAlgorithms[] = {{"aten", ConvAlgorithm::aten},
                                                                     {"hopper", ConvAlgorithm::hopper},
                                                                     {"few_channels", ConvAlgorithm::few_channels},
                                                                     {"depthwise", ConvAlgorithm::depthwise}};

constexpr std::pair<const char*, ConvStatistics> kConvStatistics[] = {{"results", ConvStatistics::results},
                                                                      {"patches", ConvStatistics::patches}};

// Of one of these lists.
template <typename Value, size_t kSize>
std::optional<Value> find_by_name(const std::pair<const char*, Value> (&list)[kSize], const std::string& name) {
  for (const auto& [known, value] : list) {
    if (name == known) {
      return value;
    }
  }
  return std::nullopt;
}

// The algorithm's configuration for a problem; nullopt if the problem is outside of its domain.
inline std::optional<ConvConfig> configure(ConvAlgorithm algorithm, const ConvProblem& problem, const GpuTraits& gpu) {
  ConvConfig config;
  config.algorithm = algorithm;
  switch (algorithm) {
    case ConvAlgorithm::aten:
      return config;
    case ConvAlgorithm::hopper:
      if (!hopper_supports(problem, gpu) || !hopper_best_tile(problem, gpu, true, config.hopper) ||
          !hopper_best_tile(problem, gpu, false, config.hopper_moments)) {
        return std::nullopt;
      }
      return config;
    case ConvAlgorithm::few_channels:
      if (!few_channels_supports(problem, gpu) || !few_channels_best_tile(problem, gpu, config.few_channels)) {
        return std::nullopt;
      }
      return config;
    case ConvAlgorithm::depthwise:
      if (gpu.compute_capability < 80 || !depthwise_supports(problem)) {
        return std::nullopt;
      }
      config.depthwise = plan_depthwise(problem, gpu.multiprocessors);
      return config;
  }
  return std::nullopt;
}

// Where an algorithm is faster than PyTorch's convolution with the epilogue behind it, ReLU's and SiLU's. Measured on an H200
// against torch 2.11 with cuDNN 9.19, under PyTorch's default flags, for 834 random problems: 1 to 16 channels and depthwise,
// filters of 1x1 to 7x7, batch 1 to 64, three dtypes, both layouts. By these rules 18 of them take more than 1.03 times PyTorch's
// time, 1.4 at most; the geometric mean over all is 1.06 times that of the best choice.
inline bool is_faster(const ConvConfig& config, const ConvProblem& c) {
  // Dense ones of more channels were not among them, and are PyTorch's: 3x3 of 64 takes 1.3 times its time, 2.0 in training.
  constexpr int64_t kMostChannels = 16;
  if (config.algorithm != ConvAlgorithm::depthwise && c.C > kMostChannels) {
    return false;
  }
  constexpr int64_t kLarge = 100000;              // pixels
  constexpr int64_t kFewChannelsMostTerms = 130;  // in float32
  const int64_t pixels = c.N * c.P * c.Q;
  const int64_t taps = c.R * c.S;
  const int64_t terms = c.C * taps;
  const bool float32 = c.element_bytes == 4;
  switch (config.algorithm) {
    case ConvAlgorithm::hopper: {
      const HopperTile& tile = config.hopper;
      const bool whole_rows = tile.q == c.Q;
      if (!float32) {
        // Single channels of few taps leave nothing to multiply. Contiguous: parts of rows cannot be copied in bulk, up to 1.3
        // times; small problems of few terms are few_channels'.
        return c.channels_last
                   ? c.C > 1 || taps >= 25
                   : whole_rows && taps > 1 && (pixels >= kLarge || terms >= 150 || (c.C == 1 && taps >= 25));
      }
      // Tiles of fewer pixels than a chunk has: up to 1.9 times. Few output channels leave half of the rows idle. Parts of
      // contiguous rows are worth it where few_channels is not: 7x7/2 of an image 129 us, PyTorch 364.
      const bool parts_fit = c.channels_last ? tile.p * tile.q >= 64
                                             : tile.p * tile.q >= kHopperChunk && taps >= 25 &&
                                                   terms > kFewChannelsMostTerms && pixels >= kLarge;
      const bool fits = whole_rows || parts_fit;
      const bool enough = c.C > 1 || taps >= 25 || pixels >= kLarge;
      const bool small = pixels < kLarge && c.C <= 2 && taps < 25 && c.K <= 64;
      return taps > 1 && fits && enough && !small && pixels >= 2000 &&
             (c.K >= 48 || (c.K >= 32 && (pixels < kLarge ? c.channels_last : c.stride_w > 1)));
    }
    case ConvAlgorithm::few_channels:
      if (taps == 1) {  // a matrix product of little depth: channels_last 1.5 and 1.6, contiguous 0.9 and 1.3
        return c.channels_last && pixels >= 1 << 17;
      }
      // float32 of many terms: up to 2.9 times PyTorch's time, TF32 being its default.
      return float32 ? pixels >= 20000 && terms <= kFewChannelsMostTerms && (c.C > 1 || pixels >= kLarge)
                     : c.C > 1 || pixels >= 20000;
    case ConvAlgorithm::depthwise:
      if (!c.channels_last) {
        return c.N * c.C * c.P * c.Q >= 1 << 18;
      }
      return !float32 || c.R == 3 || c.N * c.C * c.P * c.Q >= 1 << 14;
    case ConvAlgorithm::aten:
      break;
  }
  return false;
}

inline ConvConfig select_config(const ConvProblem& problem, const GpuTraits& gpu) {
  for (const ConvAlgorithm algorithm : {ConvAlgorithm::hopper, ConvAlgorithm::few_channels, ConvAlgorithm::depthwise}) {
    const std::optional<ConvConfig> config = configure(algorithm, problem, gpu);
    if (config.has_value() && is_faster(*config, problem)) {
      return *config;
    }
  }
  return *configure(ConvAlgorithm::aten, problem, gpu);
}

// Where a batch's statistics can come from.
inline bool has_statistics(ConvStatistics statistics, const ConvConfig& config, const ConvProblem& problem,
                           const GpuTraits& gpu) {
  return statistics == ConvStatistics::results ||
         (config.algorithm == ConvAlgorithm::hopper && patches_support(problem, gpu));
}

// Whether sums over the input take less time than the convolution. Measured on an H200 for 3x3 with 64 output channels, which
// make no difference to them: 8 channels 267 us of 313 in float32, 276 of 272 and 180 of 166 in 16 bits; 3 channels 266
// of 315 and 138 of 151. (That is for both passes.)
inline bool patches_are_faster(const ConvProblem& c) {
  return c.R == 3 && c.S == 3 && (c.element_bytes == 4 || c.C <= 4 || c.K > kHopperChannels);
}

inline ConvStatistics select_statistics(const ConvConfig& config, const ConvProblem& problem, const GpuTraits& gpu) {
  const bool patches = patches_are_faster(problem) && has_statistics(ConvStatistics::patches, config, problem, gpu);
  return patches ? ConvStatistics::patches : ConvStatistics::results;
}

// In words: the algorithm, its tile if it has one, and where statistics come from if not from results.
inline std::string config_text(const ConvConfig& config) {
  for (const auto& [name, algorithm] : kConvAlgorithms) {
    if (config.algorithm == algorithm) {
      std::string text = name;
      if (algorithm == ConvAlgorithm::few_channels) {
        const FewChannelsTile& t = config.few_channels;
        text.append(" ").append(std::to_string(t.channels)).append(" channels by ");
        text.append(std::to_string(t.p)).append("x").append(std::to_string(t.q)).append(" pixels");
      } else if (algorithm == ConvAlgorithm::hopper) {
        text.append(" ").append(std::to_string(config.hopper.p)).append("x").append(std::to_string(config.hopper.q));
        text.append(" pixels");
      } else if (algorithm == ConvAlgorithm::depthwise) {
        const DepthwisePlan& d = config.depthwise;
        if (d.channels > 0) {
          text.append(" ").append(std::to_string(d.channels)).append(" channels by ");
          text.append(std::to_string(d.tile_cols)).append(" columns");
        } else {
          text.append(" ").append(std::to_string(d.tile_rows)).append("x").append(std::to_string(d.tile_cols));
          text.append(" pixels");
        }
      }
      if (config.statistics == ConvStatistics::patches) {
        text.append(", statistics of patches");
      }
      return text;
    }
  }
  return "unknown";
}

}  // namespace fused_conv_bn
