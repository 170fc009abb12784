// Many tensors as one CUDA kernel, the host's side: any dtype and layout becomes segments of memory, those launches.
#pragma once

#include "common_cuda.h"
#include "layout.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

namespace fastewc {

// Chunks a multiprocessor gets if the tensors are large enough: so many that the last ones to finish idle few others.
constexpr int64_t CHUNKS_PER_MULTIPROCESSOR = 16;
constexpr int64_t TILES_PER_CHUNK = 32; // at most

// Where a call runs: the device of its tensors, made current, and torch's stream there.
class Place {
 public:
  explicit Place(const Tensor& t) : device_(t.get_device_index()), guard_(device_) {
    STD_TORCH_CHECK(t.is_cuda(), "wanted CUDA tensors, given one of device index ", device_);
    STD_CUDA_CHECK(cudaSetDevice(device_)); // for this library's own, static runtime
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device_));
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  int multiprocessors() const {
    return multiprocessors_;
  }

  bool has(const Tensor& t) const {
    return t.get_device_index() == device_; // -1 on the CPU
  }

  template <typename Arguments>
  void launch(void (*kernel)(Arguments), int64_t blocks, const std::remove_const_t<Arguments>& arguments) const {
    static_assert(sizeof(Arguments) <= ARGUMENT_BYTES);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(THREADS);
    config.stream = stream_;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments));
  }

  // How many elements a block takes: a multiple of `tile`, small enough to give every multiprocessor its share.
  int chunk_size(int64_t total, int tile) const {
    const int64_t share = total / (CHUNKS_PER_MULTIPROCESSOR * multiprocessors_);
    return tile * static_cast<int>(std::clamp<int64_t>((share + tile - 1) / tile, 1, TILES_PER_CHUNK));
  }

 private:
  int device_, multiprocessors_ = 1;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Calls launch(table, chunks) with as many segments at a time as the arguments of a kernel hold.
template <typename S, typename F>
void for_each_table(const std::vector<S>& segments, int chunk_size, const F& launch) {
  Table<S> table = {};
  table.chunk_size = chunk_size;
  int64_t chunks = 0;
  for (size_t i = 0; i < segments.size(); ++i) {
    S& entry = table.segments[table.count++] = segments[i];
    entry.first_chunk = static_cast<int>(chunks);
    chunks += (entry.size + chunk_size - 1) / chunk_size;
    if (table.count == Table<S>::CAPACITY || i + 1 == segments.size()) {
      launch(table, chunks);
      table.count = 0;
      chunks = 0;
    }
  }
}

template <typename S>
int64_t total_size(const std::vector<S>& segments) {
  int64_t total = 0;
  for (const S& segment : segments) {
    total += segment.size;
  }
  return total;
}

template <typename S>
int64_t count_chunks(const std::vector<S>& segments, int chunk_size) {
  int64_t chunks = 0;
  for (const S& segment : segments) {
    chunks += (segment.size + chunk_size - 1) / chunk_size;
  }
  return chunks;
}

// A new tensor of t's shape, and of its strides where t is dense.
inline Tensor empty_as(const Tensor& t, ScalarType dtype) {
  using torch::stable::detail::from;
  const std::nullopt_t none = std::nullopt;
  const std::optional<ScalarType> wanted = dtype;
  StableIValue stack[] = {from(t), from(wanted), from(none), from(none), from(none), from(none)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The dtype of a floating tensor. (Tensor::scalar_type asks torch for the number of one dtype after the other, which
// would take hundreds of small tensors longer than anything else here.)
inline ScalarType dtype_of(const char* op, const Tensor& t) {
  static const std::pair<int32_t, ScalarType> known[] = {
      {aoti_torch_dtype_float32(), ScalarType::Float},
      {aoti_torch_dtype_bfloat16(), ScalarType::BFloat16},
      {aoti_torch_dtype_float16(), ScalarType::Half},
      {aoti_torch_dtype_float64(), ScalarType::Double},
      {aoti_torch_dtype_uint8(), ScalarType::Byte}, // codes
      {aoti_torch_dtype_int16(), ScalarType::Short}}; // remainders
  int32_t number = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &number));
  for (const auto& [own, dtype] : known) {
    if (own == number) {
      return dtype;
    }
  }
  STD_TORCH_CHECK(
      false, op, ": wanted float32, float64, bfloat16 or float16 tensors, given ", name_of(t.scalar_type()));
}

// Decodes one tensor, in the order of its memory.
struct CodesArguments {
  const uint8_t* codes;
  const float* scales;
  float* out;
  int64_t size;
};

static __global__ void __launch_bounds__(THREADS) decode_kernel(const __grid_constant__ CodesArguments args) {
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i < args.size) {
    args.out[i] = decoded(args.codes[i]) * args.scales[i / CODE_BLOCK];
  }
}

// Gives kernels the memory of tensors: all tensors of an entry in the layout of its first one and in a dtype that the
// kernel reads. Where a tensor is otherwise, a copy stands in for it.
class Streams {
 public:
  // `scales` are those of importances that are codes: none, or one tensor for each importance.
  Streams(const char* op, const Place& place, const std::vector<Tensor>& scales)
      : op_(op), place_(place), scales_(scales) {}

