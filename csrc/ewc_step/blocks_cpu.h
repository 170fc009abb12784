// The loops of ewc_step over one block on the CPU: gradient, update, hold back, path integral.
#pragma once

#include "../multi_tensor_cpu.h"
#include "arguments.h"
#include "rule.h"

#include <cmath>

namespace fastewc {

enum class Pull { none, plain, stabilized };

// What all tensors share. T is the arithmetic's type; sums and products of scalars are formed in double before.
template <typename T>
struct Rule {
  bool adam, nesterov, first, clip_penalty, regularized_path;
  Variant variant;
  T task_factor; // ± 1/grad_scale
  T clip; // κ
  T lr, lambda, alpha_lambda, limit;
  T coupled_decay, decay_factor; // SGD, Adam: g + ηw; AdamW: (1 − αη)w
  T beta2, one_minus_beta1, one_minus_beta2, eps;
  T momentum, one_minus_dampening;
};

// One parameter with what belongs to it.
struct Entry {
  Stream param, remainder, grad, momentum_buffer, exp_avg, exp_avg_sq, max_exp_avg_sq, importance, anchor,
      path_integral;
  double step_size = 0, root_bias_correction2 = 1; // Adam: α/(1 − β₁ᵗ) and √(1 − β₂ᵗ)
};

// A block of the inputs, converted to T.
template <typename T>
struct Block {
  int64_t n;
  const T *w, *grad, *omega, *anchor;
  const T* target; // of what holds back: w* or the old w
};

// A block whose Ω and w* are converted where they are used. What costs most is memory: a pass of its own over the block,
// as `load` makes it, has the processor compute while no memory is on its way.
struct CompactBlock {
  int64_t n;
  const float *w, *grad;
  const uint8_t* codes;
  float scale;
  const BFloat16* anchors;
};

template <typename T>
FASTEWC_INLINE T omega_at(const Block<T>& in, int64_t i) {
  return in.omega[i];
}
FASTEWC_INLINE float omega_at(const CompactBlock& in, int64_t i) {
  return decoded(in.codes[i]) * in.scale;
}

template <typename T>
FASTEWC_INLINE T anchor_at(const Block<T>& in, int64_t i) {
  return in.anchor[i];
}
FASTEWC_INLINE float anchor_at(const CompactBlock& in, int64_t i) {
  return to_float(in.anchors[i]);
}

template <typename T>
FASTEWC_INLINE Walked omegas_of(const Block<T>& in) {
  return in.omega;
}
FASTEWC_INLINE Walked omegas_of(const CompactBlock& in) {
  return in.codes;
}

template <typename T>
FASTEWC_INLINE Walked anchors_of(const Block<T>& in) {
  return in.anchor;
}
FASTEWC_INLINE Walked anchors_of(const CompactBlock& in) {
  return in.anchors;
}

// κ·task + c(w − w*), or κ·(task + c(w − w*)), then + ηw: the gradient that the optimizer sees.
template <Pull pull, typename T, typename In = Block<T>>
struct Gradient {
  const In& in;
  T before, after, lambda, alpha, limit, eta;

  Gradient(const Rule<T>& rule, const In& in, T clip, T eta)
      : in(in),
        before(rule.task_factor * (rule.clip_penalty ? T(1) : clip)),
        after(rule.clip_penalty ? clip : T(1)),
        lambda(rule.lambda),
        alpha(rule.lr),
        limit(rule.limit),
        eta(eta) {}

