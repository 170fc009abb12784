// Ω in one byte: what a code stands for. fastewc/ops/importance_codes.py is the specification.
#pragma once

#include <bit>
#include <cstdint>

#ifdef __CUDACC__
#define FASTEWC_HD __host__ __device__ __forceinline__
#else
#define FASTEWC_HD inline __attribute__((always_inline))
#endif

namespace fastewc {

// Codes that share a scale, in the order of memory.
constexpr int64_t CODE_BLOCK = 1024;

inline int64_t code_blocks(int64_t codes) {
  return (codes + CODE_BLOCK - 1) / CODE_BLOCK;
}

FASTEWC_HD uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  return std::bit_cast<uint32_t>(x);
#endif
}

FASTEWC_HD float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}

// Ω/S of a code; times S, a power of two, it is Ω. Every step is exact, so a fused multiply-add changes nothing. It is
// arithmetic rather than a table because vectors have no cheap look-up; and unsigned to float is cheap only from int.
FASTEWC_HD float decoded(uint8_t code) {
  const int32_t q = static_cast<int32_t>(code) + 9;
  const int32_t octave = (q * 171) >> 11; // q/12
  const float i = static_cast<float>(q - 12 * octave);
  const float mantissa = ((365 * 0x1p-23f * i + 13371 * 0x1p-23f) * i + 485676 * 0x1p-23f) * i + 1.0f;
  const uint32_t bits = bits_of(mantissa) + (static_cast<uint32_t>(octave - 22) << 23);
  return float_of(code == 0 ? 0 : bits);
}

} // namespace fastewc
