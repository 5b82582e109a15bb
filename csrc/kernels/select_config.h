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

// Where an algorithm is faster than PyTorch's convolution with the epilogue behind it. Measured on an H200 against torch
// 2.11 with cuDNN 9.19, ReLU, batch 1 to 128; the numbers are times of PyTorch's way over ours.
inline bool is_faster(ConvAlgorithm algorithm, const ConvProblem& c) {
  const int64_t pixels = c.N * c.P * c.Q;
  switch (algorithm) {
    case ConvAlgorithm::hopper:
      // Times of few_channels over ours, batch 32 and 128: 1.4 to 2.2 in 16 bits, 1.1 to 1.9 in float32, but for 32 channels at
      // stride 1 0.9 and 1.0. Fewer pixels than those, 10^5 and more, were not measured.
      return c.C <= 16 && c.R * c.S > 1 && pixels >= 100000 && !(c.element_bytes == 4 && c.K <= 32 && c.stride_w == 1);
    case ConvAlgorithm::few_channels:
      if (c.C > 16) {  // 3x3 of 32 channels: 0.74 to 0.91, but for 16-bit contiguous ones, 1.5
        return false;
      }
      // 3x3, 5x5 and 7x7: 1.4 to 4.6. Images of a batch of 1, which leave most of the GPU idle: 1.07 to 3.8 in 16 bits, but 0.72
      // to 0.97 in float32, where the patch is loaded more often than it is multiplied.
      if (c.R * c.S > 1) {
        return c.element_bytes == 2 || pixels >= 20000;
      }
      // 1x1, which is a matrix product of little depth: channels_last 1.5 and 1.6, contiguous 0.9 and 1.3.
      return c.channels_last && pixels >= 1 << 17;
    case ConvAlgorithm::depthwise:
      if (!c.channels_last) {  // 1.06 to 4.2, a few small planes 0.76
        return c.N * c.C * c.P * c.Q >= 1 << 18;
      }
      // 16 bits: 1.2 to 2.2, 5x5 of stride 1 with a batch of 16 1.0. float32: 1.0 to 3.1, but in small ones 0.43 to 1.0.
      return c.element_bytes == 2 || c.N * c.C * c.P * c.Q >= 1 << 19;
    case ConvAlgorithm::aten:
      break;
  }
  return false;
}

inline ConvConfig select_config(const ConvProblem& problem, const GpuTraits& gpu) {
  for (const ConvAlgorithm algorithm : {ConvAlgorithm::hopper, ConvAlgorithm::few_channels, ConvAlgorithm::depthwise}) {
    if (is_faster(algorithm, problem)) {
      if (const std::optional<ConvConfig> config = configure(algorithm, problem, gpu)) {
        return *config;
      }
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
