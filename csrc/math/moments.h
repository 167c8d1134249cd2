// Count, mean and sum of squared deviations, mergeable (Chan, Golub and LeVeque, 1979).
#pragma once

#include "macros.h"

namespace ppo {

struct Moments {
  double count = 0.0, mean = 0.0, m2 = 0.0;

  PPO_INLINE void merge(const Moments& other) {
    if (other.count == 0.0) return;
    const double total = count + other.count, step = other.mean - mean;
    m2 += other.m2 + step * step * count * (other.count / total);
    mean += step * (other.count / total);
    count = total;
  }

  PPO_INLINE double variance(bool unbiased) const { return count > 1.0 ? m2 / (unbiased ? count - 1.0 : count) : 0.0; }
};

PPO_INLINE double mean_of(double sum, double count) { return count > 0.0 ? sum / count : 0.0; }

}  // namespace ppo