  // The next entry: its kernel computes in `math`, Float or Double, and all its tensors take the layout of `lead`.
  void begin(const Tensor& lead, ScalarType math) {
    layout_ = is_dense(lead) ? lead : torch::stable::contiguous(lead);
    math_ = math;
  }

  // Kernels read float64 in double arithmetic only and nothing else there; `only_math`: this list is read as the
  // arithmetic's type. `written`: the kernel changes the tensor.
  template <typename S>
  void put(S& segment, int list, const Tensor& t, bool written = false, bool only_math = false) {
    const ScalarType own = dtype_of(op_, t);
    STD_TORCH_CHECK(
        own != ScalarType::Byte && own != ScalarType::Short, op_,
        ": wanted float32, float64, bfloat16 or float16 tensors, given ", name_of(own));
    const bool narrow = own != ScalarType::Double && math_ != ScalarType::Double && !only_math;
    put_as(segment, list, t, own, narrow ? own : math_, written);
  }

  // The remainder of the entry, whose parameter has been put into the list `high`.
  template <typename S>
  void put_remainder(S& segment, int list, const Tensor& t, int high) {
    const ScalarType own = dtype_of(op_, t);
    STD_TORCH_CHECK(
        own == ScalarType::Short && segment.dtypes[high] == ScalarType::BFloat16, op_,
        ": wanted int16 remainders of bfloat16 parameters, given ", name_of(own), " of ",
        name_of(segment.dtypes[high]));
    put_as(segment, list, t, own, own, true);
  }

  // The importance of entry i.
  template <typename S>
  void put_importance(S& segment, int list, const Tensor& t, size_t i) {
    if (dtype_of(op_, t) != ScalarType::Byte) {
      return put(segment, list, t, false, true); // a kernel with more cases has no registers left for them
    }
    STD_TORCH_CHECK(i < scales_.size(), op_, ": wanted the scales of uint8 importances, given none");
    const Tensor& scales = scales_[i];
    STD_TORCH_CHECK(
        place_.has(t) && place_.has(scales) && scales.is_contiguous() && scales.scalar_type() == ScalarType::Float &&
            scales.numel() == code_blocks(t.numel()),
        op_, ": wanted ", code_blocks(t.numel()), " contiguous float32 scales for codes of shape ", shape_of(t),
        " on the device of the first parameter, given ", shape_of(scales), " of ", name_of(scales.scalar_type()));
    STD_TORCH_CHECK(is_dense(t), op_, ": wanted codes that fill their memory, given ones with gaps");
    const auto* codes = static_cast<const uint8_t*>(t.const_data_ptr());
    segment.scales = static_cast<const float*>(scales.const_data_ptr());
    if (same_shape(t, layout_) && same_strides(t, layout_)) {
      return segment.put(list, const_cast<uint8_t*>(codes), ScalarType::Byte);
    }
    copies_.push_back(empty_as(t, ScalarType::Float)); // blocks are those of the memory of the codes
    const Tensor numbers = copies_.back();
    const CodesArguments args = {codes, segment.scales, static_cast<float*>(numbers.mutable_data_ptr()), t.numel()};
    if (args.size > 0) {
      place_.launch(decode_kernel, (args.size + THREADS - 1) / THREADS, args);
    }
    put(segment, list, numbers, false, true);
  }

  // 0-dim, on the device; nothing for nothing.
  DeviceScalar scalar(const std::optional<Tensor>& t) {
    if (!t) {
      return {};
    }
    STD_TORCH_CHECK(
        t->numel() == 1 && place_.has(*t), op_, ": wanted a scalar on the device of the parameters, given ",
        shape_of(*t), place_.has(*t) ? "" : " elsewhere");
    const ScalarType dtype = t->scalar_type();
    if (dtype == ScalarType::Float || dtype == ScalarType::Double) {
      return {t->const_data_ptr(), dtype};
    }
    copies_.push_back(torch::stable::to(*t, ScalarType::Double));
    return {copies_.back().const_data_ptr(), ScalarType::Double};
  }

  // Call once all work is launched.
  void copy_back() {
    for (auto& [to, from] : written_) {
      torch::stable::copy_(to, from);
    }
  }

 private:
  // `own` is t's dtype, and `dtype` what the kernel reads.
  template <typename S>
  void put_as(S& segment, int list, const Tensor& t, ScalarType own, ScalarType dtype, bool written) {
    STD_TORCH_CHECK(place_.has(t), op_, ": wanted all tensors on the device of the first parameter");
    STD_TORCH_CHECK(
        same_shape(t, layout_), op_, ": wanted a tensor of its parameter's shape ", shape_of(layout_), ", given ",
        shape_of(t));
    if (own == dtype && same_strides(t, layout_)) {
      segment.put(list, written ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr()), dtype);
      return;
    }
    copies_.push_back(empty_as(layout_, dtype));
    torch::stable::copy_(copies_.back(), t);
    segment.put(list, copies_.back().mutable_data_ptr(), dtype);
    if (written) {
      written_.emplace_back(t, copies_.back());
    }
  }

  const char* op_;
  const Place& place_;
  const std::vector<Tensor>& scales_;
  Tensor layout_;
  ScalarType math_ = ScalarType::Float;
  std::vector<Tensor> copies_;
  std::vector<std::pair<Tensor, Tensor>> written_;
};

} // namespace fastewc
