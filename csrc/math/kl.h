// Per-token estimators of KL(pi || ref) and their gradients (Schulman, "Approximating KL Divergence", 2020).
#pragma once

#include <type_traits>

#include "exp.h"

namespace ppo {

enum class KlEstimator : int64_t { kK1 = 0, kAbs = 1, kK2 = 2, kK3 = 3, kCount };

template <class T>
PPO_INLINE T clamp(T x, T bound) {  // NaN stays NaN, an infinite bound does nothing
  return x < -bound ? -bound : (x > bound ? bound : x);
}

// The gradient that torch.clamp lets through: at its bounds too, for a NaN only when it is off.
template <class T>
PPO_INLINE T clamp_gradient(T x, T bound, T gradient) {
  const T within = x >= -bound ? (x <= bound ? gradient : T(0)) : T(0);
  return bound == std::numeric_limits<T>::infinity() ? gradient : within;
}

// A coefficient of 0 switches its term off, be that infinite or NaN.
template <class T>
PPO_INLINE T scaled_or_off(T coef, T term) {
  return coef == T(0) ? T(0) : coef * term;
}

template <class T>
struct KlTerm {
  T value;
  T grad;  // d value / d logp, 0 beyond a clamp
};

// x = ref - logp, bounded to +-log_clamp; the estimate is bounded to +-value_clamp.
template <KlEstimator kEstimator, class T>
PPO_INLINE KlTerm<T> kl_term(T logp, T ref, T log_clamp, T value_clamp) {
  const T raw = ref - logp;
  const T x = clamp(raw, log_clamp);
  T k, slope;
  if constexpr (kEstimator == KlEstimator::kK1) {
    k = -x, slope = T(1);
  } else if constexpr (kEstimator == KlEstimator::kAbs) {
    k = x < T(0) ? -x : x, slope = x > T(0) ? T(-1) : (x < T(0) ? T(1) : T(0));
  } else if constexpr (kEstimator == KlEstimator::kK2) {
    k = T(0.5) * x * x, slope = -x;
  } else {
    const T exp_x = exp_fast(x);
    k = expm1_minus(x, exp_x), slope = x > T(-0.5) && x < T(0.5) ? -(k + x) : T(1) - exp_x;  // 1 at -inf
  }
  return {clamp(k, value_clamp), clamp_gradient(raw, log_clamp, clamp_gradient(k, value_clamp, slope))};
}

// An estimate times the ratio of the policy to the one that sampled, with the gradient of both: over that one's tokens
// the gradient of k3 times the ratio is, in expectation, that of the divergence. `slope` is d ratio / d logp.
template <class T>
PPO_INLINE KlTerm<T> times_ratio(const KlTerm<T>& kl, T ratio, T slope) {
  return {kl.value * ratio, kl.grad * ratio + kl.value * slope};
}

// Calls f with the estimator as a compile-time constant.
template <class F>
PPO_INLINE auto dispatch_estimator(int64_t estimator, F&& f) {
  switch (static_cast<KlEstimator>(estimator)) {
    case KlEstimator::kK1:
      return f(std::integral_constant<KlEstimator, KlEstimator::kK1>{});
    case KlEstimator::kAbs:
      return f(std::integral_constant<KlEstimator, KlEstimator::kAbs>{});
    case KlEstimator::kK2:
      return f(std::integral_constant<KlEstimator, KlEstimator::kK2>{});
    default:
      return f(std::integral_constant<KlEstimator, KlEstimator::kK3>{});
  }
}

}  // namespace ppo
