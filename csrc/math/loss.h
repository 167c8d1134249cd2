// How every loss ends: sums become means, and the total is divided by the normalizer.
#pragma once

#include "macros.h"

namespace ppo {

// What a loss was divided by, inverted, is the factor of its gradient. Both are 0 where the normalizer is.
struct NormalizedLoss {
  double loss, inv_normalizer;
};

PPO_INLINE NormalizedLoss normalize_loss(double total, double normalizer) {
  if (normalizer == 0.0) return {0.0, 0.0};
  const double inverse = 1.0 / normalizer;
  return {total * inverse, inverse};
}

// Turns sums into means over `count` terms. A GPU multiplies, since it divides float64 by a long routine.
class MeanOver {
 public:
#ifdef __CUDA_ARCH__
  PPO_INLINE explicit MeanOver(double count) : factor_(count > 0.0 ? 1.0 / count : 0.0) {}
  PPO_INLINE double operator()(double sum) const { return sum * factor_; }

 private:
  double factor_;
#else
  PPO_INLINE explicit MeanOver(double count) : count_(count) {}
  PPO_INLINE double operator()(double sum) const { return count_ > 0.0 ? sum / count_ : 0.0; }

 private:
  double count_;
#endif
};

// The larger of two numbers, NaN if one of them is.
template <class T>
PPO_INLINE T max_or_nan(T a, T b) {
  return !(b <= a) && a == a ? b : a;
}

}  // namespace ppo
