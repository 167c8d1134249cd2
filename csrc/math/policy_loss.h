// The clipped surrogate of one token and its gradient (Schulman et al., 2017; dual clip: Ye et al., 2020).
#pragma once

#include "kl.h"

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
  T d, ratio_minus_1, k3;
  T high, low, dual, clamped;  // 1 or 0
};

// Ties as autograd has them: max and min give each side half, clamp passes the gradient at its bounds.
template <class T>
PPO_INLINE PolicyTerm<T> policy_term(T logp, T old, T adv, T weight, const PolicyOptions<T>& o) {
  const T raw = logp - old;
  const T d = clamp(raw, o.log_ratio_clamp);
  const T ratio = exp_fast(d);
  const T clipped = ratio < o.low ? o.low : (ratio > o.high ? o.high : ratio);
  const T plain_loss = -adv * ratio, clipped_loss = -adv * clipped;
  const T from_plain = plain_loss > clipped_loss ? T(1) : (plain_loss == clipped_loss ? T(0.5) : T(0));
  const T inside = ratio < o.low ? T(0) : (ratio > o.high ? T(0) : T(1));
  T loss = plain_loss > clipped_loss ? plain_loss : clipped_loss;
  T share = from_plain + (T(1) - from_plain) * inside;

  // Only compared where adv < 0, so that an infinite dual_clip makes no NaN of adv = 0.
  const T ceiling = adv < T(0) ? -o.dual_clip * adv : std::numeric_limits<T>::infinity();
  const T dual = loss > ceiling ? T(1) : T(0);
  share = loss < ceiling ? share : (loss > ceiling ? T(0) : T(0.5) * share);
  loss = loss > ceiling ? ceiling : loss;

  const T slope = -adv * ratio * share * weight;
  const T beyond = raw < -o.log_ratio_clamp ? T(1) : (raw > o.log_ratio_clamp ? T(1) : T(0));
  const T k3 = expm1_minus(d, ratio);
  const T high = ratio > o.high ? T(1) : T(0), low = ratio < o.low ? T(1) : T(0);
  return {loss * weight,
          clamp_gradient(raw, o.log_ratio_clamp, slope),
          d,
          d > T(-0.5) && d < T(0.5) ? k3 + d : ratio - T(1),
          k3,
          adv > T(0) ? high : T(0),
          adv < T(0) ? low : T(0),
          dual,
          beyond};
}

}  // namespace ppo
