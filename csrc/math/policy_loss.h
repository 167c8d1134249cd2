// The clipped surrogate of one token and its gradient (Schulman et al., 2017; dual clip: Ye et al., 2020).
#pragma once

#include "kl.h"
#include "loss.h"
#include "moments.h"

namespace ppo {

template <class T>
struct PolicyOptions {
  T low, high;  // bounds of the ratio: 1 - cliprange_low, 1 + cliprange_high
  T dual_clip;  // infinite when off
  T log_ratio_clamp;
};

template <class T>
struct PolicyTerm {
  T loss, grad;  // grad = d loss / d logp
  T log_ratio, ratio_minus_1, k3;
  T clipped_high, clipped_low, dual_clipped, clamped;  // 1 or 0
};

// Ties as autograd has them: max and min give each side half, clamp passes the gradient at its bounds.
template <class T>
PPO_INLINE PolicyTerm<T> policy_term(T logp, T old, T adv, T weight, const PolicyOptions<T>& o) {
  const T raw = logp - old;
  const T log_ratio = clamp(raw, o.log_ratio_clamp);
  const T ratio = exp_fast(log_ratio);
  const T clipped = ratio < o.low ? o.low : (ratio > o.high ? o.high : ratio);
  const T plain_loss = -adv * ratio, clipped_loss = -adv * clipped;
  const T from_plain = plain_loss > clipped_loss ? T(1) : (plain_loss == clipped_loss ? T(0.5) : T(0));
  const T inside = ratio < o.low ? T(0) : (ratio > o.high ? T(0) : T(1));
  T loss = clipped_loss > plain_loss ? clipped_loss : plain_loss;  // a NaN among the first must show
  T share = from_plain + (T(1) - from_plain) * inside;

  // Only compared where adv < 0, so that an infinite dual_clip makes no NaN of adv = 0.
  const T ceiling = adv < T(0) ? -o.dual_clip * adv : std::numeric_limits<T>::infinity();
  const T dual = loss > ceiling ? T(1) : T(0);
  share = loss < ceiling ? share : (loss > ceiling ? T(0) : T(0.5) * share);
  loss = loss > ceiling ? ceiling : loss;

  const T slope = -adv * ratio * (share == T(0) ? T(0) : share * weight);  // no weight, be it NaN, of what is clipped
  const T beyond = raw < -o.log_ratio_clamp ? T(1) : (raw > o.log_ratio_clamp ? T(1) : T(0));
  const T k3 = expm1_minus(log_ratio, ratio);
  const T high = ratio > o.high ? T(1) : T(0), low = ratio < o.low ? T(1) : T(0);
  return {loss * weight,
          clamp_gradient(raw, o.log_ratio_clamp, slope),
          log_ratio,
          log_ratio > T(-0.5) && log_ratio < T(0.5) ? k3 + log_ratio : ratio - T(1),
          k3,
          adv > T(0) ? high : T(0),
          adv < T(0) ? low : T(0),
          dual,
          beyond};
}

// What is summed over valid tokens.
struct PolicySum {
  enum { kLoss, kLogRatio, kSquaredLogRatio, kK3, kRefKl, kClippedHigh, kClippedLow, kDualClipped, kClamped, kCount };
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
    kTokenCount,
    kCount
  };
};

// `excess` are the moments of ratio - 1 over the valid tokens. A GPU divides float64 by a long routine, and so it takes
// the means by the inverse of the count.
template <bool kByInverse, class T>
PPO_INLINE void policy_stats(const double* sums, const Moments& excess, double ratio_max, T* stats) {
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
    all[PolicyStat::kTokenCount] = count;
  }
  for (int i = 0; i < PolicyStat::kCount; ++i) stats[i] = static_cast<T>(all[i]);
}

}  // namespace ppo
