// Advantages over the other responses to a prompt: deviations from the group's mean, and what they are multiplied by.
#pragma once

#include <cmath>
#include <cstdint>

#include "macros.h"

namespace ppo {

struct GroupBaseline {
  enum : int64_t { kRloo = 0, kGrpo = 1, kDrGrpo = 2, kCount };
};

// Scores are taken as differences to the group's first one: equal scores, whatever their size, deviate by exactly 0.
struct GroupMean {
  double first;
  double mean = 0.0;  // of the differences

  PPO_INLINE double difference(double score) const { return score - first; }
  PPO_INLINE double deviation(double score) const { return score - first - mean; }
};

// m2: sum of the squared deviations of the group's `count` scores from their mean.
PPO_INLINE double group_scale(int64_t mode, double count, double m2, double eps) {
  if (mode == GroupBaseline::kRloo) return count > 1.0 ? count / (count - 1.0) : 1.0;
  if (mode != GroupBaseline::kGrpo) return 1.0;
  const double spread = (count > 1.0 ? std::sqrt(m2 / (count - 1.0)) : 0.0) + eps;
  return spread == 0.0 ? 0.0 : 1.0 / spread;
}

}  // namespace ppo
