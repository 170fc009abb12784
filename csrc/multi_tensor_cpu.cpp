// The conversions that every kernel over many tensors calls block by block.
#include "multi_tensor_cpu.h"

namespace fastewc {
namespace {

template <typename To, typename From>
void convert_vectorised(const From* from, To* to, int64_t n) {
  using arithmetic = std::conditional_t<std::is_same_v<To, double> || std::is_same_v<From, double>, double, float>;
  vectorised<arithmetic>([=]() FASTEWC_INLINE_LAMBDA { convert(from, to, n); });
}

template <typename T>
void decode_vectorised(const uint8_t* codes, T scale, T* to, int64_t n) {
  vectorised<T>([=]() FASTEWC_INLINE_LAMBDA {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      to[i] = decoded(codes[i]) * scale;
    }
  });
}

template <typename T>
void read(const Stream& from, int64_t begin, int64_t n, T* to) {
  if (from.dtype == ScalarType::Byte) {
    const auto* codes = static_cast<const uint8_t*>(from.data) + begin;
    return decode_vectorised(codes, static_cast<T>(from.scales[begin / CODE_BLOCK]), to, n);
  }
  dispatch_floating("read_as", from.dtype, [&](auto zero) {
    convert_vectorised(static_cast<const decltype(zero)*>(from.data) + begin, to, n);
  });
}

template <typename T>
void write(const T* from, int64_t n, const Stream& to, int64_t begin) {
  dispatch_floating("write_as", to.dtype, [&](auto zero) {
    convert_vectorised(from, static_cast<decltype(zero)*>(to.data) + begin, n);
  });
}

} // namespace

void read_as(const Stream& from, int64_t begin, int64_t n, float* to) {
  read(from, begin, n, to);
}

void read_as(const Stream& from, int64_t begin, int64_t n, double* to) {
  read(from, begin, n, to);
}

void write_as(const float* from, int64_t n, const Stream& to, int64_t begin) {
  write(from, n, to, begin);
}

void write_as(const double* from, int64_t n, const Stream& to, int64_t begin) {
  write(from, n, to, begin);
}

void read_whole(const Stream& high, const Stream& low, int64_t begin, int64_t n, float* to) {
  const auto* top = static_cast<const uint16_t*>(high.data) + begin;
  const auto* rest = static_cast<const int16_t*>(low.data) + begin;
  vectorised<float>([=]() FASTEWC_INLINE_LAMBDA {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      to[i] = whole(top[i], rest[i]);
    }
  });
}

void write_halves(const float* from, int64_t n, const Stream& high, const Stream& low, int64_t begin) {
  auto* top = static_cast<uint16_t*>(high.data) + begin;
  auto* rest = static_cast<int16_t*>(low.data) + begin;
  vectorised<float>([=]() FASTEWC_INLINE_LAMBDA {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t bits = bits_to_split(from[i]);
      top[i] = high_half(bits);
      rest[i] = low_half(bits);
    }
  });
}

} // namespace fastewc
