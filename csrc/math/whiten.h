// Whitening: deviations from the mean over the standard deviation.
#pragma once

#include <cmath>

#include "moments.h"

namespace ppo {

// What deviations are multiplied by; 0 where there is no spread to divide by.
PPO_INLINE double whiten_scale(const Moments& m, bool unbiased, double eps) {
  const double spread = m.variance(unbiased) + eps;
  return spread == 0.0 ? 0.0 : 1.0 / std::sqrt(spread);
}

}  // namespace ppo
