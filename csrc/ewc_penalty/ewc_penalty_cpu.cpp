// The penalty on the CPU: value, gradient, statistics, and the pull back after a step; one parallel loop over all tensors.
//
// fastewc/ops/ewc_penalty/reference.py is the specification; the schemas are in fastewc/ops/ewc_penalty/schema.py.
#include "../ewc_step/rule.h"
#include "../multi_tensor_cpu.h"
#include "arithmetic.h"
#include "terms.h"

#include <array>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace fastewc {
namespace {

// One parameter with what belongs to it; α may differ from one to the next.
struct Entry {
  Stream param, importance, target, grad, out;
  double lr = 0;
};

// What all tensors of a call share. T is the arithmetic's type.
template <typename T>
struct Rule {
  double lambda;
  bool stabilized;
  T scale; // of the gradient
};

template <typename R>
struct arithmetic;
template <typename T>
struct arithmetic<Rule<T>> {
  using type = T;
};
template <typename R>
using arithmetic_t = typename arithmetic<std::remove_cvref_t<R>>::type;

// c of E1 or E2 for one α, as a function of Ω.
template <typename T>
struct Stiffness {
  T lambda, alpha, limit;
  bool stabilized;
  Stiffness(const Rule<T>& rule, double lr)
      : lambda(static_cast<T>(rule.lambda)),
        alpha(static_cast<T>(lr)),
        limit(stiffness_limit<T>(lr)),
        stabilized(rule.stabilized) {}
  FASTEWC_INLINE T operator()(T omega) const {
    return stabilized ? stabilized_stiffness(omega, lambda, alpha, limit) : lambda * omega;
  }
};

template <typename T>
FASTEWC_INLINE void value_blocks(const Rule<T>& rule, const Entry& entry, int64_t begin, int64_t end, double* sums) {
  alignas(64) T w_buffer[BLOCK], omega_buffer[BLOCK], anchor_buffer[BLOCK];
  const Stiffness<T> stiffness(rule, entry.lr);
  for (; begin < end; begin += BLOCK) {
    const int64_t n = std::min(BLOCK, end - begin);
    const T* w = load(entry.param, begin, n, w_buffer);
    const T* omega = load(entry.importance, begin, n, omega_buffer);
    const T* anchor = load(entry.target, begin, n, anchor_buffer);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) {
      const T drift = w[i] - anchor[i];
      sum += stiffness(omega[i]) * drift * drift;
    }
    *sums++ = sum;
  }
}

template <typename T>
FASTEWC_INLINE void grad_blocks(const Rule<T>& rule, const Entry& entry, int64_t begin, int64_t end) {
  alignas(64) T w_buffer[BLOCK], omega_buffer[BLOCK], anchor_buffer[BLOCK], grad_buffer[BLOCK], out_buffer[BLOCK];
  constexpr T LARGEST_HALF = 65504;
  const Stiffness<T> stiffness(rule, entry.lr);
  for (; begin < end; begin += BLOCK) {
    const int64_t n = std::min(BLOCK, end - begin);
    const T* w = load(entry.param, begin, n, w_buffer);
    const T* omega = load(entry.importance, begin, n, omega_buffer);
    const T* anchor = load(entry.target, begin, n, anchor_buffer);
    T* out = entry.out.dtype == dtype_of<T> ? load(entry.out, begin, n, out_buffer) : out_buffer;
    const T scale = rule.scale;
    if (!entry.grad) {
      stream(n, {w, omega, anchor}, [&](int64_t i) FASTEWC_INLINE_LAMBDA {
        out[i] = stiffness(omega[i]) * (w[i] - anchor[i]) * scale;
      });
    } else {
      const T* grad = load(entry.grad, begin, n, grad_buffer);
      stream(n, {w, omega, anchor, grad}, [&](int64_t i) FASTEWC_INLINE_LAMBDA {
        out[i] = grad[i] + stiffness(omega[i]) * (w[i] - anchor[i]) * scale;
      });
      if (entry.out.dtype == ScalarType::Half) {
        // GradScaler has looked for infinities before: the pull must not add one.
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          const T within = std::min(std::max(out[i], -LARGEST_HALF), LARGEST_HALF);
          out[i] = grad[i] - grad[i] == T(0) ? within : out[i];
        }
      }
    }
    store(entry.out, begin, n, out);
  }
}

