// The arithmetic of one weight, shared by the kernels of ewc_step and ewc_penalty on every device.
//
// Letters as in fastewc/ops/ewc_step/reference.py: w weight, a anchor w*, Ω importance, α learning rate, λ ewc_lambda.
#pragma once

#include "../importance_codes.h"

#include <cmath>
#include <cstdint>
#include <limits>

namespace fastewc {

FASTEWC_HD double reciprocal(double x) {
  return 1 / x;
}

// 1/x for 1 ≤ x ≤ 2¹²⁵ to about an ulp. On a CPU the divider is what the step waits for, and Adam needs it twice already:
// three Newton steps r ← r(2 − xr) from an estimate that flips the exponent run beside it.
FASTEWC_HD float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  return 1 / x;
#else
  float r = float_of(0x7ef127eau - bits_of(x)); // within 12 %
  r = r * (2.0f - x * r);
  r = r * (2.0f - x * r);
  return r * (2.0f - x * r);
#endif
}

// λΩ is cut off here, so that 1 + αλΩ stays in the range of `reciprocal`: beyond, c is 1/α to the last bit anyway.
template <typename T>
FASTEWC_HD T stiffness_limit(double lr) {
  return static_cast<T>(0x1p124 / (lr > 1 ? lr : 1.0));
}

// E2: c = λΩ / (1 + αλΩ).
template <typename T>
FASTEWC_HD T stabilized_stiffness(T omega, T lambda, T alpha, T limit) {
  T s = lambda * omega;
  s = s > limit ? limit : s; // NaN stays
  return s * reciprocal(T(1) + alpha * s);
}

// E3, E4: w′ moved towards the target by s/(1 + s) of the way, s = αλΩ; exactly w′ at Ω = 0.
template <typename T>
FASTEWC_HD T held_back(T w_new, T target, T omega, T alpha_lambda) {
  T s = alpha_lambda * omega;
  s = s > T(0x1p124) ? T(0x1p124) : s; // NaN stays
  const T rest = reciprocal(T(1) + s);
  const T from_target = target + (w_new - target) * rest;
  return s < T(1) ? w_new + (target - w_new) * (s * rest) : from_target;
}

// from + k(to − from), exact at both ends.
template <typename T>
FASTEWC_HD T interpolate(T from, T to, T k) {
  const T way = to - from;
  return k < T(0.5) ? from + k * way : to - way * (T(1) - k);
}

} // namespace fastewc
