// Inputs as the micro-kernel reads them: converted, padded with zeros, and with the lanes side by side.
#pragma once

#include "../convert_cpu.h"
#include "tile_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

namespace fastewc {

// Work space that a thread gives back and gets again: fresh pages from the system cost more than what is done in them.
class Shelf {
 public:
  static Shelf& of_this_thread() {
    thread_local Shelf shelf;
    return shelf;
  }

  // At least so many bytes; `bytes` becomes how many there are.
  void* take(size_t& bytes) {
    auto found = blocks_.end();
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
      if (block->bytes >= bytes && (found == blocks_.end() || block->bytes < found->bytes)) {
        found = block;
      }
    }
    if (found == blocks_.end()) {
      return ::operator new(bytes, ALIGNED);
    }
    void* data = found->data;
    bytes = found->bytes;
    kept_ -= found->bytes;
    blocks_.erase(found);
    return data;
  }

  void give_back(void* data, size_t bytes) {
    if (kept_ + bytes > MOST) {
      ::operator delete(data, ALIGNED);
      return;
    }
    kept_ += bytes;
    blocks_.push_back({data, bytes});
  }

  ~Shelf() {
    for (const Block& block : blocks_) {
      ::operator delete(block.data, ALIGNED);
    }
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };
  static constexpr size_t MOST = 8 << 20;
  static constexpr std::align_val_t ALIGNED{64};
  std::vector<Block> blocks_;
  size_t kept_ = 0;
};

// Memory for whole vectors; not initialised.
template <typename M>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : bytes_(std::max<int64_t>(size, 1) * sizeof(M)) {
    data_ = static_cast<M*>(Shelf::of_this_thread().take(bytes_));
  }
  Buffer(Buffer&& other) noexcept : bytes_(other.bytes_), data_(std::exchange(other.data_, nullptr)) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(Buffer&&) = delete;
  ~Buffer() {
    if (data_ != nullptr) {
      Shelf::of_this_thread().give_back(data_, bytes_);
    }
  }
  M* get() const {
    return data_;
  }

 private:
  size_t bytes_ = 0;
  M* data_ = nullptr;
};

template <typename M>
constexpr ScalarType math_dtype = std::is_same_v<M, double> ? ScalarType::Double : ScalarType::Float;

// Calls f(pointer) with the elements' type; only types whose arithmetic is M occur.
template <typename M, typename F>
void with_elements(const void* data, ScalarType dtype, const F& f) {
  if constexpr (std::is_same_v<M, double>) {
    f(static_cast<const double*>(data));
  } else if (dtype == ScalarType::BFloat16) {
    f(static_cast<const BFloat16*>(data));
  } else if (dtype == ScalarType::Half) {
    f(static_cast<const Half*>(data));
  } else {
    f(static_cast<const float*>(data));
  }
}

// Raises numbers of which the product's power is wanted: |g a|^p = |g|^p |a|^p.
template <typename M>
FASTEWC_INLINE void raise(M* data, int64_t size, Power power) {
  if (power == Power::square) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      data[i] *= data[i];
    }
  } else if (power == Power::absolute) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      data[i] = std::fabs(data[i]);
    }
  }
}

// ---- four by four, turned: what lies along rows in one place and along columns in the other ----

using Quad = simd<float, 16>::vector;

template <int a, int b, int c, int d>
FASTEWC_INLINE Quad shuffled(const Quad& x, const Quad& y) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(x, y, a, b, c, d);
#else
  typedef int32_t Mask __attribute__((vector_size(16)));
  return __builtin_shuffle(x, y, Mask{a, b, c, d});
#endif
}

FASTEWC_INLINE void turn(Quad (&x)[4]) {
  const Quad low01 = shuffled<0, 4, 1, 5>(x[0], x[1]), high01 = shuffled<2, 6, 3, 7>(x[0], x[1]);
  const Quad low23 = shuffled<0, 4, 1, 5>(x[2], x[3]), high23 = shuffled<2, 6, 3, 7>(x[2], x[3]);
  x[0] = shuffled<0, 1, 4, 5>(low01, low23);
  x[1] = shuffled<2, 3, 6, 7>(low01, low23);
  x[2] = shuffled<0, 1, 4, 5>(high01, high23);
  x[3] = shuffled<2, 3, 6, 7>(high01, high23);
}

