// How every loss ends: the total is divided by the normalizer.
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

// The larger of two numbers, NaN if one of them is.
template <class T>
PPO_INLINE T max_or_nan(T a, T b) {
  const T larger = b <= a ? a : b;
  return a == a ? larger : a;
}

}  // namespace ppo
