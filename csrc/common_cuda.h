// Many tensors as one CUDA kernel, the device's side: a block takes a chunk of a tensor, a thread some elements of it.
//
// The pointers of the tensors are kernel arguments, so a call waits for nothing and a CUDA graph can capture it. They
// stay within 4 KB, which every driver takes, and in which a launch costs least: a block finds its tensor by bisection,
// so there is no table of blocks to pass, and one launch serves some 40 tensors of any size.
#pragma once

#include "common.h"
#include "halves.h"
#include "importance_codes.h"

#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

namespace fastewc {

constexpr int THREADS = 256;
constexpr int WARP = 32;
constexpr size_t ARGUMENT_BYTES = 4096;

// ---- what a kernel is given ----

// One tensor and those that belong to it, in memory of one layout. Lists that a kernel goes without are null.
template <int LISTS>
struct Segment {
  void* data[LISTS] = {};
  int64_t size = 0;
  int first_chunk = 0; // among the chunks of its launch
  int index = 0; // among the tensors of the call
  const float* scales = nullptr; // of codes (Byte)
  ScalarType dtypes[LISTS] = {};
  bool aligned = true; // every pointer, to 16 bytes

  void put(int list, void* memory, ScalarType dtype) {
    data[list] = memory;
    dtypes[list] = dtype;
    aligned = aligned && reinterpret_cast<uintptr_t>(memory) % 16 == 0;
  }
};

template <typename S>
struct Table {
  static constexpr int CAPACITY = (ARGUMENT_BYTES - 384) / sizeof(S);
  S segments[CAPACITY];
  int chunk_size;
  int count;

  // The last segment that starts at or before the chunk.
  __device__ const S& segment_of(int chunk) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (segments[middle].first_chunk <= chunk ? low : high) = middle;
    }
    return segments[low];
  }
};

// The part of a segment that one block takes.
struct Chunk {
  int64_t begin;
  int size;
  int vectorized; // the size of the part in which whole vectors can be moved, up to a tile

  template <typename S>
  __device__ Chunk(const Table<S>& table, const S& segment, int chunk)
      : begin(int64_t(chunk - segment.first_chunk) * table.chunk_size),
        size(static_cast<int>(min(int64_t(table.chunk_size), segment.size - begin))),
        vectorized(segment.aligned ? size : 0) {}
};

// A 0-dim tensor that is read where the kernel runs, so that the host need not wait for it.
struct DeviceScalar {
  const void* data = nullptr;
  ScalarType dtype = ScalarType::Double;

  __device__ double read(double otherwise) const {
    if (data == nullptr) {
      return otherwise;
    }
    return dtype == ScalarType::Double ? *static_cast<const double*>(data) : *static_cast<const float*>(data);
  }
};

// ---- elements ----

// N elements for each thread of a block, from element `at` of the chunk on: side by side where whole vectors can be
// moved, else THREADS apart, so that neighbouring threads touch neighbouring memory either way.
template <int N>
struct Tile {
  static constexpr int SIZE = THREADS * N;
  int64_t begin; // of the chunk
  int first, end; // in the chunk
  bool whole;

  __device__ Tile(const Chunk& chunk, int at)
      : begin(chunk.begin),
        first(at + static_cast<int>(threadIdx.x)),
        end(chunk.size),
        whole(at + SIZE <= chunk.vectorized) {
    if (whole) {
      first = at + static_cast<int>(threadIdx.x) * N;
    }
  }

  __device__ bool has(int k) const {
    return whole || first + k * THREADS < end;
  }
};

// What a thread moves at once: 16 bytes, or 8 of 16-bit elements.
template <typename T, int N>
using Vector = std::conditional_t<sizeof(T[N]) == 16, uint4, uint2>;

template <typename T, int N>
__device__ __forceinline__ void load(const void* data, const Tile<N>& tile, T (&values)[N]) {
  static_assert(sizeof(values) == sizeof(Vector<T, N>));
  const T* from = static_cast<const T*>(data) + tile.begin + tile.first;
  if (tile.whole) {
    const Vector<T, N> vector = *reinterpret_cast<const Vector<T, N>*>(from);
    std::memcpy(values, &vector, sizeof(values));
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      values[k] = tile.has(k) ? from[k * THREADS] : T(0);
    }
  }
}

