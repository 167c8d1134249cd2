// Per-token estimators of KL(pi || ref) and their gradients (Schulman, "Approximating KL Divergence", 2020).
#pragma once

#include "exp.h"

namespace ppo {

enum KlEstimator : int64_t { kK1 = 0, kAbs = 1, kK2 = 2, kK3 = 3 };

template <class T>
PPO_INLINE T clamp(T x, T bound) {  // NaN stays NaN, an infinite bound does nothing
  return x < -bound ? -bound : (x > bound ? bound : x);
}

template <class T>
struct KlTerm {
  T value;
  T grad;  // d value / d logp, 0 beyond a clamp
};

// x = ref - logp, bounded to +-log_clamp; the estimate is bounded to +-value_clamp. torch.clamp passes the gradient at
// its bounds, and so does this.
template <class T>
PPO_INLINE KlTerm<T> kl_term(T logp, T ref, int64_t estimator, T log_clamp, T value_clamp) {
  const T raw = ref - logp;
  const T x = clamp(raw, log_clamp);
  const T e = exp_fast(x);
  const T k3 = expm1_minus(x, e);
  const T sign = x > T(0) ? T(1) : (x < T(0) ? T(-1) : T(0));
  T k = estimator == kK1 ? -x : (estimator == kAbs ? x * sign : (estimator == kK2 ? T(0.5) * x * x : k3));
  T slope = estimator == kK1 ? T(1) : (estimator == kAbs ? -sign : (estimator == kK2 ? -x : -(k3 + x)));
  const bool inside = raw >= -log_clamp && raw <= log_clamp && k >= -value_clamp && k <= value_clamp;
  return {clamp(k, value_clamp), inside ? slope : T(0)};
}

}  // namespace ppo
