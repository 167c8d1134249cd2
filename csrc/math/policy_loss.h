// The policy loss of one token and its gradient: a surrogate of the ratio of the token or of its row. GSPO and
// GSPO-token: Zheng et al., 2025; GMPO: Zhao et al., 2025.
#pragma once

#include "loss.h"
#include "moments.h"
#include "surrogate.h"

namespace ppo {

// Whose ratio: the token's; the row's, exp of the mean log-ratio of its valid tokens, with the gradient through that
// mean (GSPO) or, as a constant, through the token alone (GSPO-token); or the row's after a clip of each token (GMPO).
enum class RatioLevel : int64_t { kToken = 0, kSequence = 1, kSequenceToken = 2, kGeometric = 3, kCount };

template <class T>
struct PolicyTerm {
  T loss, grad;  // grad = d loss / d logp
  T log_ratio, ratio_minus_1, k3;
  T clipped_high, clipped_low, dual_clipped, clamped;  // 1 or 0
};

// The term of a token by a log-ratio that is its own, logp - old, or its row's.
template <Surrogate kSurrogate, class T>
PPO_INLINE PolicyTerm<T> policy_term(T logp, T old, T raw, T adv, T weight, const SurrogateOptions<T>& o) {
  const T log_ratio = clamp(raw, o.log_ratio_clamp);
  const T ratio = exp_fast(log_ratio);
  const T k3 = expm1_minus(log_ratio, ratio);
  const T excess = log_ratio > T(-0.5) && log_ratio < T(0.5) ? k3 + log_ratio : ratio - T(1);
  const SurrogateTerm<T> term = surrogate_term<kSurrogate>({raw, ratio, excess}, logp, old, adv, weight, o);
  const T beyond = raw < -o.log_ratio_clamp ? T(1) : (raw > o.log_ratio_clamp ? T(1) : T(0));
  return {term.loss * weight, term.grad,        log_ratio,         excess, k3,
          term.clipped_high,  term.clipped_low, term.dual_clipped, beyond};
}

// What is summed over a row's valid tokens where the ratio is the row's: their number, log-ratios, and weighted
// advantages by sign, as every surrogate is |adv| times that of adv = 1 or -1.
struct RowSum {
  enum { kTokens, kLogRatio, kPositive, kNegative, kCount };
};

// A row's log-ratio; d loss / d logp of each of its tokens where the gradient passes through the row's mean.
template <class T>
struct RowRatio {
  T raw, slope;
};

// GMPO clips a token's log-ratio on the side of its advantage, and only there.
template <class T>
struct GeometricClip {
  T low, high;  // of the log-ratio