template <typename T>
FASTEWC_INLINE void hold_blocks(const Rule<T>& rule, const Entry& entry, int64_t begin, int64_t end) {
  alignas(64) T w_buffer[BLOCK], omega_buffer[BLOCK], target_buffer[BLOCK];
  const T alpha_lambda = static_cast<T>(rule.lambda * entry.lr);
  for (; begin < end; begin += BLOCK) {
    const int64_t n = std::min(BLOCK, end - begin);
    T* w = load(entry.param, begin, n, w_buffer);
    const T* omega = load(entry.importance, begin, n, omega_buffer);
    const T* target = load(entry.target, begin, n, target_buffer);
    stream(n, {w, omega, target}, [&](int64_t i) FASTEWC_INLINE_LAMBDA {
      w[i] = held_back(w[i], target[i], omega[i], alpha_lambda);
    });
    store(entry.param, begin, n, w);
  }
}

// log2 x for x > 0, infinity included, to 1e-6: exponent and mantissa m in [√½, √2), ln m = 2 atanh((m − 1)/(m + 1)).
FASTEWC_INLINE float log2_of(float x) {
  const bool subnormal = x < std::numeric_limits<float>::min();
  const uint32_t bits = std::bit_cast<uint32_t>(subnormal ? x * 0x1p64f : x);
  const uint32_t shifted = bits - 0x3f3504f3; // √½
  const int32_t exponent = static_cast<int32_t>(shifted) >> 23;
  const float m = std::bit_cast<float>((shifted & 0x7fffff) + 0x3f3504f3);
  const float t = (m - 1) / (m + 1);
  const float t2 = t * t;
  const float series = 1 + t2 * (1.0f / 3 + t2 * (1.0f / 5 + t2 * (1.0f / 7 + t2 * (1.0f / 9))));
  return static_cast<float>(exponent - (subnormal ? 64 : 0)) + 2.88539008f * t * series;
}

// What one thread sums over its blocks; the sums of floats are kept block by block, to be added in a fixed order.
struct Counts {
  std::array<int64_t, BINS> bins{};
  int64_t above = 0;
  double largest = 0;
};

template <typename T>
FASTEWC_INLINE void stats_blocks(
    const Rule<T>& rule, const Entry& entry, int64_t begin, int64_t end, double* values, double* squares,
    Counts& counts) {
  alignas(64) T w_buffer[BLOCK], omega_buffer[BLOCK], anchor_buffer[BLOCK];
  alignas(64) int32_t bins[BLOCK];
  const Stiffness<T> stiffness(rule, entry.lr);
  const T lambda = static_cast<T>(rule.lambda), alpha = static_cast<T>(entry.lr);
  for (; begin < end; begin += BLOCK) {
    const int64_t n = std::min(BLOCK, end - begin);
    const T* w = load(entry.param, begin, n, w_buffer);
    const T* omega = load(entry.importance, begin, n, omega_buffer);
    const T* anchor = load(entry.target, begin, n, anchor_buffer);
    T value = 0, square = 0, largest = 0;
    int32_t above = 0;
#pragma omp simd reduction(+ : value, square, above) reduction(max : largest)
    for (int64_t i = 0; i < n; ++i) {
      const T drift = w[i] - anchor[i];
      value += stiffness(omega[i]) * drift * drift;
      square += drift * drift;
      const T x = omega[i] * lambda * alpha;
      above += x > T(1) ? 1 : 0;
      largest = x > largest ? x : largest;
      const float place = (log2_of(static_cast<float>(x)) - LOW) * BINS_PER_OCTAVE;
      const float inside = place < 0 ? 0 : place > BINS - 2 ? BINS - 2 : place;
      bins[i] = x > T(0) ? static_cast<int32_t>(inside) + 1 : 0;
    }
    *values++ = value;
    *squares++ = square;
    counts.above += above;
    counts.largest = std::max<double>(counts.largest, largest);
    for (int64_t i = 0; i < n; ++i) {
      ++counts.bins[bins[i]];
    }
  }
}

