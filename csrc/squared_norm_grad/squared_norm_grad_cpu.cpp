// squared_norm_grad on the CPU: 2y, or 2p(p − Σp²) with p = softmax(y) over the last dimension.
#include "../common.h"
#include "../convert_cpu.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

namespace fastewc {
namespace {

// float sums run over blocks of this many elements and are then added in double: a row of 200,000 keeps float accuracy.
constexpr int64_t SUM_BLOCK = 1024;
// Elements a thread takes at least; below that, starting threads costs more than it saves.
constexpr int64_t GRAIN = 16384;

FASTEWC_INLINE double exp_nonpositive(double x) {
  return std::exp(x);
}

// e^x for x ≤ 0, −∞ and NaN: branch-free, so that loops over it vectorise (std::exp for float does not without
// -ffast-math, which would drop NaN). x = n·ln2 + r, |r| ≤ ln2/2; the Taylor series of e^r to r⁷ is exact to 0.1 ulp.
FASTEWC_INLINE float exp_nonpositive(float x) {
  constexpr float log2e = 1.44269504089f;
  constexpr float ln2_high = 0.693359375f; // 9 bits: n·ln2_high is exact
  constexpr float ln2_low = -2.12194440e-4f;
  constexpr float to_integer = 12582912.0f; // 1.5·2²³: adding it rounds to an integer kept in the low bits
  x = x < -105.0f ? -105.0f : x; // e^-105 is below half the smallest subnormal: 0; NaN compares false and stays
  const float shifted = x * log2e + to_integer;
  const int32_t n = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(to_integer);
  const float k = shifted - to_integer;
  const float r = (x - k * ln2_high) - k * ln2_low;
  float e = 1.0f / 5040.0f;
  e = e * r + 1.0f / 720.0f;
  e = e * r + 1.0f / 120.0f;
  e = e * r + 1.0f / 24.0f;
  e = e * r + 1.0f / 6.0f;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  // 2ⁿ in two factors, since n reaches −151 and a float's exponent ends at −126: results underflow gradually.
  const int32_t half = n >> 1;
  const float first = std::bit_cast<float>((half + 127) << 23);
  const float second = std::bit_cast<float>((n - half + 127) << 23);
  return e * first * second;
}

template <typename T>
FASTEWC_INLINE void logits_grad(const T* y, T* out, int64_t n) {
  using acc_t = op_math_t<T>;
  acc_t block[SUM_BLOCK];
  for (int64_t begin = 0; begin < n; begin += SUM_BLOCK) {
    const int64_t size = std::min(SUM_BLOCK, n - begin);
    convert(y + begin, block, size);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      block[i] *= 2;
    }
    convert(block, out + begin, size);
  }
}

// One row, in the arithmetic's type; `out` may be `y` itself.
//
// p − Σp² is computed as such where p ≤ top/2, top = max p. Above, where it would cancel in a confident row, it is
// lead − (top − p) with lead = top − Σp² = Σ p(top − p), whose terms are all non-negative. The maximum's own e is
// exactly 1, so it and its ties add exactly 0 to lead.
template <typename T>
FASTEWC_INLINE void softmax_grad_row(const T* y, T* out, int64_t C) {
  T max = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < C; ++i) {
    max = y[i] > max ? y[i] : max;
  }
  // A NaN that the maximum skipped, or ∞ − ∞, makes Σe NaN and with it the whole row, as torch.softmax does.
  double sum = 0, sum_of_squares = 0, sum_of_leads = 0;
  for (int64_t begin = 0; begin < C; begin += SUM_BLOCK) {
    const int64_t end = std::min(C, begin + SUM_BLOCK);
    T block_sum = 0, block_squares = 0, block_leads = 0;
#pragma omp simd reduction(+ : block_sum, block_squares, block_leads)
    for (int64_t i = begin; i < end; ++i) {
      const T value = exp_nonpositive(y[i] - max);
      out[i] = value; // every e^(y−max) is computed once
      block_sum += value;
      block_squares += value * value;
      block_leads += value * (T(1) - value);
    }
    sum += block_sum;
    sum_of_squares += block_squares;
    sum_of_leads += block_leads;
  }
  const T top = static_cast<T>(1 / sum); // the largest p, and the factor from e to p
  const T sum_p_squared = static_cast<T>(sum_of_squares / (sum * sum));
  const T lead = static_cast<T>(sum_of_leads / (sum * sum));
#pragma omp simd
  for (int64_t i = 0; i < C; ++i) {
    const T p = out[i] * top;
    // Both, then a choice: a blend of two vectors rather than a branch.
    const T above = lead - (top - p);
    const T below = p - sum_p_squared;
    out[i] = T(2) * p * (T(2) * p > top ? above : below);
  }
}

template <typename T>
void softmax_grad(const T* y, T* out, int64_t N, int64_t C) {
  using acc_t = op_math_t<T>;
  const int64_t rows_per_thread = std::max<int64_t>(1, GRAIN / C);
  torch::stable::parallel_for(0, N, rows_per_thread, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> row(std::is_same_v<T, acc_t> ? 0 : C);
    vectorised<acc_t>([&]() FASTEWC_INLINE_LAMBDA {
      for (int64_t n = begin; n < end; ++n) {
        if constexpr (std::is_same_v<T, acc_t>) {
          softmax_grad_row(y + n * C, out + n * C, C);
        } else {
          convert(y + n * C, row.data(), C);
          softmax_grad_row(row.data(), row.data(), C);
          convert(row.data(), out + n * C, C);
        }
      }
    });
  });
}

// y [..., C], any strides -> contiguous [..., C] of y's dtype.
Tensor squared_norm_grad_cpu(const Tensor& y, std::string output) {
  const bool softmax = output == "softmax";
  STD_TORCH_CHECK(
      softmax || output == "logits", "squared_norm_grad: wanted output \"logits\" or \"softmax\", given \"", output, "\"");
  STD_TORCH_CHECK(y.dim() >= 1, "squared_norm_grad: wanted y [..., C] of at least 1 dimension, given ", shape_of(y));
  STD_TORCH_CHECK(y.is_cpu(), "squared_norm_grad: wanted a CPU tensor, given one of device index ", y.get_device_index());
  const Tensor rows = torch::stable::contiguous(y);
  const Tensor out = torch::stable::empty(y.sizes(), y.scalar_type(), std::nullopt, y.device());
  const int64_t C = y.size(y.dim() - 1);
  const int64_t count = y.numel();
  if (count == 0) {
    return out;
  }
  dispatch_floating("squared_norm_grad", y.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(rows.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    if (softmax) {
      softmax_grad<T>(from, to, count / C, C);
    } else {
      torch::stable::parallel_for(0, count, GRAIN, [&](int64_t begin, int64_t end) {
        vectorised<op_math_t<T>>([&]() FASTEWC_INLINE_LAMBDA { logits_grad(from + begin, to + begin, end - begin); });
      });
    }
  });
  return out;
}

} // namespace
} // namespace fastewc

STABLE_TORCH_LIBRARY_IMPL(fastewc, CPU, m) {
  m.impl("squared_norm_grad", TORCH_BOX(&fastewc::squared_norm_grad_cpu));
}
