// Advantages over the other responses to a prompt: deviations from the group's mean, and what they are multiplied by.
// A score that is not finite is no member of its group and has the advantage 0.
#pragma once

#include <cmath>
#include <cstdint>

#include "macros.h"

namespace ppo {

struct GroupBaseline {
  enum : int64_t { kRloo = 0, kGrpo = 1, kDrGrpo = 2, kMaxRl = 3, kRlooScaled = 4, kCount };
};

// What is written at the place where a group begins: whether two of its scores differ.
struct GroupHead {
  enum : uint8_t { kNone = 0, kEqual = 1, kVaried = 2 };
};

PPO_INLINE bool is_score(double score) { return score - score == 0.0; }

// How many scores a group has, and between which bounds. Here as below, only members are given.
struct GroupRange {
  double count = 0.0, low = INFINITY, high = -INFINITY;

  PPO_INLINE void add(double score) {
    count += 1.0;
    low = score < low ? score : low;
    high = score > high ? score : high;
  }
  PPO_INLINE uint8_t head() const { return low < high ? GroupHead::kVaried : GroupHead::kEqual; }
};

// Scores are taken as differences to one of them: equal scores, whatever their size, deviate by exactly 0.
struct GroupMean {
  double origin;
  double mean = 0.0;  // of the differences

  PPO_INLINE double difference(double score) const { return score - origin; }
  PPO_INLINE double deviation(double score) const { return score - origin - mean; }
};

// The mean of nothing is 0, and so is what does not deviate, whatever it is multiplied by.
PPO_INLINE double mean_or_0(double sum, double count) { return count > 0.0 ? sum / count : 0.0; }
PPO_INLINE double product_or_0(double deviation, double scale) { return deviation == 0.0 ? 0.0 : deviation * scale; }
PPO_INLINE double inverse_or_0(double x) { return x == 0.0 ? 0.0 : 1.0 / x; }

// K / (K - 1) turns a deviation from the mean of all into one from the mean of the others.
PPO_INLINE double over_others(double count) { return count > 1.0 ? count / (count - 1.0) : 1.0; }

// m2: sum of the squared deviations of the group's `count` scores from their mean.
PPO_INLINE double group_scale(int64_t mode, double count, const GroupMean& group, double m2, double eps) {
  if (mode == GroupBaseline::kRloo) return over_others(count);
  if (mode == GroupBaseline::kGrpo) return inverse_or_0((count > 1.0 ? std::sqrt(m2 / (count - 1.0)) : 0.0) + eps);
  if (mode == GroupBaseline::kMaxRl) return inverse_or_0(group.origin + group.mean + eps);
  return 1.0;
}

// The deviation of the others, for each score of a group: the squares of all less its own, which cancels for one score
// at most, the farthest from the mean. The others of that one are summed apart.
struct GroupOthers {
  double count, far, near;
  double far_count = 0.0, mean = 0.0, m2 = 0.0;  // of the scores that are not `far`, as differences to `near`

  PPO_INLINE GroupOthers(const GroupRange& range, const GroupMean& group) : count(range.count) {
    const bool above = group.deviation(range.high) >= -group.deviation(range.low);
    far = above ? range.high : range.low, near = above ? range.low : range.high;
  }
  PPO_INLINE bool is_far(double score) const { return score == far; }
  PPO_INLINE double difference(double score) const { return is_far(score) ? 0.0 : score - near; }
  PPO_INLINE double deviation(double score) const { return is_far(score) ? 0.0 : score - near - mean; }

  // What a deviation from the mean of all is multiplied by. Others that do not differ, as one other does not, divide
  // nothing.
  PPO_INLINE double scale(double score, double own, double m2_of_all, double eps) const {
    const bool apart = is_far(score) && far_count == 1.0;
    const double rest = count > 2.0 ? (apart ? m2 : m2_of_all - own * own * over_others(count)) : 0.0;
    return over_others(count) / (rest > 0.0 ? std::sqrt(rest / (count - 2.0)) + eps : 1.0);
  }
};

}  // namespace ppo