template <typename T, int N>
__device__ __forceinline__ void store(void* data, const Tile<N>& tile, const T (&values)[N]) {
  static_assert(sizeof(values) == sizeof(Vector<T, N>));
  T* to = static_cast<T*>(data) + tile.begin + tile.first;
  if (tile.whole) {
    Vector<T, N> vector;
    std::memcpy(&vector, values, sizeof(values));
    // Not read again before the next step, so first to leave the cache. (An assignment nvcc splits into scalars.)
    __stcs(reinterpret_cast<Vector<T, N>*>(to), vector);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (tile.has(k)) {
        to[k * THREADS] = values[k];
      }
    }
  }
}

// Elements that a thread takes at a time: 16 bytes of the arithmetic's type.
template <typename M>
constexpr int VECTOR = 16 / sizeof(M);

// N elements of a tensor whose dtype is known when the kernel runs, first as they lie in memory and converted later:
// the loads of all lists are on their way before the first value is waited for. Where M is double so is the tensor;
// where it is float, the tensor has one of the other dtypes.
template <typename M, int N>
class Loaded {
 public:
  template <typename S>
  __device__ __forceinline__ void load(const S& segment, int list, const Tile<N>& tile) {
    if constexpr (std::is_same_v<M, float>) {
      if (segment.dtypes[list] != ScalarType::Float) {
        uint16_t narrow[N];
        fastewc::load(segment.data[list], tile, narrow);
        std::memcpy(bits_, narrow, sizeof(narrow));
        return;
      }
    }
    fastewc::load(segment.data[list], tile, bits_);
  }

  __device__ __forceinline__ void convert(ScalarType dtype, M (&values)[N]) const {
    if constexpr (std::is_same_v<M, float>) {
      if (dtype == ScalarType::BFloat16) {
        return convert_from<BFloat16>(values);
      }
      if (dtype == ScalarType::Half) {
        return convert_from<Half>(values);
      }
    }
    std::memcpy(values, bits_, sizeof(bits_));
  }

  // Room for N more elements of 16 bits, beside N of 16 bits that were loaded.
  __device__ __forceinline__ void put_second(const int16_t (&second)[N]) {
    static_assert(sizeof(bits_) == 2 * sizeof(second));
    std::memcpy(bits_ + N / 2, second, sizeof(second));
  }

  __device__ __forceinline__ void get_both(uint16_t (&first)[N], int16_t (&second)[N]) const {
    std::memcpy(first, bits_, sizeof(first));
    std::memcpy(second, bits_ + N / 2, sizeof(second));
  }

 private:
  template <typename T>
  __device__ __forceinline__ void convert_from(M (&values)[N]) const {
    T narrow[N];
    std::memcpy(narrow, bits_, sizeof(narrow));
#pragma unroll
    for (int k = 0; k < N; ++k) {
      values[k] = static_cast<M>(narrow[k]);
    }
  }

  std::conditional_t<std::is_same_v<M, double>, uint64_t, uint32_t> bits_[N];
};

// The importance: numbers of the arithmetic's type, or codes of one byte. A tile lies within one block of codes. Until they are converted,
// codes lie where numbers would: registers are what the kernel of Adam has none left of.
template <typename M, int N>
class LoadedImportance {
 public:
  template <typename S>
  __device__ __forceinline__ void load(const S& segment, int list, const Tile<N>& tile) {
    static_assert(CODE_BLOCK % Tile<N>::SIZE == 0);
    if (segment.dtypes[list] != ScalarType::Byte) {
      return fastewc::load(segment.data[list], tile, bits_);
    }
    const uint8_t* from = static_cast<const uint8_t*>(segment.data[list]) + tile.begin + tile.first;
    uint32_t codes = 0; // the first in the lowest byte
    if (tile.whole) {
      codes = *reinterpret_cast<const Packed*>(from);
    } else {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        codes |= tile.has(k) ? uint32_t(from[k * THREADS]) << 8 * k : 0;
      }
    }
    bits_[0] = codes;
  }

  template <typename S>
  __device__ __forceinline__ void convert(const S& segment, int list, const Tile<N>& tile, M (&values)[N]) const {
    if (segment.dtypes[list] != ScalarType::Byte) {
      std::memcpy(values, bits_, sizeof(bits_));
      return;
    }
    const auto codes = static_cast<uint32_t>(bits_[0]);
    const auto block = static_cast<uint32_t>(static_cast<uint64_t>(tile.begin + tile.first) / CODE_BLOCK);
    const M scale = tile.has(0) ? segment.scales[block] : 0.0f;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      values[k] = decoded(static_cast<uint8_t>(codes >> 8 * k)) * scale;
    }
  }

 private:
  using Packed = std::conditional_t<N == 4, uint32_t, uint16_t>; // N bytes
  static_assert(sizeof(Packed) == N);

  std::conditional_t<std::is_same_v<M, double>, uint64_t, uint32_t> bits_[N];
};

