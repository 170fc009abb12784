// What every kernel of fastewc shares: the checks, the element types and the CPU clones.
//
// Only the LibTorch Stable ABI is included, so one library runs on every torch from TORCH_TARGET_VERSION on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <string>
#include <type_traits>

#ifndef FASTEWC_SOURCE_DIGEST
#error "compile through fastewc/_build.py, which defines FASTEWC_SOURCE_DIGEST"
#endif

// Plain loops are compiled once per vector width and chosen when the library loads (GNU ifunc): one binary serves any
// x86-64 without -march=native. Elsewhere the baseline already has vectors (Arm) or ifunc is missing (musl, macOS).
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(FASTEWC_NO_CPU_CLONES)
#define FASTEWC_CPU_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTEWC_CPU_CLONES
#endif

// A clone can only use its own vector width for code that is inlined into it.
#define FASTEWC_INLINE inline __attribute__((always_inline))
#define FASTEWC_INLINE_LAMBDA __attribute__((always_inline))

namespace fastewc {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The Python side looks for these bytes in the file, so that a library of older sources is never loaded.
[[gnu::used]] static const char source_digest[] = FASTEWC_SOURCE_DIGEST;

// Calls f compiled for the widest vectors of this CPU; f and all that it calls must be always_inline. Arithmetic in double
// is rare, and left to the baseline's vectors: each clone takes seconds to compile, which someone waits for at first use.
template <typename T, typename F>
FASTEWC_CPU_CLONES void vectorised_clones(const F& f) {
  f();
}
template <typename T, typename F>
void vectorised(const F& f) {
  if constexpr (std::is_same_v<T, double>) {
    f();
  } else {
    vectorised_clones<T>(f);
  }
}

// The dtype arithmetic is done in: double for double, else float.
template <typename T>
struct op_math {
  using type = float;
};
template <>
struct op_math<double> {
  using type = double;
};
template <typename T>
using op_math_t = typename op_math<T>::type;

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) {
    text += (d ? ", " : "") + std::to_string(t.size(d));
  }
  return text + "]";
}

inline std::string name_of(ScalarType dtype) {
  return torch::headeronly::toString(dtype);
}

// Calls f(T{}) with the C++ type of a floating dtype.
template <typename F>
void dispatch_floating(const char* op, ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      STD_TORCH_CHECK(false, op, ": wanted a float32, float64, bfloat16 or float16 tensor, given ", name_of(dtype));
  }
}

} // namespace fastewc
