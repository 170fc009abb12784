// ewc_penalty in CUDA: value, gradient, statistics and hold back of many tensors, a launch for some 50 of them.
//
// fastewc/ops/ewc_penalty/reference.py is the specification. Kernels are compiled for float and for double arithmetic;
// a tensor's lists may have any dtypes, and are double throughout where one of them is. Sums are formed in double, per
// chunk and then over the chunks, in an order that does not depend on which block is done first.
#include "arithmetic.h"
#include "call_cuda.h"
#include "terms.h"

#include <cmath>
#include <optional>
#include <string>
#include <vector>

namespace fastewc {
namespace {

constexpr int BLOCKS_OF_STATS = 4; // per multiprocessor: as many histograms as it has shared memory for

template <typename M>
__global__ void __launch_bounds__(THREADS) value_kernel(const __grid_constant__ PenaltyArguments args) {
  constexpr int N = VECTOR<M>;
  const PenaltySegment& segment = args.table.segment_of(blockIdx.x);
  const Factors<M> factors(args, segment);
  const Chunk chunk(args.table, segment, blockIdx.x);
  double sum = 0;
  for (int at = 0; at < chunk.size; at += Tile<N>::SIZE) {
    const Weights<M, N> x(segment, Tile<N>(chunk, at));
    M part = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const M drift = x.w[k] - x.anchor[k];
      part += factors.stiffness(x.omega[k]) * drift * drift;
    }
    sum += static_cast<double>(part);
  }
  sum = over_block(sum, Sum());
  if (threadIdx.x == 0) {
    args.partials[blockIdx.x] = sum / 2;
  }
}

template <typename M>
__global__ void __launch_bounds__(THREADS) grads_kernel(const __grid_constant__ PenaltyArguments args) {
  constexpr int N = VECTOR<M>;
  const PenaltySegment& segment = args.table.segment_of(blockIdx.x);
  const Factors<M> factors(args, segment);
  const M scale = static_cast<M>(args.negate ? -args.scale.read(1) : args.scale.read(1));
  const bool joins = segment.data[GRAD] != nullptr;
  const bool clamps = joins && segment.dtypes[OUT] == ScalarType::Half;
  const Chunk chunk(args.table, segment, blockIdx.x);
  for (int at = 0; at < chunk.size; at += Tile<N>::SIZE) {
    const Tile<N> tile(chunk, at);
    Loaded<M, N> own_stored;
    if (joins) {
      own_stored.load(segment, GRAD, tile);
    }
    const Weights<M, N> x(segment, tile);
    M out[N], own[N];
    if (joins) {
      own_stored.convert(segment.dtypes[GRAD], own);
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
      out[k] = factors.stiffness(x.omega[k]) * (x.w[k] - x.anchor[k]) * scale;
      if (joins) {
        out[k] += own[k];
      }
      // GradScaler has looked for infinities in `own` before: the pull must not bring new ones.
      if (clamps && std::abs(own[k]) <= M(65504)) {
        out[k] = out[k] > M(65504) ? M(65504) : out[k] < M(-65504) ? M(-65504) : out[k];
      }
    }
    store(segment, OUT, tile, out);
  }
}

template <typename M>
__global__ void __launch_bounds__(THREADS) hold_back_kernel(const __grid_constant__ PenaltyArguments args) {
  constexpr int N = VECTOR<M>;
  if (args.skip.read(0) != 0) {
    return;
  }
  const PenaltySegment& segment = args.table.segment_of(blockIdx.x);
  const Factors<M> factors(args, segment);
  const Chunk chunk(args.table, segment, blockIdx.x);
  for (int at = 0; at < chunk.size; at += Tile<N>::SIZE) {
    const Tile<N> tile(chunk, at);
    Weights<M, N> x(segment, tile);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      x.w[k] = held_back(x.w[k], x.anchor[k], x.omega[k], factors.alpha_lambda);
    }
    store(segment, PARAM, tile, x.w);
  }
}

template <typename M>
__device__ int bin_of(M x) {
  if (!(x > M(0))) {
    return 0;
  }
  const M position = (std::log2(x) - M(LOW)) * M(BINS_PER_OCTAVE);
  return 1 + static_cast<int>(position < M(0) ? M(0) : position > M(BINS - 2) ? M(BINS - 2) : position);
}

