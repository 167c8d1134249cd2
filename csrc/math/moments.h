// Count, mean and sum of squared deviations, mergeable (Chan, Golub and LeVeque, 1979).
#pragma once

#include "macros.h"

namespace ppo {

struct Moments {
  double count = 0.0, mean = 0.0, m2 = 0.0;

  PPO_INLINE void merge(const Moments& other) {
    if (other.count == 0.0) return;
    const double total = count + other.count, share = other.count / total, step = other.mean - mean;
    m2 += other.m2 + step * step * count * share;
    // From an infinite mean a step back to a finite one would be NaN.
    mean = step - step == 0.0 ? mean + step * share : mean * (1.0 - share) + other.mean * share;
    count = total;
  }

  PPO_INLINE double variance(bool unbiased) const { return count > 1.0 ? m2 / (unbiased ? count - 1.0 : count) : 0.0; }
};

// The effective sample size of weights over their number, of which `inverse` is the inverse.
PPO_INLINE double effective_share(double sum, double squares, double inverse) {
  return squares == 0.0 ? 0.0 : sum * sum / squares * inverse;
}

PPO_INLINE double mean_of(double sum, double count) { return count > 0.0 ? sum / count : 0.0; }

}  // namespace ppo