  PPO_INLINE T beyond_high(T raw, T adv) const { return adv > T(0) ? (raw > high ? T(1) : T(0)) : T(0); }
  PPO_INLINE T beyond_low(T raw, T adv) const { return adv > T(0) ? T(0) : (raw < -low ? T(1) : T(0)); }
  PPO_INLINE T clip(T raw, T adv) const {
    return beyond_high(raw, adv) != T(0) ? high : (beyond_low(raw, adv) != T(0) ? -low : raw);
  }
};

// Options of a level other than the token's: the clip of tokens, and the surrogate of the row's ratio, which is not
// clipped again after GMPO's.
template <class T>
struct LevelOptions {
  RatioLevel level;
  SurrogateOptions<T> row;
  GeometricClip<T> tokens;
};

template <class T>
PPO_INLINE LevelOptions<T> level_options(int64_t surrogate, int64_t level, double cliprange_low, double cliprange_high,
                                         const SurrogateOptions<T>& o) {
  constexpr T kOff = std::numeric_limits<T>::infinity();
  LevelOptions<T> all{static_cast<RatioLevel>(level), o, {}};
  // A constant ratio has no gradient that could pass through the mean.
  if (static_cast<Surrogate>(surrogate) == Surrogate::kCispo && all.level == RatioLevel::kSequence)
    all.level = RatioLevel::kSequenceToken;
  if (all.level == RatioLevel::kGeometric) {
    all.row.low = -kOff, all.row.high = kOff;
    all.tokens = {static_cast<T>(cliprange_low), static_cast<T>(cliprange_high)};
  }
  return all;
}

template <Surrogate kSurrogate, class T>
PPO_INLINE RowRatio<T> row_ratio(const double* sums, const LevelOptions<T>& o) {
  const double tokens = sums[RowSum::kTokens], inverse = tokens > 0.0 ? 1.0 / tokens : 0.0;
  const T raw = static_cast<T>(sums[RowSum::kLogRatio] * inverse);
  const T up = policy_term<kSurrogate>(T(0), T(0), raw, T(1), T(1), o.row).grad;
  const T down = policy_term<kSurrogate>(T(0), T(0), raw, T(-1), T(1), o.row).grad;
  return {raw, static_cast<T>((up * sums[RowSum::kPositive] + down * sums[RowSum::kNegative]) * inverse)};
}

// A token's part of RowSum.
template <class T>
struct RowTerm {
  T log_ratio, positive, negative;
};

template <class T>
PPO_INLINE RowTerm<T> row_term(T logp, T old, T adv, T weight, const LevelOptions<T>& o) {
  const T raw = logp - old, weighted = adv * weight;
  return {o.level == RatioLevel::kGeometric ? o.tokens.clip(raw, adv) : raw, adv < T(0) ? T(0) : weighted,
          adv < T(0) ? -weighted : T(0)};
}

// The term by a row's ratio becomes that of one of its tokens: the gradient is the row's where it passes through the
// mean, and the estimates of the KL divergence are the token's own.
template <bool kGeometric, class T>
PPO_INLINE PolicyTerm<T> term_in_row(PolicyTerm<T> term, T logp, T old, T adv, T slope, const LevelOptions<T>& o) {
  const T own = logp - old;
  term.log_ratio = clamp(own, o.row.log_ratio_clamp);
  term.k3 = expm1_minus(term.log_ratio, exp_fast(term.log_ratio));
  if constexpr (kGeometric) {
    const T low = o.tokens.beyond_low(own, adv);
    term.clipped_high = o.tokens.beyond_high(own, adv), term.clipped_low = adv < T(0) ? low : T(0);
    term.grad = term.clipped_high + low == T(0) ? slope : T(0);
  } else {
    term.grad = o.level == RatioLevel::kSequence ? slope : term.grad;
  }
  return term;
}

// What is summed over valid tokens.
struct PolicySum {
  enum {
    kLoss,
    kLogRatio,
    kSquaredLogRatio,
    kK3,
    kRefKl,
    kWeight,
    kSquaredWeight,
    kClippedHigh,
    kClippedLow,
    kDualClipped,
    kClamped,
    kCount
  };
};

// PolicyStats, in its order.
struct PolicyStat {
  enum {
    kApproxKlK1,
    kApproxKlK2,
    kApproxKlK3,
    kRatioMean,
    kRatioVar,
    kRatioMax,
    kClipfracHigh,
    kClipfracLow,
    kDualClipfrac,
    kRefKl,
    kClampFrac,
    kEss,
    kEntropy,  // which the caller adds: it is linear, and no kernel looks at it
    kTokenCount,
    kCount
  };
};

// `excess` are the moments of ratio - 1 over the valid tokens. Without weights all are 1. A GPU divides float64 by a
// long routine, and so it takes the means by the inverse of the count.
template <bool kByInverse, class T>
PPO_INLINE void policy_stats(const double* sums, const Moments& excess, double ratio_max, bool has_weights, T* stats) {
  const double count = excess.count, inverse = 1.0 / count;
  const auto mean = [&](double sum) { return kByInverse ? sum * inverse : sum / count; };
  double all[PolicyStat::kCount] = {};
  if (count > 0.0) {
    all[PolicyStat::kApproxKlK1] = mean(-sums[PolicySum::kLogRatio]);
    all[PolicyStat::kApproxKlK2] = mean(0.5 * sums[PolicySum::kSquaredLogRatio]);
    all[PolicyStat::kApproxKlK3] = mean(sums[PolicySum::kK3]);
    all[PolicyStat::kRatioMean] = 1.0 + excess.mean;
    all[PolicyStat::kRatioVar] = mean(excess.m2);
    all[PolicyStat::kRatioMax] = ratio_max;
    all[PolicyStat::kClipfracHigh] = mean(sums[PolicySum::kClippedHigh]);
    all[PolicyStat::kClipfracLow] = mean(sums[PolicySum::kClippedLow]);
    all[PolicyStat::kDualClipfrac] = mean(sums[PolicySum::kDualClipped]);
    all[PolicyStat::kRefKl] = mean(sums[PolicySum::kRefKl]);
    all[PolicyStat::kClampFrac] = mean(sums[PolicySum::kClamped]);
    all[PolicyStat::kEss] = 1.0;
    if (has_weights)
      all[PolicyStat::kEss] = effective_share(sums[PolicySum::kWeight], sums[PolicySum::kSquaredWeight], inverse);
    all[PolicyStat::kTokenCount] = count;
  }
  for (int i = 0; i < PolicyStat::kCount; ++i) stats[i] = static_cast<T>(all[i]);
}

}  // namespace ppo
