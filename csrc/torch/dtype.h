// The only list of dtypes: torch's name in C++ and in Python, and our element type.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "kernels/common/scalar.h"

#define FCB_FORALL_DTYPES(_)        \
  _(Float, "float32", float)        \
  _(Half, "float16", float16)       \
  _(BFloat16, "bfloat16", bfloat16) \
  _(Double, "float64", double)
#define FCB_DTYPE_NAMES "float32, float16, bfloat16 or float64"

namespace fused_conv_bn {

using torch::headeronly::ScalarType;

template <typename T>
struct TypeTag {
  using type = T;
};

// f(TypeTag<T>) for the dtype's T. checks.h lets no other dtype through.
template <typename F>
void dispatch_dtype(ScalarType dtype, F&& f) {
  switch (dtype) {
#define FCB_CASE(torch_name, name, T) \
  case ScalarType::torch_name:        \
    return f(TypeTag<T>{});
    FCB_FORALL_DTYPES(FCB_CASE)
#undef FCB_CASE
    default:
      return;
  }
}

inline bool is_supported(ScalarType dtype) {
  bool result = false;
  dispatch_dtype(dtype, [&](auto) { result = true; });
  return result;
}

inline bool is_16_bit(ScalarType dtype) {
  bool result = false;
  dispatch_dtype(dtype, [&](auto tag) { result = sizeof(typename decltype(tag)::type) == 2; });
  return result;
}

// The dtype of acc_t<T>: what scale and shift are stored in.
inline ScalarType acc_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
#define FCB_CASE(torch_name, name, T) \
  case ScalarType::torch_name:        \
    return name;
    FCB_FORALL_DTYPES(FCB_CASE)
#undef FCB_CASE
    default:
      return torch::headeronly::toString(dtype);
  }
}

}  // namespace fused_conv_bn
