// Pairs of responses to one prompt (P3O, arXiv 2310.00212): what a response adds to the loss, its statistics and its
// gradient, over all pairs with the other responses of its group.
//
// In float64: a group is few numbers, and an error of a sum over a whole sequence is one of its ratio's exponent.
#pragma once

#include "kl.h"

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
  bool alive;                   // has a valid token
  double score, margin, shift;  // sums over valid tokens: logp - ref (S), logp - old (D)
  double ratio;                 // of the clamped shift
  double weight;                // of the shift, bounded
};

PPO_INLINE Response response(bool alive, double score, double margin, double shift, const PairOptions& o) {
  return {alive,
          alive ? score : 0.0,
          margin,
          shift,
          exp_fast(clamp(shift, o.log_ratio_clamp)),
          exp_fast(clamp(shift, o.log_weight_bound))};
}

// What is summed over rows and over ordered pairs. The two halves of a pair add up to its loss, and each has the whole
// of its own row's gradient.
enum PairSum {
  kPairLoss,
  kPairs,
  kPairWeight,
  kPairWeightClipped,
  kPairClipped,
  kPairGap,
  kPairMargin,
  kPairAgrees,
  kRows,
  kRowShift,
  kRowK3,
  kRowMargin,
  kRowRatio,
  kRowClamped,
  kPairSums
};
constexpr int kP3OStats = 13;

// Adds the half of a pair that is row `a`'s and returns its gradient d loss / d S_a. Ties as autograd has them.
PPO_INLINE double pair_half(const Response& a, const Response& b, const PairOptions& o, double* sums) {
  const double reward = a.score - b.score, gap = a.margin - b.margin;
  const double q = reward - o.kl_coef * gap;
  const double log_weight = o.joint ? a.shift + b.shift : b.shift;
  const double weight = o.joint ? exp_fast(clamp(log_weight, o.log_weight_bound)) : b.weight;
  const double slope = -q * weight;
  // Joint: d - d_old takes the place of d, so that no d_old, however large, can round away what decides.
  const double x = o.joint ? a.shift - b.shift : a.ratio;
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
  return 0.5 * (o.joint ? change : clamp_gradient(a.shift, o.log_ratio_clamp, change * a.ratio));
}

// Adds all that row i of a group of `size` adds, and returns d loss / d S_i.
PPO_INLINE double response_terms(const Response* group, int64_t size, int64_t i, const PairOptions& o, double* sums) {
  const Response& a = group[i];
  if (!a.alive) return 0.0;
  const double d = clamp(a.shift, o.log_ratio_clamp);
  sums[kRows] += 1.0;
  sums[kRowShift] += d;
  sums[kRowK3] += expm1_minus(d, a.ratio);
  sums[kRowMargin] += a.margin;
  sums[kRowRatio] += a.ratio;
  sums[kRowClamped] += a.shift < -o.log_ratio_clamp || a.shift > o.log_ratio_clamp ? 1.0 : 0.0;
  double gradient = 0.0;
  for (int64_t j = 0; j < size; ++j) {
    if (j != i && group[j].alive) gradient += pair_half(a, group[j], o, sums);
  }
  return gradient;
}

// The larger of two ratios, NaN if one is.
PPO_INLINE double larger_ratio(double a, double b) { return a != a ? a : (b != b || b > a ? b : a); }

// P3OStats, in its order.
template <class T>
PPO_INLINE void p3o_stats(const double* sums, double ratio_max, T* stats) {
  const double per_row = sums[kRows] > 0.0 ? 1.0 / sums[kRows] : 0.0;
  const double per_pair = sums[kPairs] > 0.0 ? 1.0 / sums[kPairs] : 0.0;
  const double all[kP3OStats] = {-sums[kRowShift] * per_row,
                                 sums[kRowK3] * per_row,
                                 sums[kRowMargin] * per_row,
                                 sums[kRowRatio] * per_row,
                                 ratio_max,
                                 sums[kRowClamped] * per_row,
                                 sums[kPairWeight] * per_pair,
                                 sums[kPairWeightClipped] * per_pair,
                                 sums[kPairClipped] * per_pair,
                                 sums[kPairGap] * per_pair,
                                 sums[kPairMargin] * per_pair,
                                 sums[kPairAgrees] * per_pair,
                                 0.5 * sums[kPairs]};
  for (int i = 0; i < kP3OStats; ++i) stats[i] = static_cast<T>(all[i]);
}

}  // namespace ppo