// What the four ops have in common: their tensors as entries, and a loop over those whose arithmetic is float, then over
// those whose arithmetic is double.
class Call {
 public:
  Call(
      const char* op, const std::vector<Tensor>& params, const std::vector<Tensor>& importances,
      const std::vector<Tensor>& scales, const std::vector<Tensor>& targets, const std::vector<double>& lrs,
      const std::optional<Tensor>& live_lrs,      const std::vector<Tensor>& grads = {}, const std::vector<Tensor>& outs = {}, bool in_place = false)
      : streams_(op, importances, scales),
        entries_(params.size()),
        float_sizes_(params.size(), 0),
        double_sizes_(params.size(), 0) {
    const size_t count = params.size();
    for (const auto* list : {&importances, &targets}) {
      STD_TORCH_CHECK(list->size() == count, op, ": wanted lists of ", count, " tensors, given ", list->size());
    }
    STD_TORCH_CHECK(
        grads.empty() || grads.size() == count, op, ": wanted ", count, " grads or none, given ", grads.size());
    STD_TORCH_CHECK(
        live_lrs ? live_lrs->numel() == static_cast<int64_t>(count) && live_lrs->scalar_type() == ScalarType::Double &&
                live_lrs->is_contiguous()
                 : lrs.size() == count,
        op, ": wanted one learning rate for each of ", count, " tensors");
    const double* alpha = live_lrs ? static_cast<const double*>(live_lrs->const_data_ptr()) : lrs.data();
    for (size_t i = 0; i < count; ++i) {
      streams_.begin(params[i], {&params, &importances, &targets, &grads, &outs}, i);
      entries_[i].param = in_place ? streams_.write(params[i]) : streams_.read(params[i]);
      entries_[i].importance = streams_.read_importance(i);
      entries_[i].target = streams_.read(targets[i]);
      entries_[i].grad = grads.empty() ? Stream{} : streams_.read(grads[i]);
      entries_[i].out = outs.empty() ? Stream{} : streams_.write(outs[i]);
      entries_[i].lr = alpha[i];
      const bool wide = is_wide(params[i], importances[i]);
      wide_ = wide_ || wide;
      (wide ? double_sizes_ : float_sizes_)[i] = params[i].numel();
    }
  }

  bool wide() const {
    return wide_; // whether any arithmetic is double
  }

  // f(rule, entry, begin, end, block), the last counted over all entries.
  template <typename F>
  void run(double lambda, const std::string& variant, double scale, const F& f) {
    STD_TORCH_CHECK(
        variant == "plain" || variant == "stabilized", "ewc_penalty: wanted variant \"plain\" or \"stabilized\", given \"",
        variant, "\"");
    int64_t before = 0;
    const auto pass = [&]<typename T>(T, const std::vector<int64_t>& sizes) {
      const Rule<T> rule{lambda, variant == "stabilized", static_cast<T>(scale)};
      const std::vector<int64_t> first_block = first_blocks(sizes);
      parallel_over(sizes, [&](size_t i, int64_t begin, int64_t end) {
        f(rule, entries_[i], begin, end, before + first_block[i] + begin / BLOCK);
      });
      before += first_block.back();
    };
    pass(float{}, float_sizes_);
    pass(double{}, double_sizes_);
    streams_.copy_back();
  }

  size_t blocks() const {
    return first_blocks(float_sizes_).back() + first_blocks(double_sizes_).back();
  }

 private:
  Streams streams_;
  std::vector<Entry> entries_;
  std::vector<int64_t> float_sizes_, double_sizes_;
  bool wide_ = false;
};

double total(const std::vector<double>& sums) {
  double sum = 0;
  for (const double part : sums) {
    sum += part;
  }
  return sum;
}

Tensor ewc_penalty_value_cpu(
    std::vector<Tensor> params, std::vector<Tensor> importances, std::vector<Tensor> scales, std::vector<Tensor> anchors,
    double ewc_lambda, std::vector<double> lrs, std::optional<Tensor> live_lrs, std::string variant) {
  Call call("ewc_penalty_value", params, importances, scales, anchors, lrs, live_lrs);
  std::vector<double> sums(call.blocks());
  call.run(ewc_lambda, variant, 1, [&](const auto& rule, const Entry& entry, int64_t begin, int64_t end, int64_t block) {
    vectorised<arithmetic_t<decltype(rule)>>([&]() FASTEWC_INLINE_LAMBDA {
      value_blocks(rule, entry, begin, end, sums.data() + block);
    });
  });
  return torch::stable::full(
      {}, total(sums) / 2, call.wide() ? ScalarType::Double : ScalarType::Float, std::nullopt, std::nullopt);
}

