// Pairs of responses to one prompt (P3O, arXiv 2310.00212): what a response adds to the loss, its statistics and its
// gradient, over all pairs with the other responses of its group.
//
// In float64: a group is few numbers, and an error of a sum over a whole sequence is one of its ratio's exponent.
#pragma once

#include "kl.h"
#include "loss.h"

namespace ppo {

struct P3OVariant {
  enum : int64_t { kSeparate = 0, kJoint = 1, kCount };
};

struct PairOptions {
  bool joint;
  double kl_coef;
  double low, high;  // of a ratio: 1 -+ cliprange (separate); of a difference in nats: -+ cliprange (joint)
  double log_weight_bound, log_ratio_clamp;
};

inline PairOptions pair_options(int64_t variant, double kl_coef, double cliprange, double weight_clip,
                                double log_ratio_clamp) {
  const double middle = variant == P3OVariant::kJoint ? 0.0 : 1.0;
  return {variant == P3OVariant::kJoint, kl_coef,        middle - cliprange, middle + cliprange,
          std::log(weight_clip),         log_ratio_clamp};
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
struct P3OSum {
  enum {
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
    kCount
  };
};

// Adds the half of a pair that is row `a`'s and returns its gradient d loss / d S_a. Ties as autograd has them.
PPO_INLINE double pair_half(const Response& a, const Response& b, const PairOptions& o, double* sums) {
  const double reward = a.score - b.score, gap = a.ref_log_ratio - b.ref_log_ratio;
  const double q = reward - scaled_or_off(o.kl_coef, gap);
  const double log_weight = o.joint ? a.log_ratio + b.log_ratio : b.log_ratio;
  const double weight = o.joint ? exp_fast(clamp(log_weight, o.log_weight_bound)) : b.weight;
  const double slope = -q * weight;
  // Joint: d - d_old takes the place of d, so that no d_old, however large, can round away what decides.
  const double x = o.joint ? a.log_ratio - b.log_ratio : a.ratio;
  const double within = x < o.low ? o.low : (x > o.high ? o.high : x);
  const double plain = slope * x, clipped = slope * within;
  const double from_plain = plain > clipped ? 1.0 : (plain == clipped ? 0.5 : 0.0);
  const double inside = x >= o.low && x <= o.high ? 1.0 : 0.0;
  const double larger = max_or_nan(plain, clipped);
  const double change = slope * (from_plain + (1.0 - from_plain) * inside);
  const double preferred = reward > 0.0 ? gap : (reward < 0.0 ? -gap : reward * gap);  // 0 or NaN
  // What joint adds has no gradient: with the reference off, one that is not finite drops out.
  const double constant = o.kl_coef == 0.0 && !(gap - gap == 0.0) ? 0.0 : gap - x;
  sums[P3OSum::kPairLoss] += o.joint ? 0.25 * (larger + slope * constant) : 0.5 * larger;
  sums[P3OSum::kPairs] += 1.0;
  sums[P3OSum::kPairWeight] += weight;
  sums[P3OSum::kPairWeightClipped] += log_weight < -o.log_weight_bound || log_weight > o.log_weight_bound ? 1.0 : 0.0;
  sums[P3OSum::kPairClipped] += clipped > plain ? 1.0 : 0.0;
  sums[P3OSum::kPairGap] += q < 0.0 ? -q : q;
  sums[P3OSum::kPairMargin] += preferred;
  sums[P3OSum::kPairAgrees] += preferred > 0.0 ? 1.0 : 0.0;
  return 0.5 * (o.joint ? change : clamp_gradient(a.log_ratio, o.log_ratio_clamp, change * a.ratio));
}

// Adds all that row i of a group of `size` adds, and returns d loss / d S_i.
PPO_INLINE double response_terms(const Response* group, int64_t size, int64_t i, const PairOptions& o, double* sums) {
  const Response& a = group[i];
  if (!a.has_tokens) return 0.0;
  const double d = clamp(a.log_ratio, o.log_ratio_clamp);
  sums[P3OSum::kRows] += 1.0;
  sums[P3OSum::kRowLogRatio] += d;
  sums[P3OSum::kRowK3] += expm1_minus(d, a.ratio);
  sums[P3OSum::kRowRefLogRatio] += a.ref_log_ratio;
  sums[P3OSum::kRowRatio] += a.ratio;
  sums[P3OSum::kRowClamped] += a.log_ratio < -o.log_ratio_clamp || a.log_ratio > o.log_ratio_clamp ? 1.0 : 0.0;
  double gradient = 0.0;
  for (int64_t j = 0; j < size; ++j) {
    if (j != i && group[j].has_tokens) gradient += pair_half(a, group[j], o, sums);
  }
  return gradient;
}

// P3OStats, in its order: means over rows, then over pairs.
struct P3OStat {
  enum {
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
    kCount
  };
};

template <class T>
PPO_INLINE void p3o_stats(const double* sums, double ratio_max, T* stats) {
  const double per_row = sums[P3OSum::kRows] > 0.0 ? 1.0 / sums[P3OSum::kRows] : 0.0;
  const double per_pair = sums[P3OSum::kPairs] > 0.0 ? 1.0 / sums[P3OSum::kPairs] : 0.0;
  double all[P3OStat::kCount];
  all[P3OStat::kApproxKlK1] = -sums[P3OSum::kRowLogRatio] * per_row;
  all[P3OStat::kApproxKlK3] = sums[P3OSum::kRowK3] * per_row;
  all[P3OStat::kRefKl] = sums[P3OSum::kRowRefLogRatio] * per_row;
  all[P3OStat::kRatioMean] = sums[P3OSum::kRowRatio] * per_row;
  all[P3OStat::kRatioMax] = ratio_max;
  all[P3OStat::kClampFrac] = sums[P3OSum::kRowClamped] * per_row;
  all[P3OStat::kWeightMean] = sums[P3OSum::kPairWeight] * per_pair;
  all[P3OStat::kWeightClipfrac] = sums[P3OSum::kPairWeightClipped] * per_pair;
  all[P3OStat::kClipfrac] = sums[P3OSum::kPairClipped] * per_pair;
  all[P3OStat::kRewardGap] = sums[P3OSum::kPairGap] * per_pair;
  all[P3OStat::kMargin] = sums[P3OSum::kPairMargin] * per_pair;
  all[P3OStat::kAccuracy] = sums[P3OSum::kPairAgrees] * per_pair;
  all[P3OStat::kPairCount] = 0.5 * sums[P3OSum::kPairs];
  for (int i = 0; i < P3OStat::kCount; ++i) stats[i] = static_cast<T>(all[i]);
}

}  // namespace ppo
