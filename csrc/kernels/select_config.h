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

constexpr std::pair<const char*, ConvAlgorithm> kConvAlgorithms[] = {{"aten", ConvAlgorithm::aten}};

inline std::optional<ConvAlgorithm> find_algorithm(const std::string& name) {
  for (const auto& [known, algorithm] : kConvAlgorithms) {
    if (name == known) {
      return algorithm;
    }
  }
  return std::nullopt;
}

// The algorithm's configuration for a problem; nullopt if the problem is outside of its domain.
inline std::optional<ConvConfig> configure(ConvAlgorithm algorithm, const ConvProblem&, const GpuTraits&) {
  ConvConfig config;
  config.algorithm = algorithm;
  switch (algorithm) {
    case ConvAlgorithm::aten:
      return config;
    default:
      return std::nullopt;
  }
}

inline ConvConfig select_config(const ConvProblem& problem, const GpuTraits& gpu) {
  return *configure(ConvAlgorithm::aten, problem, gpu);
}

// In words: the algorithm, and its tile if it has one.
inline std::string config_text(const ConvConfig& config) {
  for (const auto& [name, algorithm] : kConvAlgorithms) {
    if (config.algorithm == algorithm) {
      return name;
    }
  }
  return "unknown";
}

}  // namespace fused_conv_bn
