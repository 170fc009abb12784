// squared_norm_grad in CUDA: 2y, or 2p(p − Σp²) with p = softmax(y) over the last dimension; a warp or a block to a row.
#include "../multi_tensor_cuda.h"

#include <cmath>
#include <limits>
#include <string>
#include <type_traits>

namespace fastewc {
namespace {

// Rows up to this length are a warp's, longer ones a block's.
constexpr int64_t LONGEST_OF_WARP = 1024;
constexpr int64_t BLOCKS_PER_MULTIPROCESSOR = 32; // of the elementwise kernel, at most

template <typename M>
constexpr M LOWEST = -std::numeric_limits<M>::infinity();

struct Rows {
  const void* y; // [rows, C]
  void* out;
  int64_t rows, C;
};

// What is known of a set of a row's elements, with e = exp(y − max): Σe, Σe², and Σe(1 − e), whose use is explained in
// squared_norm_grad_cpu.cpp. The sums are double, so that a row of 200,000 keeps the accuracy of M.
template <typename M>
struct Sums {
  M max;
  double e, squares, leads;
};

// One element. −∞ adds nothing; NaN and +∞ make every sum NaN, and with it the whole row, as torch.softmax does.
template <typename M>
__device__ Sums<M> only(M y) {
  const double one = y == LOWEST<M> ? 0 : 1 + (y - y);
  return {y, one, one, 0};
}

// Two sets as one. Below the common maximum an e becomes f·e with f = exp(max − common max), and e(1 − e) becomes
// fe(1 − fe) = f·e(1 − e) + f(1 − f)·e²: no term is negative.
template <typename M>
__device__ __forceinline__ Sums<M> merged(const Sums<M>& a, const Sums<M>& b) {
  Sums<M> above = a, below = b;
  if (a.max < b.max) {
    above = b;
    below = a;
  }
  const double f = below.max == LOWEST<M> ? 0 : std::exp(below.max - above.max);
  return {
      above.max, above.e + f * below.e, above.squares + f * f * below.squares,
      above.leads + (f * below.leads + f * (1 - f) * below.squares)};
}

// The sums of a row from those of its GROUP threads; every thread gets them.
template <int GROUP, typename M>
__device__ Sums<M> over_row(Sums<M> own) {
  for (int distance = WARP / 2; distance > 0; distance /= 2) {
    const auto other = [&](double value) { return __shfl_xor_sync(0xffffffffu, value, distance); };
    own = merged(own, Sums<M>{static_cast<M>(other(own.max)), other(own.e), other(own.squares), other(own.leads)});
  }
  if constexpr (GROUP == THREADS) {
    __shared__ Sums<M> of_warp[THREADS / WARP];
    if (threadIdx.x % WARP == 0) {
      of_warp[threadIdx.x / WARP] = own;
    }
    __syncthreads();
    own = of_warp[0];
    for (int warp = 1; warp < THREADS / WARP; ++warp) {
      own = merged(own, of_warp[warp]);
    }
  }
  return own;
}

template <typename T, int GROUP>
__global__ void __launch_bounds__(THREADS, 4) softmax_kernel(const __grid_constant__ Rows args) {
  using M = op_math_t<T>;
  const int64_t row = int64_t(blockIdx.x) * (THREADS / GROUP) + threadIdx.x / GROUP;
  const int64_t end = row < args.rows ? args.C : 0; // without a row, a thread only takes part in the shuffles
  const T* y = static_cast<const T*>(args.y) + row * args.C;
  T* out = static_cast<T*>(args.out) + row * args.C;
  Sums<M> sums = {LOWEST<M>, 0, 0, 0};
  for (int64_t i = threadIdx.x % GROUP; i < end; i += GROUP) {
    sums = merged(sums, only(static_cast<M>(y[i])));
  }
  sums = over_row<GROUP>(sums);
  const double scale = 1 / sums.e;
  const M top = static_cast<M>(scale); // the largest p, and the factor from e to p
  const M sum_p_squared = static_cast<M>(sums.squares * scale * scale);
  const M lead = static_cast<M>(sums.leads * scale * scale);
  for (int64_t i = threadIdx.x % GROUP; i < end; i += GROUP) {
    const M p = std::exp(static_cast<M>(y[i]) - sums.max) * top;
    out[i] = static_cast<T>(M(2) * p * (M(2) * p > top ? lead - (top - p) : p - sum_p_squared));
  }
}

template <typename T>
__global__ void __launch_bounds__(THREADS) logits_kernel(const __grid_constant__ Rows args) {
  using M = op_math_t<T>;
  const int64_t stride = int64_t(gridDim.x) * THREADS;
  for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < args.rows * args.C; i += stride) {
    static_cast<T*>(args.out)[i] = static_cast<T>(M(2) * static_cast<M>(static_cast<const T*>(args.y)[i]));
  }
}

int64_t blocks_for(int64_t items, int64_t per_block) {
  return (items + per_block - 1) / per_block;
}

// y [..., C], any strides -> contiguous [..., C] of y's dtype.
Tensor squared_norm_grad_cuda(const Tensor& y, std::string output) {
  const bool softmax = output == "softmax";
  STD_TORCH_CHECK(
      softmax || output == "logits", "squared_norm_grad: wanted output \"logits\" or \"softmax\", given \"", output,
      "\"");
  STD_TORCH_CHECK(y.dim() >= 1, "squared_norm_grad: wanted y [..., C] of at least 1 dimension, given ", shape_of(y));
  const Place place(y);
  const Tensor rows = torch::stable::contiguous(y);
  const Tensor out = torch::stable::empty(y.sizes(), y.scalar_type(), std::nullopt, y.device());
  const int64_t count = y.numel(), C = y.size(y.dim() - 1);
  if (count == 0) {
    return out;
  }
  const Rows args = {rows.const_data_ptr(), out.mutable_data_ptr(), count / C, C};
  dispatch_floating("squared_norm_grad", y.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if (!softmax) {
      const int64_t blocks = std::min(blocks_for(count, THREADS), BLOCKS_PER_MULTIPROCESSOR * place.multiprocessors());
      place.launch(logits_kernel<T>, blocks, args);
    } else if (C <= LONGEST_OF_WARP) {
      place.launch(softmax_kernel<T, WARP>, blocks_for(args.rows, THREADS / WARP), args);
    } else {
      place.launch(softmax_kernel<T, THREADS>, args.rows, args);
    }
  });
  return out;
}

} // namespace
} // namespace fastewc

STABLE_TORCH_LIBRARY_IMPL(fastewc, CUDA, m) {
  m.impl("squared_norm_grad", TORCH_BOX(&fastewc::squared_norm_grad_cuda));
}
