// Conversions between dtypes on the CPU: branch-free on integers, so that loops over them vectorise on every x86-64.
#pragma once

#include "common.h"

#include <bit>
#include <cstdint>

namespace fastewc {

FASTEWC_INLINE float to_float(BFloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.x) << 16);
}

FASTEWC_INLINE float to_float(Half value) {
  const uint32_t magnitude = static_cast<uint32_t>(value.x & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(value.x & 0x8000) << 16;
  const uint32_t rebias = 112u << 23; // exponents are biased by 15 and by 127
  const uint32_t normal = magnitude + rebias;
  const uint32_t infinite = normal + rebias;
  // Subnormals: put the bits under the exponent of 2⁻¹⁴ and take 2⁻¹⁴ off again.
  const uint32_t subnormal = std::bit_cast<uint32_t>(
      std::bit_cast<float>(magnitude + (113u << 23)) - std::bit_cast<float>(113u << 23));
  uint32_t bits = magnitude < (1u << 23) ? subnormal : normal;
  bits = magnitude >= (31u << 23) ? infinite : bits;
  return std::bit_cast<float>(bits | sign);
}

// Rounded to nearest, ties to even.
FASTEWC_INLINE BFloat16 to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t nan = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
  return BFloat16(static_cast<uint16_t>(nan), BFloat16::from_bits());
}

FASTEWC_INLINE Half to_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2⁻¹⁴: adding ½ rounds to multiples of 2⁻²⁴, the spacing of subnormals.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - (126u << 23);
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? 0x7c00 : half;
  half = magnitude > 0x7f800000 ? 0x7e00 : half;
  return Half(static_cast<uint16_t>(half | sign), Half::from_bits());
}

FASTEWC_INLINE float to_float(float value) {
  return value;
}
FASTEWC_INLINE double to_float(double value) {
  return value;
}

template <typename To, typename From>
FASTEWC_INLINE void convert(const From* from, To* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (std::is_same_v<To, BFloat16>) {
      to[i] = to_bfloat16(static_cast<float>(from[i]));
    } else if constexpr (std::is_same_v<To, Half>) {
      to[i] = to_half(static_cast<float>(from[i]));
    } else {
      to[i] = static_cast<To>(to_float(from[i]));
    }
  }
}

} // namespace fastewc