  FASTEWC_INLINE T operator()(int64_t i) const {
    T g = in.grad[i] * before;
    if constexpr (pull == Pull::plain) {
      g += lambda * omega_at(in, i) * (in.w[i] - anchor_at(in, i));
    } else if constexpr (pull == Pull::stabilized) {
      g += stabilized_stiffness(omega_at(in, i), lambda, alpha, limit) * (in.w[i] - anchor_at(in, i));
    }
    return g * after + eta * in.w[i];
  }
};

// w⁺ from w′.
template <bool holds, typename T, typename In>
FASTEWC_INLINE T held(const In& in, T alpha_lambda, T w_new, int64_t i) {
  if constexpr (holds) {
    return held_back(w_new, in.target[i], in.omega[i], alpha_lambda);
  }
  return w_new;
}

// SGD; b is the momentum buffer, null without momentum.
template <Pull pull, bool holds, typename T>
FASTEWC_INLINE void sgd_block(const Rule<T>& rule, const Block<T>& in, T* b, T* w_new) {
  const Gradient<pull, T> gradient(rule, in, rule.clip, rule.coupled_decay);
  const T lr = rule.lr, alpha_lambda = rule.alpha_lambda;
  if (b == nullptr) {
    return stream(in.n, {in.w, in.grad, in.omega, in.anchor}, [&](int64_t i) FASTEWC_INLINE_LAMBDA {
      w_new[i] = held<holds>(in, alpha_lambda, in.w[i] - lr * gradient(i), i);
    });
  }
  const T keep = rule.first ? T(0) : rule.momentum, fresh = rule.first ? T(1) : rule.one_minus_dampening;
  const T own = rule.nesterov ? T(1) : T(0), share = rule.nesterov ? rule.momentum : T(1);
  if (rule.first) {
    std::fill_n(b, in.n, T(0)); // what is there now is not a number to rely on
  }
  stream(in.n, {in.w, in.grad, in.omega, in.anchor, b}, [&](int64_t i) FASTEWC_INLINE_LAMBDA {
    const T g = gradient(i);
    const T velocity = keep * b[i] + fresh * g;
    w_new[i] = held<holds>(in, alpha_lambda, in.w[i] - lr * (own * g + share * velocity), i);
    b[i] = velocity;
  });
}

// Adam and AdamW; `largest` is amsgrad's maximum of v.
template <Pull pull, bool holds, bool amsgrad, typename T, typename In>
FASTEWC_INLINE void adam_block(
    const Rule<T>& rule, const Entry& entry, const In& in, T* m, T* v, T* largest, T* w_new) {
  const Gradient<pull, T, In> gradient(rule, in, rule.clip, rule.coupled_decay);
  const T step_size = static_cast<T>(entry.step_size);
  const T inverse_root = static_cast<T>(1 / entry.root_bias_correction2);
  const T beta2 = rule.beta2, fresh1 = rule.one_minus_beta1, fresh2 = rule.one_minus_beta2, eps = rule.eps;
  const T decay_factor = rule.decay_factor, alpha_lambda = rule.alpha_lambda;
  stream(in.n, {in.w, in.grad, omegas_of(in), anchors_of(in), m, v, largest}, [&](int64_t i) FASTEWC_INLINE_LAMBDA {
    const T g = gradient(i);
    const T first = interpolate(m[i], g, fresh1);
    const T second = beta2 * v[i] + fresh2 * g * g;
    T used = second;
    if constexpr (amsgrad) {
      used = largest[i] < second || second != second ? second : largest[i]; // NaN wins, as in torch.maximum
      largest[i] = used;
    }
    const T updated = in.w[i] * decay_factor - step_size * first / (std::sqrt(used) * inverse_root + eps);
    w_new[i] = held<holds>(in, alpha_lambda, updated, i);
    m[i] = first;
    v[i] = second;
  });
}

template <Pull pull, typename T>
FASTEWC_INLINE void path_loop(const Rule<T>& rule, const Block<T>& in, const T* w_new, T* path) {
  const Gradient<pull, T> gradient(rule, in, T(1), T(0));
  stream(in.n, {path}, [&](int64_t i) FASTEWC_INLINE_LAMBDA { path[i] -= gradient(i) * (w_new[i] - in.w[i]); });
}

// ω ← ω − g(w⁺ − w), with g before clipping and decay.
template <typename T>
FASTEWC_INLINE void path_block(const Rule<T>& rule, Pull pull, const Block<T>& in, const T* w_new, T* path) {
  switch (pull) {
    case Pull::none:
      return path_loop<Pull::none>(rule, in, w_new, path);
    case Pull::plain:
      return path_loop<Pull::plain>(rule, in, w_new, path);
    case Pull::stabilized:
      return path_loop<Pull::stabilized>(rule, in, w_new, path);
  }
}

} // namespace fastewc
