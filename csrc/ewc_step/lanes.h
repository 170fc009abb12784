// The step of N neighbouring weights that one thread holds in registers; fastewc/ops/ewc_step/reference.py in CUDA C++.
//
// Flags are the same for all threads, so a branch costs an instruction and every loop below is unrolled.
#pragma once

#include "arguments.h"
#include "rule.h"

namespace fastewc {

// What all tensors share. T is the arithmetic's type; sums and products of scalars are formed in double before.
template <typename T>
struct Rule {
  Variant variant;
  bool nesterov, first, decoupled, clip_penalty, regularized_path;
  T lr, lambda, alpha_lambda, limit;
  T decay; // AdamW: 1 − αη; else η
  T beta2, one_minus_beta1, one_minus_beta2, eps;
  T momentum, one_minus_dampening;

  // The order of fastewc/ops/ewc_step/schema.py: SCALARS.
  __host__ __device__ void set(const double* scalars) {
    const double alpha = scalars[0], eta = scalars[2];
    lr = static_cast<T>(alpha);
    lambda = static_cast<T>(scalars[1]);
    alpha_lambda = static_cast<T>(alpha * scalars[1]);
    limit = stiffness_limit<T>(alpha);
    decay = static_cast<T>(decoupled ? 1 - alpha * eta : eta);
    one_minus_beta1 = static_cast<T>(1 - scalars[3]);
    beta2 = static_cast<T>(scalars[4]);
    one_minus_beta2 = static_cast<T>(1 - scalars[4]);
    eps = static_cast<T>(scalars[5]);
    momentum = static_cast<T>(scalars[6]);
    one_minus_dampening = static_cast<T>(1 - scalars[7]);
  }
};

// What is read on the device: ± 1/grad_scale, κ, α/(1 − β₁ᵗ) and 1/√(1 − β₂ᵗ).
template <typename T>
struct Live {
  T task_factor, clip, step_size, inverse_root;
};

template <typename T, int N>
__device__ __forceinline__ void scale(const T (&x)[N], T factor, T (&out)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    out[k] = factor * x[k];
  }
}

template <typename T, int N>
__device__ __forceinline__ void add(const T (&x)[N], T factor, T (&sum)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    sum[k] += factor * x[k];
  }
}

// c(w − w*), E1 or E2.
template <typename T, int N>
__device__ __forceinline__ void pull_of(
    const Rule<T>& rule, const T (&w)[N], const T (&omega)[N], const T (&anchor)[N], T (&pull)[N]) {
  if (rule.variant == Variant::plain) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      pull[k] = rule.lambda * omega[k] * (w[k] - anchor[k]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      pull[k] = stabilized_stiffness(omega[k], rule.lambda, rule.lr, rule.limit) * (w[k] - anchor[k]);
    }
  }
}

// g = κ·task + pull, or κ·(task + pull).
template <typename T, int N>
__device__ __forceinline__ void add_pull(
    const Rule<T>& rule, T clip, const T (&task)[N], const T (&pull)[N], T (&g)[N]) {
  const T before = rule.clip_penalty ? T(1) : clip, after = rule.clip_penalty ? clip : T(1);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    g[k] = (task[k] * before + pull[k]) * after;
  }
}

// w′ of SGD without momentum.
template <typename T, int N>
__device__ __forceinline__ void sgd_update(const Rule<T>& rule, const T (&w)[N], const T (&g)[N], T (&w_new)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    w_new[k] = w[k] - rule.lr * g[k];
  }
}

// w′ of SGD with the momentum buffer b.
template <typename T, int N>
__device__ __forceinline__ void heavy_ball_update(
    const Rule<T>& rule, const T (&w)[N], const T (&g)[N], T (&b)[N], T (&w_new)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    b[k] = rule.first ? g[k] : rule.momentum * b[k] + rule.one_minus_dampening * g[k];
    w_new[k] = w[k] - rule.lr * (rule.nesterov ? g[k] + rule.momentum * b[k] : b[k]);
  }
}

// m and v, in place.
template <typename T, int N>
__device__ __forceinline__ void update_moments(const Rule<T>& rule, const T (&g)[N], T (&m)[N], T (&v)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    m[k] = interpolate(m[k], g[k], rule.one_minus_beta1);
    v[k] = rule.beta2 * v[k] + rule.one_minus_beta2 * g[k] * g[k];
  }
}

// v ← max(largest, v); NaN wins, as in torch.maximum.
template <typename T, int N>
__device__ __forceinline__ void keep_largest(const T (&largest)[N], T (&v)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    v[k] = v[k] < largest[k] || largest[k] != largest[k] ? largest[k] : v[k];
  }
}

// w′ of Adam and AdamW.
template <typename T, int N>
__device__ __forceinline__ void adam_update(
    const Rule<T>& rule, const Live<T>& live, const T (&w)[N], const T (&m)[N], const T (&v)[N], T (&w_new)[N]) {
  const T decay = rule.decoupled ? rule.decay : T(1);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    w_new[k] = w[k] * decay - live.step_size * m[k] / (std::sqrt(v[k]) * live.inverse_root + rule.eps);
  }
}

// w⁺ from w′: E3 moves towards w*, E4 back towards w.
template <typename T, int N>
__device__ __forceinline__ void hold_back(
    const Rule<T>& rule, const T (&w)[N], const T (&omega)[N], const T (&anchor)[N], T (&w_new)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const T target = rule.variant == Variant::proximal ? anchor[k] : w[k];
    w_new[k] = held_back(w_new[k], target, omega[k], rule.alpha_lambda);
  }
}

// E7: ω ← ω − g(w⁺ − w).
template <typename T, int N>
__device__ __forceinline__ void add_to_path(const T (&g)[N], const T (&w)[N], const T (&w_new)[N], T (&path)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    path[k] -= g[k] * (w_new[k] - w[k]);
  }
}

} // namespace fastewc