std::vector<Tensor> ewc_penalty_grads_cpu(
    std::vector<Tensor> params, std::vector<Tensor> importances, std::vector<Tensor> scales, std::vector<Tensor> anchors,
    std::vector<Tensor> grads, double ewc_lambda, std::vector<double> lrs, std::optional<Tensor> live_lrs, std::string variant, bool negate,
    std::optional<Tensor> scale) {
  std::vector<Tensor> outs;
  for (size_t i = 0; i < params.size(); ++i) {
    outs.push_back(torch::stable::empty_like(grads.size() == params.size() ? grads[i] : params[i]));
  }
  Call call("ewc_penalty_grads", params, importances, scales, anchors, lrs, live_lrs, grads, outs);
  const double factor = (negate ? -1 : 1) * (scale ? number(*scale) : 1);
  call.run(ewc_lambda, variant, factor, [&](const auto& rule, const Entry& entry, int64_t begin, int64_t end, int64_t) {
    vectorised<arithmetic_t<decltype(rule)>>([&]() FASTEWC_INLINE_LAMBDA {
      grad_blocks(rule, entry, begin, end);
    });
  });
  return outs;
}

void ewc_hold_back_cpu(
    std::vector<Tensor> params, std::vector<Tensor> targets, std::vector<Tensor> importances, std::vector<Tensor> scales,
    double ewc_lambda, std::vector<double> lrs, std::optional<Tensor> live_lrs, std::optional<Tensor> skip) {
  Call call("ewc_hold_back_", params, importances, scales, targets, lrs, live_lrs, {}, {}, true);
  if (skip && number(*skip) != 0) {
    return;
  }
  call.run(ewc_lambda, "plain", 1, [&](const auto& rule, const Entry& entry, int64_t begin, int64_t end, int64_t) {
    vectorised<arithmetic_t<decltype(rule)>>([&]() FASTEWC_INLINE_LAMBDA {
      hold_blocks(rule, entry, begin, end);
    });
  });
}

Tensor ewc_stats_terms_cpu(
    std::vector<Tensor> params, std::vector<Tensor> importances, std::vector<Tensor> scales, std::vector<Tensor> anchors,
    double ewc_lambda, std::vector<double> lrs, std::optional<Tensor> live_lrs, std::string variant) {
  Call call("ewc_stats_terms", params, importances, scales, anchors, lrs, live_lrs);
  std::vector<double> values(call.blocks()), squares(call.blocks());
  Counts all;
  std::mutex mutex;
  call.run(ewc_lambda, variant, 1, [&](const auto& rule, const Entry& entry, int64_t begin, int64_t end, int64_t block) {
    const auto own = std::make_unique<Counts>();
    vectorised<arithmetic_t<decltype(rule)>>([&]() FASTEWC_INLINE_LAMBDA {
      stats_blocks(rule, entry, begin, end, values.data() + block, squares.data() + block, *own);
    });
    const std::lock_guard lock(mutex);
    for (int i = 0; i < BINS; ++i) {
      all.bins[i] += own->bins[i];
    }
    all.above += own->above;
    all.largest = std::max(all.largest, own->largest);
  });
  const Tensor terms = torch::stable::empty({TERMS + BINS}, ScalarType::Double);
  double* out = static_cast<double*>(terms.mutable_data_ptr());
  out[VALUE] = total(values) / 2;
  out[SQUARES] = total(squares);
  out[ABOVE_ONE] = static_cast<double>(all.above);
  out[LARGEST] = all.largest;
  std::copy(all.bins.begin(), all.bins.end(), out + TERMS);
  return terms;
}

} // namespace
} // namespace fastewc

STABLE_TORCH_LIBRARY_IMPL(fastewc, CPU, m) {
  m.impl("ewc_penalty_value", TORCH_BOX(&fastewc::ewc_penalty_value_cpu));
  m.impl("ewc_penalty_grads", TORCH_BOX(&fastewc::ewc_penalty_grads_cpu));
  m.impl("ewc_hold_back_", TORCH_BOX(&fastewc::ewc_hold_back_cpu));
  m.impl("ewc_stats_terms", TORCH_BOX(&fastewc::ewc_stats_terms_cpu));
}
