// ewc_step on the CPU: SGD, Adam and AdamW with the penalty inside, one parallel loop over all tensors.
//
// fastewc/ops/ewc_step/reference.py is the specification; the schema is in fastewc/ops/ewc_step/schema.py. Each block of
// 1,024 elements goes through short loops (gradient, update, hold back, path integral) whose intermediate values stay in
// the first-level cache: memory is read and written once, and a flag chooses between loops, not inside them.
#include "blocks_cpu.h"

#include <cmath>
#include <optional>
#include <string>
#include <vector>

namespace fastewc {
namespace {

// Rounds values of a parameter as they will be stored.
template <typename T>
FASTEWC_INLINE void round_to(ScalarType dtype, T* values, int64_t n) {
  if (dtype == ScalarType::BFloat16 || dtype == ScalarType::Half) {
    uint16_t rounded[BLOCK];
    const Stream scratch{rounded, dtype};
    store(scratch, 0, n, values);
    load(scratch, 0, n, values);
  }
}

// What the penalty does to one parameter: it pulls through the gradient, or holds the step back.
struct Kind {
  Pull pull = Pull::none;
  bool holds = false;

  Kind(bool is_protected, Variant variant) {
    if (is_protected) {
      pull = variant == Variant::plain ? Pull::plain : variant == Variant::stabilized ? Pull::stabilized : Pull::none;
      holds = pull == Pull::none;
    }
  }
};

// Calls f with the kind as constants. Each costs the compiler four loops for each width of vectors, and someone waits for
// it at first use; so the two that hold back share theirs.
template <typename F>
FASTEWC_INLINE void with_kind(Kind kind, const F& f) {
  if (kind.holds) {
    return f.template operator()<Pull::none, true>();
  }
  switch (kind.pull) {
    case Pull::none:
      return f.template operator()<Pull::none, false>();
    case Pull::plain:
      return f.template operator()<Pull::plain, false>();
    case Pull::stabilized:
      return f.template operator()<Pull::stabilized, false>();
  }
}

template <typename T>
FASTEWC_INLINE void step_blocks(const Rule<T>& rule, const Entry& entry, int64_t begin, int64_t end) {
  alignas(64) T w_buffer[BLOCK], grad_buffer[BLOCK], m_buffer[BLOCK], v_buffer[BLOCK], largest_buffer[BLOCK],
      new_buffer[BLOCK], omega_buffer[BLOCK], anchor_buffer[BLOCK], path_buffer[BLOCK];
  const auto or_null = [](const Stream& stream, int64_t begin, int64_t n, T* buffer) FASTEWC_INLINE_LAMBDA -> T* {
    return stream ? load(stream, begin, n, buffer) : nullptr;
  };
  const Kind kind(bool(entry.importance), rule.variant);
  for (; begin < end; begin += BLOCK) {
    const int64_t n = std::min(BLOCK, end - begin);
    T* const w = entry.remainder ? load_whole(entry.param, entry.remainder, begin, n, w_buffer)
                                 : load(entry.param, begin, n, w_buffer);
    const T* const anchor = or_null(entry.anchor, begin, n, anchor_buffer);
    const Block<T> in{
        .n = n,
        .w = w,
        .grad = load(entry.grad, begin, n, grad_buffer),
        .omega = or_null(entry.importance, begin, n, omega_buffer),
        .anchor = anchor,
        .target = rule.variant == Variant::proximal ? anchor : w,
    };
    // Straight into the parameter, unless it needs rounding or the old weight is needed afterwards.
    T* const w_new = w == w_buffer || entry.path_integral ? new_buffer : w;
    T* const b = or_null(entry.momentum_buffer, begin, n, m_buffer);
    T* const m = or_null(entry.exp_avg, begin, n, m_buffer);
    T* const v = or_null(entry.exp_avg_sq, begin, n, v_buffer);
    T* const largest = or_null(entry.max_exp_avg_sq, begin, n, largest_buffer);
    T* const path = or_null(entry.path_integral, begin, n, path_buffer);
    with_kind(kind, [&]<Pull pull, bool holds>() FASTEWC_INLINE_LAMBDA {
      if (!rule.adam) {
        sgd_block<pull, holds>(rule, in, b, w_new);
      } else if (largest == nullptr) {
        adam_block<pull, holds, false>(rule, entry, in, m, v, largest, w_new);
      } else {
        adam_block<pull, holds, true>(rule, entry, in, m, v, largest, w_new);
      }
    });
    if (path != nullptr) {
      if (!entry.remainder) {
        round_to(entry.param.dtype, w_new, n);
      }
      path_block(rule, rule.regularized_path ? kind.pull : Pull::none, in, w_new, path);
    }
    const auto keep = [&](const Stream& stream, const T* values) FASTEWC_INLINE_LAMBDA {
      if (stream) {
        store(stream, begin, n, values);
      }
    };
    keep(entry.momentum_buffer, b);
    keep(entry.exp_avg, m);
    keep(entry.exp_avg_sq, v);
    keep(entry.max_exp_avg_sq, largest);
    keep(entry.path_integral, path);
    if (entry.remainder) {
      store_halves(entry.param, entry.remainder, begin, n, w_new);
    } else {
      store(entry.param, begin, n, w_new);
    }
  }
}

// Adam of float32 throughout, but for codes of Ω and w* in bfloat16: what a large model is stepped with in little memory.
bool is_compact(const Rule<float>& rule, const Entry& entry) {
  const auto is_float = [](const Stream& stream) { return stream.dtype == ScalarType::Float; };
  return rule.adam && Kind(true, rule.variant).pull != Pull::none && !entry.max_exp_avg_sq && !entry.path_integral &&
      entry.importance && entry.importance.dtype == ScalarType::Byte && entry.anchor.dtype == ScalarType::BFloat16 &&
      is_float(entry.param) && is_float(entry.grad) && is_float(entry.exp_avg) && is_float(entry.exp_avg_sq);
}
bool is_compact(const Rule<double>&, const Entry&) {
  return false;
}

FASTEWC_INLINE void compact_blocks(const Rule<float>& rule, const Entry& entry, int64_t begin, int64_t end) {
  float* const w = static_cast<float*>(entry.param.data);
  float* const m = static_cast<float*>(entry.exp_avg.data);
  float* const v = static_cast<float*>(entry.exp_avg_sq.data);
  for (; begin < end; begin += BLOCK) {
    const CompactBlock in{
        .n = std::min(BLOCK, end - begin),
        .w = w + begin,
        .grad = static_cast<const float*>(entry.grad.data) + begin,
        .codes = static_cast<const uint8_t*>(entry.importance.data) + begin,
        .scale = entry.importance.scales[begin / CODE_BLOCK],
        .anchors = static_cast<const BFloat16*>(entry.anchor.data) + begin,
    };
    float* const none = nullptr;
    if (rule.variant == Variant::plain) {
      adam_block<Pull::plain, false, false>(rule, entry, in, m + begin, v + begin, none, w + begin);
    } else {
      adam_block<Pull::stabilized, false, false>(rule, entry, in, m + begin, v + begin, none, w + begin);
    }
  }
}
FASTEWC_INLINE void compact_blocks(const Rule<double>&, const Entry&, int64_t, int64_t) {}

double value_or(const std::optional<Tensor>& t, double otherwise) {
  return t ? number(*t) : otherwise;
}

// Advances the counter and returns it.
double advance(const Tensor& step) {
  double t = 0;
  dispatch_floating("ewc_step", step.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    S* count = static_cast<S*>(step.mutable_data_ptr());
    *count = static_cast<S>(to_float(*count) + 1);
    t = to_float(*count);
  });
  return t;
}

void ewc_step_cpu(
    std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffers,
    std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> max_exp_avg_sqs,
    std::vector<Tensor> steps, std::vector<Tensor> importances, std::vector<Tensor> scales,
    std::vector<Tensor> anchors, std::vector<Tensor> path_integrals, std::vector<Tensor> remainders,
    std::optional<Tensor> clip_coef, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
    std::optional<Tensor> live_scalars, std::vector<double> scalars, std::string kind, std::string variant,
    bool maximize, bool nesterov, bool first, bool amsgrad, bool decoupled_weight_decay, bool clip_penalty,
    bool regularized_path) {
  const size_t count = params.size();
  const bool adam = is_adam(kind);
  const Variant chosen = variant_of(variant);
  check_lists(count, {&grads}, {&momentum_buffers, &importances, &path_integrals, &remainders});
  check_lists(adam ? count : 0, {&exp_avgs, &exp_avg_sqs, &steps}, {});
  check_lists(adam && amsgrad ? count : 0, {&max_exp_avg_sqs}, {});
  check_lists(importances.size(), {&anchors}, {&scales});
  check_scalars(scalars, live_scalars);
  if (live_scalars) {
    const double* live = static_cast<const double*>(live_scalars->const_data_ptr());
    scalars.assign(live, live + 8);
  }
  const double lr = scalars[0], lambda = scalars[1], decay = scalars[2], beta1 = scalars[3], beta2 = scalars[4],
               eps = scalars[5], momentum = scalars[6], dampening = scalars[7];

  // Everything is checked before anything is written.
  Streams streams("ewc_step", importances, scales);
  std::vector<Entry> entries(count);
  std::vector<int64_t> float_sizes(count, 0), double_sizes(count, 0);
  for (size_t i = 0; i < count; ++i) {
    Entry& entry = entries[i];
    streams.begin(
        params[i],
        {&params, &grads, &momentum_buffers, &exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs, &importances, &anchors,
         &path_integrals, &remainders},
        i);
    entry.param = streams.write(params[i]);
    entry.remainder = remainders.empty() ? Stream{} : streams.write_remainder(remainders[i]);
    entry.grad = streams.read(grads[i]);
    entry.momentum_buffer = momentum_buffers.empty() ? Stream{} : streams.write(momentum_buffers[i]);
    entry.exp_avg = exp_avgs.empty() ? Stream{} : streams.write(exp_avgs[i]);
    entry.exp_avg_sq = exp_avg_sqs.empty() ? Stream{} : streams.write(exp_avg_sqs[i]);
    entry.max_exp_avg_sq = max_exp_avg_sqs.empty() ? Stream{} : streams.write(max_exp_avg_sqs[i]);
    entry.importance = importances.empty() ? Stream{} : streams.read_importance(i);
    entry.anchor = anchors.empty() ? Stream{} : streams.read(anchors[i]);
    entry.path_integral = path_integrals.empty() ? Stream{} : streams.write(path_integrals[i]);
    (params[i].scalar_type() == ScalarType::Double ? double_sizes : float_sizes)[i] = params[i].numel();
  }
  if (value_or(found_inf, 0) != 0) {
    return;
  }
  double counted = -1;
  for (size_t i = 0; adam && i < count; ++i) {
    const double t = advance(steps[i]);
    if (i > 0 && t == counted) {
      entries[i].step_size = entries[i - 1].step_size;
      entries[i].root_bias_correction2 = entries[i - 1].root_bias_correction2;
      continue;
    }
    counted = t;
    entries[i].step_size = lr / (1 - std::pow(beta1, t));
    entries[i].root_bias_correction2 = std::sqrt(1 - std::pow(beta2, t));
  }
  const auto run = [&]<typename T>(T, const std::vector<int64_t>& sizes) {
    const float unscale = grad_scale ? static_cast<float>(1 / number(*grad_scale)) : 1.0f;
    const Rule<T> rule{
        .adam = adam,
        .nesterov = nesterov,
        .first = first,
        .clip_penalty = clip_penalty,
        .regularized_path = regularized_path,
        .variant = chosen,
        .task_factor = static_cast<T>(maximize ? -unscale : unscale),
        .clip = static_cast<T>(value_or(clip_coef, 1)),
        .lr = static_cast<T>(lr),
        .lambda = static_cast<T>(lambda),
        .alpha_lambda = static_cast<T>(lambda * lr),
        .limit = stiffness_limit<T>(lr),
        .coupled_decay = static_cast<T>(decoupled_weight_decay ? 0 : decay),
        .decay_factor = static_cast<T>(decoupled_weight_decay ? 1 - lr * decay : 1),
        .beta2 = static_cast<T>(beta2),
        .one_minus_beta1 = static_cast<T>(1 - beta1),
        .one_minus_beta2 = static_cast<T>(1 - beta2),
        .eps = static_cast<T>(eps),
        .momentum = static_cast<T>(momentum),
        .one_minus_dampening = static_cast<T>(1 - dampening),
    };
    parallel_over(sizes, [&](size_t i, int64_t begin, int64_t end) {
      if (is_compact(rule, entries[i])) {
        vectorised<T>([&]() FASTEWC_INLINE_LAMBDA { compact_blocks(rule, entries[i], begin, end); });
      } else {
        vectorised<T>([&]() FASTEWC_INLINE_LAMBDA { step_blocks(rule, entries[i], begin, end); });
      }
    });
  };
  run(float{}, float_sizes);
  run(double{}, double_sizes);
  streams.copy_back();
}

} // namespace
} // namespace fastewc

STABLE_TORCH_LIBRARY_IMPL(fastewc, CPU, m) {
  m.impl("ewc_step", TORCH_BOX(&fastewc::ewc_step_cpu));
}
