// Many tensors as one parallel loop on the CPU: any dtype and layout is walked as linear blocks of float or double.
#pragma once

#include "common.h"
#include "convert_cpu.h"
#include "halves.h"
#include "importance_codes.h"
#include "layout.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

namespace fastewc {

// Elements that are worked on at a time: the buffers of a block stay in the first-level cache.
constexpr int64_t BLOCK = 1024;
static_assert(CODE_BLOCK == BLOCK); // so codes that are read together have one scale
// Blocks a thread takes at least; below that, starting threads costs more than it saves.
constexpr int64_t GRAIN_BLOCKS = 16;

template <typename T>
constexpr ScalarType dtype_of = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// The memory of one tensor in the order in which all tensors of its entry are walked; no data: the tensor is absent.
struct Stream {
  void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  const float* scales = nullptr; // of codes (Byte), one for each CODE_BLOCK

  explicit operator bool() const {
    return data != nullptr;
  }
};

// Elements [begin, begin + n) of a stream into the buffer, and back, rounded to nearest even. In a file of their own
// (multi_tensor_cpu.cpp): inlined into every kernel, conversions were most of what there was to compile. Codes are read
// block by block: `begin` is a multiple of BLOCK and n at most that.
void read_as(const Stream& from, int64_t begin, int64_t n, float* to);
void read_as(const Stream& from, int64_t begin, int64_t n, double* to);
void write_as(const float* from, int64_t n, const Stream& to, int64_t begin);
void write_as(const double* from, int64_t n, const Stream& to, int64_t begin);
// The float32 weight of a bfloat16 parameter and its remainder, and back.
void read_whole(const Stream& high, const Stream& low, int64_t begin, int64_t n, float* to);
void write_halves(const float* from, int64_t n, const Stream& high, const Stream& low, int64_t begin);

// n elements from `begin` on as T: the memory itself where it holds T, else `buffer`, filled.
template <typename T>
FASTEWC_INLINE T* load(const Stream& stream, int64_t begin, int64_t n, T* buffer) {
  if (stream.dtype == dtype_of<T>) {
    return static_cast<T*>(stream.data) + begin;
  }
  read_as(stream, begin, n, buffer);
  return buffer;
}

// Writes n values where `load` read them; nothing to do where they are the memory itself.
template <typename T>
FASTEWC_INLINE void store(const Stream& stream, int64_t begin, int64_t n, const T* values) {
  if (stream.dtype != dtype_of<T>) {
    return write_as(values, n, stream, begin);
  }
  T* to = static_cast<T*>(stream.data) + begin;
  if (to != values) {
    std::memcpy(to, values, n * sizeof(T));
  }
}

// `load` and `store` of a weight in two halves; a float64 parameter has none.
template <typename T>
FASTEWC_INLINE T* load_whole(const Stream& high, const Stream& low, int64_t begin, int64_t n, T* buffer) {
  if constexpr (std::is_same_v<T, float>) {
    read_whole(high, low, begin, n, buffer);
  }
  return buffer;
}
template <typename T>
FASTEWC_INLINE void store_halves(const Stream& high, const Stream& low, int64_t begin, int64_t n, const T* values) {
  if constexpr (std::is_same_v<T, float>) {
    write_halves(values, n, high, low, begin);
  }
}

// Memory that a loop walks from its begin on; null where it is absent.
struct Walked {
  const char* data;
  int64_t element; // bytes

  template <typename E>
  FASTEWC_INLINE Walked(const E* data) : data(reinterpret_cast<const char*>(data)), element(sizeof(E)) {}
};

// f(i) for 0 ≤ i < n, vectorised: iterations are independent of each other. The memory that is walked is asked for ahead
// of its use: with seven streams the processor's own prefetching falls behind, and the step of a large model takes 10 %
// longer.
template <typename F>
FASTEWC_INLINE void stream(int64_t n, std::initializer_list<Walked> memory, const F& f) {
  constexpr int64_t STRIDE = 64, AHEAD = 512, LINE = 64;
  for (int64_t begin = 0; begin < n; begin += STRIDE) {
    for (const Walked& walked : memory) {
      if (walked.data != nullptr) {
        const char* ahead = walked.data + (begin + AHEAD) * walked.element;
        for (int64_t k = 0; k < STRIDE * walked.element; k += LINE) {
          __builtin_prefetch(ahead + k);
        }
      }
    }
    const int64_t end = std::min(n, begin + STRIDE);
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      f(i);
    }
  }
}

// Makes streams of tensors of one shape. Tensors whose memory is not laid out alike go through contiguous copies.
class Streams {
 public:
  // `importances` may be codes, and `scales` are theirs: none, or one tensor for each importance.
  Streams(const char* op, const std::vector<Tensor>& importances, const std::vector<Tensor>& scales)
      : op_(op), importances_(importances), scales_(scales) {
    STD_TORCH_CHECK(
        scales.empty() || scales.size() == importances.size(), op, ": wanted ", importances.size(),
        " scales or none, given ", scales.size());
  }

  // The tensors of the next entry, number i of all `lists`; the first one's shape is that of all.
  void begin(const Tensor& lead, std::initializer_list<const std::vector<Tensor>*> lists, size_t i) {
    lead_ = &lead;
    linear_ = true;
    check_floating(lead.scalar_type());
    for (const auto* list : lists) {
      if (!list->empty()) {
        check((*list)[i]);
        linear_ = linear_ && (*list)[i].is_contiguous();
      }
    }
    if (!linear_ && is_dense(lead)) {
      linear_ = true;
      for (const auto* list : lists) {
        linear_ = linear_ && (list->empty() || same_strides(lead, (*list)[i]));
      }
    }
  }