// A block counts the chunks it takes in one histogram of its own before it adds that to the others'.
template <typename M>
__global__ void __launch_bounds__(THREADS) stats_kernel(const __grid_constant__ PenaltyArguments args) {
  constexpr int N = VECTOR<M>;
  __shared__ unsigned counts[BINS];
  for (int bin = threadIdx.x; bin < BINS; bin += THREADS) {
    counts[bin] = 0;
  }
  __syncthreads();
  for (int c = blockIdx.x; c < args.chunks; c += gridDim.x) {
    const PenaltySegment& segment = args.table.segment_of(c);
    const Factors<M> factors(args, segment);
    const Chunk chunk(args.table, segment, c);
    double value = 0, squares = 0, above = 0, largest = 0;
    for (int at = 0; at < chunk.size; at += Tile<N>::SIZE) {
      const Tile<N> tile(chunk, at);
      const Weights<M, N> x(segment, tile);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const M stiff = x.omega[k] * factors.lambda * factors.lr;
        const M drift = x.w[k] - x.anchor[k];
        value += static_cast<double>(factors.stiffness(x.omega[k]) * drift * drift);
        squares += static_cast<double>(drift) * static_cast<double>(drift);
        above += stiff > M(1) ? 1 : 0;
        largest = Largest()(largest, static_cast<double>(stiff));
        if (tile.has(k)) {
          atomicAdd(&counts[bin_of(stiff)], 1u);
        }
      }
    }
    value = over_block(value, Sum());
    squares = over_block(squares, Sum());
    above = over_block(above, Sum());
    largest = over_block(largest, Largest());
    if (threadIdx.x == 0) {
      double* terms = args.partials + int64_t(c) * TERMS;
      terms[VALUE] = value / 2;
      terms[SQUARES] = squares;
      terms[ABOVE_ONE] = above;
      terms[LARGEST] = largest;
    }
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < BINS; bin += THREADS) {
    if (counts[bin] != 0) {
      atomicAdd(&args.bins[bin], static_cast<unsigned long long>(counts[bin]));
    }
  }
}

struct Partials {
  const double* partials; // [chunks, terms]
  int64_t chunks;
  const unsigned long long* bins; // null without a histogram
  void* out;
  ScalarType dtype;
};

template <typename Merge>
__device__ double over_chunks(const Partials& args, int term, int terms, Merge merge) {
  double value = 0;
  for (int64_t c = threadIdx.x; c < args.chunks; c += THREADS) {
    value = merge(value, args.partials[c * terms + term]);
  }
  return over_block(value, merge);
}

__global__ void __launch_bounds__(THREADS) finish_value_kernel(const __grid_constant__ Partials args) {
  const double value = over_chunks(args, 0, 1, Sum());
  if (threadIdx.x != 0) {
    return;
  }
  if (args.dtype == ScalarType::Double) {
    *static_cast<double*>(args.out) = value;
  } else {
    *static_cast<float*>(args.out) = static_cast<float>(value);
  }
}

__global__ void __launch_bounds__(THREADS) finish_stats_kernel(const __grid_constant__ Partials args) {
  double* out = static_cast<double*>(args.out);
  for (int term = 0; term < TERMS; ++term) {
    const double value =
        term == LARGEST ? over_chunks(args, term, TERMS, Largest()) : over_chunks(args, term, TERMS, Sum());
    if (threadIdx.x == 0) {
      out[term] = value;
    }
  }
  for (int bin = threadIdx.x; bin < BINS; bin += THREADS) {
    out[TERMS + bin] = static_cast<double>(args.bins[bin]);
  }
}

Tensor ewc_penalty_value_cuda(
    std::vector<Tensor> params, std::vector<Tensor> importances, std::vector<Tensor> scales, std::vector<Tensor> anchors,
    double ewc_lambda, std::vector<double> lrs, std::optional<Tensor> live_lrs, std::string variant) {
  Call call("ewc_penalty_value", params, importances, scales, anchors, ewc_lambda, lrs, live_lrs, variant);
  ScalarType dtype = ScalarType::Float;
  for (size_t i = 0; i < params.size(); ++i) {
    call.add(params[i], {{PARAM, params[i]}, {IMPORTANCE, importances[i]}, {ANCHOR, anchors[i]}});
    dtype = is_wide(params[i], importances[i]) ? ScalarType::Double : dtype;
  }
  const int64_t chunks = call.chunks();
  const Tensor partials = torch::stable::new_empty(params[0], {chunks}, ScalarType::Double);
  const Tensor out = torch::stable::new_empty(params[0], {}, dtype);
  call.args.partials = static_cast<double*>(partials.mutable_data_ptr());
  call.launch_all(value_kernel<float>, value_kernel<double>, [&](auto kernel, int64_t launched) {
    call.place.launch(kernel, launched, call.args);
    call.args.partials += launched;
  });
  const double* sums = static_cast<const double*>(partials.const_data_ptr());
  call.place.launch(finish_value_kernel, 1, Partials{sums, chunks, nullptr, out.mutable_data_ptr(), dtype});
  return out;
}

