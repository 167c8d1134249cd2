// Pairs of responses to one prompt (P3O, arXiv 2310.00212): what a response adds to the loss, its statistics and its
// gradient, over all pairs with the other responses of its group.
//
// In float64: a group is few numbers, and an error of a sum over a whole sequence is one of its ratio's exponent.
#pragma once

#include "kl.h"
#include "loss.h"

namespace ppo {

enum P3OVariant : int64_t { kSeparate = 0, kJoint = 1 };

struct PairOptions {
  bool joint;
  double kl_coef;
  double low, high;  // of a ratio: 1 -+ cliprange (separate); of a difference in nats: -+ cliprange (joint)
  double log_weight_bound, log_ratio_clamp;
};

inline PairOptions pair_options(int64_t variant, double kl_coef, double cliprange, double weight_clip,
                                double log_ratio_clamp) {
  const double middle = variant == kJoint ? 0.0 : 1.0;
  return {variant == kJoint, kl_coef, middle - cliprange, middle + cliprange, std::log(weight_clip), log_ratio_clamp};
}

// What is known of a row before it meets the others.
struct Response {
  bool has_tokens;                         // valid ones
  double score, ref_log_ratio, log_ratio;  // sums over valid tokens: logp - ref (S), logp - old (D)
  double ratio;                            // of the clamped log-ratio
  double weight;                           // of the log-ratio, bounded
};

PPO_INLINE Response response(bool has_tokens, double score, double ref_log_ratio, double log_ratio,
                             const PairOptions& o) {
  return {has_tokens,
          has_tokens ? score : 0.0,
          ref_log_ratio,
          log_ratio,
          exp_fast(clamp(log_ratio, o.log_ratio_clamp)),
          exp_fast(clamp(log_ratio, o.log_weight_bound))};
}

// What is summed over rows and over ordered pairs. The two halves of a pair add up to its loss, and each has the whole
// of its own row's gradient.
enum P3OSum {
  kPairLoss,
  kPairs,
  kPairWeight,
  kPairWeightClipped,
  kPairClipped,
  kPairGap,
  kPairMargin,
  kPairAgrees,
  kRows,
  kRowLogRatio,
  kRowK3,
  kRowRefLogRatio,
  kRowRatio,
  kRowClamped,
  kP3OSums
};

// Adds the half of a pair that is row `a`'s and returns its gradient d loss / d S_a. Ties as autograd has them.
PPO_INLINE double pair_half(const Response& a, const Response& b, const PairOptions& o, double* sums) {
  const double reward = a.score - b.score, gap = a.ref_log_ratio - b.ref_log_ratio;
  const double q = reward - o.kl_coef * gap;
  const double log_weight = o.joint ? a.log_ratio + b.log_ratio : b.log_ratio;
  const double weight = o.joint ? exp_fast(clamp(log_weight, o.log_weight_bound)) : b.weight;
  const double slope = -q * weight;
  // Joint: d - d_old takes the place of d, so that no d_old, however large, can round away what decides.
  const double x = o.joint ? a.log_ratio - b.log_ratio : a.ratio;
  const double within = x < o.low ? o.low : (x > o.high ? o.high : x);
  const double plain = slope * x, clipped = slope * within;
  const double from_plain = plain > clipped ? 1.0 : (plain == clipped ? 0.5 : 0.0);
  const double inside = x >= o.low && x <= o.high ? 1.0 : 0.0;
  const double larger = plain > clipped ? plain : clipped;
  const double change = slope * (from_plain + (1.0 - from_plain) * inside);
  const double preferred = reward > 0.0 ? gap : (reward < 0.0 ? -gap : reward * gap);  // 0 or NaN
  sums[kPairLoss] += o.joint ? 0.25 * (larger + slope * (gap - x)) : 0.5 * larger;
  sums[kPairs] += 1.0;
  sums[kPairWeight] += weight;
  sums[kPairWeightClipped] += log_weight < -o.log_weight_bound || log_weight > o.log_weight_bound ? 1.0 : 0.0;
  sums[kPairClipped] += clipped > plain ? 1.0 : 0.0;
  sums[kPairGap] += q < 0.0 ? -q : q;
  sums[kPairMargin] += preferred;
  sums[kPairAgrees] += preferred > 0.0 ? 1.0 : 0.0;
  return 0.5 * (o.joint ? change : clamp_gradient(a.log_ratio, o.log_ratio_clamp, change * a.ratio));
}

// Adds all that row i of a group of `size` adds, and returns d loss / d S_i.
PPO_INLINE double response_terms(const Response* group, int64_t size, int64_t i, const PairOptions& o, double* sums) {
  const Response& a = group[i];
  if (!a.has_tokens) return 0.0;
  const double d = clamp(a.log_ratio, o.log_ratio_clamp);
  sums[kRows] += 1.0;
  sums[kRowLogRatio] += d;
  sums[kRowK3] += expm1_minus(d, a.ratio);
  sums[kRowRefLogRatio] += a.ref_log_ratio;
  sums[kRowRatio] += a.ratio;
  sums[kRowClamped] += a.log_ratio < -o.log_ratio_clamp || a.log_ratio > o.log_ratio_clamp ? 1.0 : 0.0;
  double gradient = 0.0;
  for (int64_t j = 0; j < size; ++j) {
    if (j != i && group[j].has_tokens) gradient += pair_half(a, group[j], o, sums);
  }
  return gradient;
}

// P3OStats, in its order: means over rows, then over pairs.
enum P3OStat {
  kApproxKlK1,
  kApproxKlK3,
  kRefKl,
  kRatioMean,
  kRatioMax,
  kClampFrac,
  kWeightMean,
  kWeightClipfrac,
  kClipfrac,
  kRewardGap,
  kMargin,
  kAccuracy,
  kPairCount,
  kP3OStats
};

template <class T>
PPO_INLINE void p3o_stats(const double* sums, double ratio_max, T* stats) {
  const double per_row = sums[kRows] > 0.0 ? 1.0 / sums[kRows] : 0.0;
  const double per_pair = sums[kPairs] > 0.0 ? 1.0 / sums[kPairs] : 0.0;
  double all[kP3OStats];
  all[kApproxKlK1] = -sums[kRowLogRatio] * per_row;
  all[kApproxKlK3] = sums[kRowK3] * per_row;
  all[kRefKl] = sums[kRowRefLogRatio] * per_row;
  all[kRatioMean] = sums[kRowRatio] * per_row;
  all[kRatioMax] = ratio_max;
  all[kClampFrac] = sums[kRowClamped] * per_row;
  all[kWeightMean] = sums[kPairWeight] * per_pair;
  all[kWeightClipfrac] = sums[kPairWeightClipped] * per_pair;
  all[kClipfrac] = sums[kPairClipped] * per_pair;
  all[kRewardGap] = sums[kPairGap] * per_pair;
  all[kMargin] = sums[kPairMargin] * per_pair;
  all[kAccuracy] = sums[kPairAgrees] * per_pair;
  all[kPairCount] = 0.5 * sums[kPairs];
  for (int i = 0; i < kP3OStats; ++i) stats[i] = static_cast<T>(all[i]);
}

}  // namespace ppo