  Stream read(const Tensor& t) {
    check_floating(t.scalar_type());
    return walk(t);
  }

  // The importance of the entry.
  Stream read_importance(size_t i) {
    const Tensor& t = importances_[i];
    if (t.scalar_type() != ScalarType::Byte) {
      return read(t);
    }
    check_codes(t, i);
    const float* scales = static_cast<const float*>(scales_[i].const_data_ptr());
    const auto* codes = static_cast<const uint8_t*>(t.const_data_ptr());
    if (linear_ || t.is_contiguous()) {
      return {const_cast<uint8_t*>(codes), ScalarType::Byte, scales};
    }
    copies_.push_back(torch::stable::empty(t.sizes(), ScalarType::Float));
    float* to = static_cast<float*>(copies_.back().mutable_data_ptr());
    for_each_offset(t, [&](int64_t offset) { *to++ = decoded(codes[offset]) * scales[offset / CODE_BLOCK]; });
    return {copies_.back().mutable_data_ptr(), ScalarType::Float};
  }

  Stream write(const Tensor& t) {
    check_floating(t.scalar_type());
    return walk_and_write(t);
  }

  // The remainder of the entry's first tensor.
  Stream write_remainder(const Tensor& t) {
    const ScalarType high = lead_->scalar_type(), low = t.scalar_type();
    STD_TORCH_CHECK(
        high == ScalarType::BFloat16 && low == ScalarType::Short, op_, ": wanted int16 remainders of bfloat16 "
        "parameters, given ", name_of(low), " of ", name_of(high));
    return walk_and_write(t);
  }

  // Call once all work is done.
  void copy_back() {
    for (auto& [to, from] : written_) {
      torch::stable::copy_(to, from);
    }
  }

 private:
  Stream walk(const Tensor& t) {
    if (linear_ || t.is_contiguous()) {
      return {const_cast<void*>(t.const_data_ptr()), t.scalar_type()};
    }
    copies_.push_back(torch::stable::contiguous(t));
    return {copies_.back().mutable_data_ptr(), t.scalar_type()};
  }

  Stream walk_and_write(const Tensor& t) {
    const Stream stream = walk(t);
    if (!linear_ && !t.is_contiguous()) {
      written_.emplace_back(t, copies_.back());
    }
    return stream;
  }

  void check(const Tensor& t) const {
    STD_TORCH_CHECK(t.is_cpu(), op_, ": wanted CPU tensors, given one of device index ", t.get_device_index());
    STD_TORCH_CHECK(
        same_shape(t, *lead_), op_, ": wanted a tensor of its parameter's shape ", shape_of(*lead_), ", given ",
        shape_of(t));
  }

  void check_codes(const Tensor& codes, size_t i) const {
    STD_TORCH_CHECK(!scales_.empty(), op_, ": wanted the scales of uint8 importances, given none");
    const Tensor& scales = scales_[i];
    STD_TORCH_CHECK(
        scales.is_cpu() && scales.is_contiguous() && scales.scalar_type() == ScalarType::Float &&
            scales.numel() == code_blocks(codes.numel()),
        op_, ": wanted ", code_blocks(codes.numel()), " contiguous float32 scales for codes of shape ", shape_of(codes),
        ", given ", shape_of(scales), " of ", name_of(scales.scalar_type()));
    STD_TORCH_CHECK(is_dense(codes), op_, ": wanted codes that fill their memory, given ones with gaps");
  }

  void check_floating(ScalarType dtype) const {
    STD_TORCH_CHECK(
        dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
            dtype == ScalarType::Half,
        op_, ": wanted float32, float64, bfloat16 or float16 tensors, given ", name_of(dtype));
  }

  const char* op_;
  const std::vector<Tensor>&importances_, &scales_;
  const Tensor* lead_ = nullptr;
  bool linear_ = true;
  std::vector<Tensor> copies_;
  std::vector<std::pair<Tensor, Tensor>> written_; // (to, from)
};

// For each entry the number of blocks before it, and in the end the number of all.
inline std::vector<int64_t> first_blocks(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> first_block(sizes.size() + 1, 0);
  for (size_t i = 0; i < sizes.size(); ++i) {
    first_block[i + 1] = first_block[i] + (sizes[i] + BLOCK - 1) / BLOCK;
  }
  return first_block;
}

// Calls f(entry, begin, end) over all elements of all entries, in ranges that start at a multiple of BLOCK and that
// share the work evenly among threads, however the sizes are spread over the entries.
template <typename F>
void parallel_over(const std::vector<int64_t>& sizes, const F& f) {
  const std::vector<int64_t> first_block = first_blocks(sizes);
  torch::stable::parallel_for(0, first_block.back(), GRAIN_BLOCKS, [&](int64_t block, int64_t last) {
    size_t i = std::upper_bound(first_block.begin(), first_block.end(), block) - first_block.begin() - 1;
    for (; block < last; ++i) {
      const int64_t end = std::min(last, first_block[i + 1]);
      if (end > block) {
        f(i, (block - first_block[i]) * BLOCK, std::min((end - first_block[i]) * BLOCK, sizes[i]));
      }
      block = end;
    }
  });
}

// A scalar that Python passes as a number, or as a 0-dim or one-element tensor.
inline double number(const Tensor& t) {
  double value = 0;
  dispatch_floating("scalar", t.scalar_type(), [&](auto zero) {
    value = static_cast<double>(to_float(*static_cast<const decltype(zero)*>(t.const_data_ptr())));
  });
  return value;
}

} // namespace fastewc
