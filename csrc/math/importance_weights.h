// How much more likely a token, or its row, is under the policy that learns than under the one that sampled it,
// bounded; and which tokens a rejection keeps. TIS, MIS: Yao et al., 2025; IcePop: Ling team, 2025.
#pragma once

#include "kl.h"
#include "loss.h"
#include "moments.h"

namespace ppo {

enum class WeightLevel : int64_t { kToken = 0, kSequence = 1, kGeometric = 2, kCount };
enum class WeightMode : int64_t { kTruncate = 0, kMask = 1, kIcepop = 2, kCount };
enum class RejectBy : int64_t { kNothing = 0, kK1 = 1, kK2 = 2, kK3 = 3, kCount };
enum class RejectLevel : int64_t { kToken = 0, kSum = 1, kMean = 2, kMax = 3, kCount };

template <class T>
struct ImportanceOptions {
  WeightLevel level;
  WeightMode mode;
  RejectBy reject;
  RejectLevel reject_level;
  T low, high;                // of the ratio
  T reject_low, reject_high;  // of the estimate of the divergence
  T log_ratio_clamp;

  PPO_INLINE bool by_row() const { return level != WeightLevel::kToken || reject_level != RejectLevel::kToken; }
};

// Of a row: the sums of its valid tokens, and what becomes of them. Its estimate's maximum is at least 0, what no token
// falls below where one is taken.
struct ImportanceRowSum {
  enum { kTokens, kLogRatio, kEstimate, kCount };
};

template <class T>
struct RowImportance {
  T ratio, estimate;
};

template <class T>
PPO_INLINE T rejection_estimate(RejectBy by, T d, T k3) {
  const T squared = T(0.5) * d * d;
  return by == RejectBy::kK1 ? -d : (by == RejectBy::kK2 ? squared : (by == RejectBy::kK3 ? k3 : T(0)));
}

template <class T>
PPO_INLINE RowImportance<T> row_importance(const double* sums, double max, const ImportanceOptions<T>& o) {
  const double tokens = sums[ImportanceRowSum::kTokens], n = tokens > 0.0 ? tokens : 1.0;
  const double log_ratio = sums[ImportanceRowSum::kLogRatio], estimate = sums[ImportanceRowSum::kEstimate];
  const T raw = static_cast<T>(o.level == WeightLevel::kGeometric ? log_ratio / n : log_ratio);
  const double of_row =
      o.reject_level == RejectLevel::kMax ? max : (o.reject_level == RejectLevel::kMean ? estimate / n : estimate);
  return {exp_fast(clamp(raw, o.log_ratio_clamp)), static_cast<T>(of_row)};
}

// How far the two policies are apart on a token.
template <class T>
struct DivergenceTerm {
  T log_ratio, ratio, k3, chi2;
};

template <class T>
PPO_INLINE DivergenceTerm<T> divergence_term(T logp, T rollout, T log_ratio_clamp) {
  const T d = clamp(logp - rollout, log_ratio_clamp);
  const T ratio = exp_fast(d), k3 = expm1_minus(d, ratio);
  const T excess = d > T(-0.5) && d < T(0.5) ? k3 + d : ratio - T(1);
  return {d, ratio, k3, excess * (excess + T(2))};
}

template <class T>
struct WeightTerm {
  T weight, keep;  // keep: 1 or 0, as are high and low
  T high, low;
};

// The weight of a token by the ratio and the estimate of its level. A NaN is in no bounds.
template <class T>
PPO_INLINE WeightTerm<T> weight_term(T ratio, T estimate, const ImportanceOptions<T>& o) {
  const T low_bound = o.low, high_bound = o.high, least = o.reject_low, most = o.reject_high;
  const bool rejects = o.reject != RejectBy::kNothing, masks = o.mode == WeightMode::kMask;
  const bool truncates = o.mode == WeightMode::kTruncate;
  const T high = ratio > high_bound ? T(1) : T(0), low = ratio < low_bound ? T(1) : T(0);
  const T bounded = ratio > high_bound ? high_bound : (ratio < low_bound ? low_bound : ratio);
  const T inside = ratio >= low_bound ? (ratio <= high_bound ? T(1) : T(0)) : T(0);
  const T within = estimate >= least ? (estimate <= most ? T(1) : T(0)) : T(0);
  const T accepted = rejects ? within : T(1);
  const T keep = masks ? accepted * inside : accepted;
  const T ratio_inside = inside != T(0) ? ratio : T(0);
  const T weight = truncates ? bounded : ratio_inside;
  return {keep != T(0) ? weight : T(0), keep, high, low};
}

// What is summed over valid tokens; the last ones are counts.
struct ImportanceSum {
  enum { kLogRatio, kK3, kChi2, kLogp, kRollout, kWeight, kSquaredWeight, kHigh, kLow, kRejected, kTokens, kCount };
};

// ImportanceStats, in its order.
struct ImportanceStat {
  enum {
    kEss,
    kKlK1,
    kKlK3,
    kChi2,
    kPerplexity,
    kRolloutPerplexity,
    kWeightMean,
    kRatioMax,
    kClipfracHigh,
    kClipfracLow,
    kRejectfrac,
    kTokenCount,
    kCount
  };
};

template <class T>
PPO_INLINE void importance_stats(const double* sums, double ratio_max, T* stats) {
  const double count = sums[ImportanceSum::kTokens], inverse = count > 0.0 ? 1.0 / count : 0.0;
  const double weight = sums[ImportanceSum::kWeight];
  double all[ImportanceStat::kCount] = {};
  if (count > 0.0) {
    all[ImportanceStat::kEss] = effective_share(weight, sums[ImportanceSum::kSquaredWeight], inverse);
    all[ImportanceStat::kKlK1] = -sums[ImportanceSum::kLogRatio] * inverse;
    all[ImportanceStat::kKlK3] = sums[ImportanceSum::kK3] * inverse;
    all[ImportanceStat::kChi2] = sums[ImportanceSum::kChi2] * inverse;
    all[ImportanceStat::kPerplexity] = ::exp(-sums[ImportanceSum::kLogp] * inverse);
    all[ImportanceStat::kRolloutPerplexity] = ::exp(-sums[ImportanceSum::kRollout] * inverse);
    all[ImportanceStat::kWeightMean] = weight * inverse;
    all[ImportanceStat::kRatioMax] = ratio_max;
    all[ImportanceStat::kClipfracHigh] = sums[ImportanceSum::kHigh] * inverse;
    all[ImportanceStat::kClipfracLow] = sums[ImportanceSum::kLow] * inverse;
    all[ImportanceStat::kRejectfrac] = sums[ImportanceSum::kRejected] * inverse;
    all[ImportanceStat::kTokenCount] = count;
  }
  for (int i = 0; i < ImportanceStat::kCount; ++i) stats[i] = static_cast<T>(all[i]);
}

}  // namespace ppo