// The weight: numbers of a parameter's dtype, or the two halves of a float32. Until they are joined, the lower halves lie
// where the parameter's numbers leave registers free.
template <typename M, int N>
class LoadedWeight {
 public:
  template <typename S>
  __device__ __forceinline__ void load(const S& segment, int high, int low, const Tile<N>& tile) {
    own_.load(segment, high, tile);
    if constexpr (std::is_same_v<M, float>) {
      if (segment.data[low] != nullptr) {
        int16_t rest[N];
        fastewc::load(segment.data[low], tile, rest);
        own_.put_second(rest);
      }
    }
  }

  template <typename S>
  __device__ __forceinline__ void convert(const S& segment, int high, int low, M (&values)[N]) const {
    if constexpr (std::is_same_v<M, float>) {
      if (segment.data[low] != nullptr) {
        uint16_t top[N];
        int16_t rest[N];
        own_.get_both(top, rest);
#pragma unroll
        for (int k = 0; k < N; ++k) {
          values[k] = whole(top[k], rest[k]);
        }
        return;
      }
    }
    own_.convert(segment.dtypes[high], values);
  }

 private:
  Loaded<M, N> own_;
};

template <typename T, typename M, int N>
__device__ __forceinline__ void round_to(const M (&values)[N], T (&rounded)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    rounded[k] = static_cast<T>(values[k]);
  }
}

// Stores the values in the dtype of the list.
template <typename S, typename M, int N>
__device__ __forceinline__ void store(const S& segment, int list, const Tile<N>& tile, const M (&values)[N]) {
  if constexpr (std::is_same_v<M, float>) {
    if (segment.dtypes[list] == ScalarType::BFloat16) {
      BFloat16 rounded[N];
      round_to(values, rounded);
      return store(segment.data[list], tile, rounded);
    }
    if (segment.dtypes[list] == ScalarType::Half) {
      Half rounded[N];
      round_to(values, rounded);
      return store(segment.data[list], tile, rounded);
    }
  }
  store(segment.data[list], tile, values);
}

// Stores a weight, in its halves where it has them.
template <typename S, typename M, int N>
__device__ __forceinline__ void store_weight(
    const S& segment, int high, int low, const Tile<N>& tile, const M (&values)[N]) {
  if constexpr (std::is_same_v<M, float>) {
    if (segment.data[low] != nullptr) {
      uint16_t top[N];
      int16_t rest[N];
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const uint32_t bits = bits_to_split(values[k]);
        top[k] = high_half(bits);
        rest[k] = low_half(bits);
      }
      store(segment.data[high], tile, top);
      return store(segment.data[low], tile, rest);
    }
  }
  store(segment, high, tile, values);
}

// The values that a list of this dtype would give back.
template <typename M, int N>
__device__ __forceinline__ void round_as(ScalarType dtype, M (&values)[N]) {
  if constexpr (std::is_same_v<M, float>) {
    if (dtype == ScalarType::BFloat16) {
      BFloat16 rounded[N];
      round_to(values, rounded);
      round_to(rounded, values);
    } else if (dtype == ScalarType::Half) {
      Half rounded[N];
      round_to(values, rounded);
      round_to(rounded, values);
    }
  }
}

// ---- sums ----

struct Sum {
  __device__ double operator()(double a, double b) const {
    return a + b;
  }
};

// NaN wins, as in torch.max.
struct Largest {
  __device__ double operator()(double a, double b) const {
    return a < b || b != b ? b : a;
  }
};

// The values of all threads of a block as one, in an order that is always the same; every thread gets it.
template <typename Merge>
__device__ double over_block(double value, Merge merge) {
  __shared__ double of_warp[THREADS / WARP];
  for (int distance = WARP / 2; distance > 0; distance /= 2) {
    value = merge(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  __syncthreads(); // the previous result has been read
  if (threadIdx.x % WARP == 0) {
    of_warp[threadIdx.x / WARP] = value;
  }
  __syncthreads();
  value = of_warp[0];
  for (int warp = 1; warp < THREADS / WARP; ++warp) {
    value = merge(value, of_warp[warp]);
  }
  return value;
}

} // namespace fastewc