// to[c·to_step + r] (+)= from[r·from_step + c] for r < rows, c < columns.
template <bool ADD>
FASTEWC_INLINE void turned(
    const float* from, int64_t from_step, int64_t rows, int64_t columns, float* to, int64_t to_step) {
  const int64_t whole_rows = rows & ~int64_t(3), whole_columns = columns & ~int64_t(3);
  for (int64_t c = 0; c < whole_columns; c += 4) {
    for (int64_t r = 0; r < whole_rows; r += 4) {
      Quad block[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        std::memcpy(&block[k], from + (r + k) * from_step + c, sizeof(Quad));
      }
      turn(block);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        float* target = to + (c + k) * to_step + r;
        if constexpr (ADD) {
          Quad before;
          std::memcpy(&before, target, sizeof(Quad));
          block[k] += before;
        }
        std::memcpy(target, &block[k], sizeof(Quad));
      }
    }
  }
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = c < whole_columns ? whole_rows : 0; r < rows; ++r) {
      float& target = to[c * to_step + r];
      target = ADD ? target + from[r * from_step + c] : from[r * from_step + c];
    }
  }
}

// Whether a table of offsets counts up one by one.
inline bool consecutive(const int64_t* offset, int64_t count) {
  for (int64_t i = 1; i < count; ++i) {
    if (offset[i] != offset[i - 1] + 1) {
      return false;
    }
  }
  return true;
}

// ---- packing ----

// A panel [positions, width], raised; its lanes lie lane_stride apart in memory, and those beyond the last are 0.
template <typename T, typename M>
FASTEWC_INLINE void pack_panel(
    const T* from, int64_t lane_stride, const int64_t* position, int64_t positions, int64_t lanes, int64_t width,
    Power power, M* to) {
  if (lane_stride == 1) {
    for (int64_t t = 0; t < positions; ++t) {
      convert(from + position[t], to + t * width, lanes);
      for (int64_t lane = lanes; lane < width; ++lane) {
        to[t * width + lane] = M(0);
      }
    }
  } else if (std::is_same_v<T, float> && consecutive(position, positions)) {
    if constexpr (std::is_same_v<T, float>) {
      turned<false>(from + position[0], lane_stride, lanes, positions, to, width);
    }
    for (int64_t t = 0; t < positions; ++t) {
      std::fill(to + t * width + lanes, to + (t + 1) * width, M(0));
    }
  } else {
    for (int64_t lane = 0; lane < width; ++lane) {
      const T* of_lane = from + lane * lane_stride;
      for (int64_t t = 0; t < positions; ++t) {
        to[t * width + lane] = lane < lanes ? static_cast<M>(to_float(of_lane[position[t]])) : M(0);
      }
    }
  }
  raise(to, positions * width, power);
}

// Tiles [tile, positions, ROWS], raised, tile_stride apart; the last one is filled up with zeros. `row` is work space
// for the numbers of one position.
template <typename T, typename M>
FASTEWC_INLINE void pack_tiles(
    const T* from, int64_t channel_stride, const int64_t* position, int64_t positions, int64_t channels,
    int64_t tile_stride, Power power, M* row, M* to) {
  const int64_t filled = (channels + ROWS - 1) / ROWS * ROWS;
  for (int64_t t = 0; t < positions; ++t, to += ROWS) {
    const T* at = from + position[t];
    if (channel_stride == 1) {
      convert(at, row, channels);
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        row[c] = static_cast<M>(to_float(at[c * channel_stride]));
      }
    }
    for (int64_t c = channels; c < filled; ++c) {
      row[c] = M(0);
    }
    raise(row, channels, power);
    M* tile = to;
    for (int64_t c = 0; c < filled; c += ROWS, tile += tile_stride) {
      std::memcpy(tile, row + c, ROWS * sizeof(M));
    }
  }
}

// Three spatial dimensions; those that a tensor lacks have size 1.
struct Space {
  int64_t size[3] = {1, 1, 1};

  int64_t volume() const {
    return size[0] * size[1] * size[2];
  }
};

// One channel of one sample into a plane of zeros, `step` elements from one position to the next.
template <typename T, typename M>
FASTEWC_INLINE void place(
    const T* from, const Space& space, const int64_t (&stride)[3], const Space& padded, const int64_t (&padding)[3],
    int64_t step, M* to) {
  for (int64_t d = 0; d < space.size[0]; ++d) {
    for (int64_t h = 0; h < space.size[1]; ++h) {
      const T* row = from + d * stride[0] + h * stride[1];
      M* target = to +
          (((d + padding[0]) * padded.size[1] + h + padding[1]) * padded.size[2] + padding[2]) * step;
      if (step == 1 && stride[2] == 1) {
        convert(row, target, space.size[2]);
      } else {
        for (int64_t w = 0; w < space.size[2]; ++w) {
          target[w * step] = static_cast<M>(to_float(row[w * stride[2]]));
        }
      }
    }
  }
}

} // namespace fastewc