std::vector<Tensor> ewc_penalty_grads_cuda(
    std::vector<Tensor> params, std::vector<Tensor> importances, std::vector<Tensor> scales, std::vector<Tensor> anchors,
    std::vector<Tensor> grads, double ewc_lambda, std::vector<double> lrs, std::optional<Tensor> live_lrs, std::string variant, bool negate,
    std::optional<Tensor> scale) {
  STD_TORCH_CHECK(
      grads.empty() || grads.size() == params.size(), "ewc_penalty_grads: wanted ", params.size(),
      " grads or none, given ", grads.size());
  Call call("ewc_penalty_grads", params, importances, scales, anchors, ewc_lambda, lrs, live_lrs, variant);
  call.args.negate = negate;
  call.args.scale = call.streams.scalar(scale);
  std::vector<Tensor> out;
  for (size_t i = 0; i < params.size(); ++i) {
    const Member w = {PARAM, params[i]}, omega = {IMPORTANCE, importances[i]}, anchor = {ANCHOR, anchors[i]};
    out.push_back(torch::stable::empty_like(grads.empty() ? params[i] : grads[i]));
    const Member to = {OUT, out.back(), true};
    if (grads.empty()) {
      call.add(out.back(), {w, omega, anchor, to});
    } else {
      call.add(out.back(), {w, omega, anchor, {GRAD, grads[i]}, to});
    }
  }
  call.launch_all(grads_kernel<float>, grads_kernel<double>);
  call.streams.copy_back();
  return out;
}

void ewc_hold_back_cuda(
    std::vector<Tensor> params, std::vector<Tensor> targets, std::vector<Tensor> importances, std::vector<Tensor> scales,
    double ewc_lambda, std::vector<double> lrs, std::optional<Tensor> live_lrs, std::optional<Tensor> skip) {
  Call call("ewc_hold_back_", params, importances, scales, targets, ewc_lambda, lrs, live_lrs, "stabilized");
  call.args.skip = call.streams.scalar(skip);
  for (size_t i = 0; i < params.size(); ++i) {
    call.add(params[i], {{PARAM, params[i], true}, {IMPORTANCE, importances[i]}, {ANCHOR, targets[i]}});
  }
  call.launch_all(hold_back_kernel<float>, hold_back_kernel<double>);
  call.streams.copy_back();
}

Tensor ewc_stats_terms_cuda(
    std::vector<Tensor> params, std::vector<Tensor> importances, std::vector<Tensor> scales, std::vector<Tensor> anchors,
    double ewc_lambda, std::vector<double> lrs, std::optional<Tensor> live_lrs, std::string variant) {
  Call call("ewc_stats_terms", params, importances, scales, anchors, ewc_lambda, lrs, live_lrs, variant);
  for (size_t i = 0; i < params.size(); ++i) {
    call.add(params[i], {{PARAM, params[i]}, {IMPORTANCE, importances[i]}, {ANCHOR, anchors[i]}});
  }
  const int64_t chunks = call.chunks();
  const Tensor partials = torch::stable::new_empty(params[0], {chunks, TERMS}, ScalarType::Double);
  const Tensor bins = torch::stable::new_zeros(params[0], {BINS}, ScalarType::Long);
  const Tensor out = torch::stable::new_empty(params[0], {TERMS + BINS}, ScalarType::Double);
  call.args.partials = static_cast<double*>(partials.mutable_data_ptr());
  call.args.bins = static_cast<unsigned long long*>(bins.mutable_data_ptr());
  call.launch_all(stats_kernel<float>, stats_kernel<double>, [&](auto kernel, int64_t launched) {
    call.place.launch(kernel, std::min<int64_t>(launched, BLOCKS_OF_STATS * call.place.multiprocessors()), call.args);
    call.args.partials += launched * TERMS;
  });
  const double* sums = static_cast<const double*>(partials.const_data_ptr());
  call.place.launch(
      finish_stats_kernel, 1, Partials{sums, chunks, call.args.bins, out.mutable_data_ptr(), ScalarType::Double});
  return out;
}

} // namespace
} // namespace fastewc

STABLE_TORCH_LIBRARY_IMPL(fastewc, CUDA, m) {
  m.impl("ewc_penalty_value", TORCH_BOX(&fastewc::ewc_penalty_value_cuda));
  m.impl("ewc_penalty_grads", TORCH_BOX(&fastewc::ewc_penalty_grads_cuda));
  m.impl("ewc_hold_back_", TORCH_BOX(&fastewc::ewc_hold_back_cuda));
  m.impl("ewc_stats_terms", TORCH_BOX(&fastewc::ewc_stats_terms_cuda));
}
