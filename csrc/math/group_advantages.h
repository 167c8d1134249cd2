// Advantages over the other responses to a prompt: what a deviation from the group's mean is multiplied by.
#pragma once

#include <cmath>
#include <cstdint>

#include "macros.h"

namespace ppo {

enum GroupBaseline : int64_t { kRloo = 0, kGrpo = 1, kDrGrpo = 2 };

// m2: sum of the squared deviations of the group's `count` scores from their mean.
PPO_INLINE double group_scale(int64_t mode, double count, double m2, double eps) {
  if (mode == kRloo) return count > 1.0 ? count / (count - 1.0) : 1.0;
  if (mode != kGrpo) return 1.0;
  const double spread = (count > 1.0 ? std::sqrt(m2 / (count - 1.0)) : 0.0) + eps;
  return spread == 0.0 ? 0.0 : 1.0 / spread;
}

}  // namespace ppo
