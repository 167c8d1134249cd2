// Surrogates of a ratio: the loss of one token and its gradient, before weights of rows and the normalizer.
// clip: Schulman et al., 2017; dual clip: Ye et al., 2020; delta: INTELLECT-2, 2025. cispo: MiniMax-M1, 2025.
// sapo: Gao et al., 2025. dppo_tv, dppo_kl: Qi et al., 2026.
#pragma once

#include "kl.h"

namespace ppo {

enum class Surrogate : int64_t { kClip = 0, kCispo = 1, kSapo = 2, kDppoTv = 3, kDppoKl = 4, kCount };

PPO_INLINE constexpr bool is_dppo(Surrogate s) { return s == Surrogate::kDppoTv || s == Surrogate::kDppoKl; }

template <class T>
struct SurrogateOptions {
  T low, high;         // clip, cispo: bounds of the ratio; dppo: the divergence that either side allows
  T dual_clip, delta;  // infinite when off
  T log_ratio_clamp;
  T tau_pos, tau_neg;      // sapo's temperatures
  T scale_pos, scale_neg;  // 4 over them: a division for each token costs as much as half an exponential
};

template <class T>
PPO_INLINE SurrogateOptions<T> surrogate_options(int64_t surrogate, double cliprange_low, double cliprange_high,
                                                 double dual_clip, double delta, double log_ratio_clamp, double tau_pos,
                                                 double tau_neg) {
  const bool of_ratio = !is_dppo(static_cast<Surrogate>(surrogate));
  return {static_cast<T>(of_ratio ? 1.0 - cliprange_low : cliprange_low),
          static_cast<T>(of_ratio ? 1.0 + cliprange_high : cliprange_high),
          static_cast<T>(dual_clip),
          static_cast<T>(delta),
          static_cast<T>(log_ratio_clamp),
          static_cast<T>(tau_pos),
          static_cast<T>(tau_neg),
          T(4) / static_cast<T>(tau_pos),
          T(4) / static_cast<T>(tau_neg)};
}

// `raw` is the log-ratio before its clamp, `excess` the ratio less 1.
template <class T>
struct Ratio {
  T raw, value, excess;
};

template <class T>
struct SurrogateTerm {
  T loss, grad;                               // without and with the weight; grad = d loss / d logp
  T clipped_high, clipped_low, dual_clipped;  // 1 or 0
};

// Ties as autograd has them: max and min give each side half, clamp passes the gradient at its bounds.
template <class T>
PPO_INLINE SurrogateTerm<T> clip_term(const Ratio<T>& r, T adv, T weight, const SurrogateOptions<T>& o) {
  const T low_bound = o.low, high_bound = o.high, delta = o.delta;  // loads that depend on nothing: vectors need that
  const T ratio = r.value, bounded = ratio > delta ? delta : ratio;
  const T clipped = ratio < low_bound ? low_bound : (ratio > high_bound ? high_bound : ratio);
  const T plain_loss = -adv * bounded, clipped_loss = -adv * clipped;
  const T from_plain = plain_loss > clipped_loss ? T(1) : (plain_loss == clipped_loss ? T(0.5) : T(0));
  const T inside = ratio < low_bound ? T(0) : (ratio > high_bound ? T(0) : T(1));
  T loss = clipped_loss > plain_loss ? clipped_loss : plain_loss;  // a NaN among the first must show
  T share = (ratio > delta ? T(0) : from_plain) + (T(1) - from_plain) * inside;

  // Only compared where adv < 0, so that an infinite dual_clip makes no NaN of adv = 0.
  const T ceiling = adv < T(0) ? -o.dual_clip * adv : std::numeric_limits<T>::infinity();
  const T dual = loss > ceiling ? T(1) : T(0);
  share = loss < ceiling ? share : (loss > ceiling ? T(0) : T(0.5) * share);
  loss = loss > ceiling ? ceiling : loss;

  const T slope = -adv * ratio * (share == T(0) ? T(0) : share * weight);  // no weight, be it NaN, of what is clipped
  const T high = ratio > high_bound ? T(1) : T(0), low = ratio < low_bound ? T(1) : T(0);
  const T by_delta = adv < T(0) ? (ratio > delta ? high : T(0)) : T(0);
  return {loss, clamp_gradient(r.raw, o.log_ratio_clamp, slope), adv > T(0) ? high : T(0), adv < T(0) ? low : T(0),
          dual > T(0) ? T(1) : by_delta};
}

// The clipped ratio is a constant that weighs logp; it is clipped whatever the sign of the advantage.
template <class T>
PPO_INLINE SurrogateTerm<T> cispo_term(const Ratio<T>& r, T logp, T adv, T weight, const SurrogateOptions<T>& o) {
  const T low_bound = o.low, high_bound = o.high;
  const T high = r.value > high_bound ? T(1) : T(0), low = r.value < low_bound ? T(1) : T(0);
  const T slope = -adv * (r.value < low_bound ? low_bound : (r.value > high_bound ? high_bound : r.value));
  return {slope * logp, slope * weight, high, low, T(0)};
}

// A sigmoid of the ratio takes the place of its clip: sigmoid(tau (ratio - 1)) 4 / tau, of slope 1 at 1.
template <class T>
PPO_INLINE SurrogateTerm<T> sapo_term(const Ratio<T>& r, T adv, T weight, const SurrogateOptions<T>& o) {
  const T tau = adv > T(0) ? o.tau_pos : o.tau_neg;
  const T x = tau * r.excess;
  const T e = exp_fast(x < T(0) ? x : -x), s = T(1) / (T(1) + e);
  const T gate = (x < T(0) ? e * s : s) * (adv > T(0) ? o.scale_pos : o.scale_neg);
  const T slope = -adv * (T(4) * e * s * s * r.value) * weight;
  return {-adv * gate, clamp_gradient(r.raw, o.log_ratio_clamp, slope), T(0), T(0), T(0)};
}

// The token's divergence from the policy that sampled it, of the two outcomes "this token" and "any other".
template <Surrogate kSurrogate, class T>
PPO_INLINE T binary_divergence(T logp, T old, T prob, T old_prob) {
  if constexpr (kSurrogate == Surrogate::kDppoTv) {
    return prob > old_prob ? prob - old_prob : old_prob - prob;
  } else {
    constexpr T kEps = T(1e-8);  // as the trainers have it
    return old_prob * (old - logp) + (T(1) - old_prob) * log_fast((T(1) - old_prob + kEps) / (T(1) - prob + kEps));
  }
}

// A token that has moved too far in the direction of its advantage has no loss. A ratio that delta bounds is a
// constant, like cispo's, as a bounded one has no gradient of its own.
template <Surrogate kSurrogate, class T>
PPO_INLINE SurrogateTerm<T> dppo_term(const Ratio<T>& r, T logp, T old, T adv, T weight, const SurrogateOptions<T>& o) {
  const T prob = exp_fast(logp), old_prob = exp_fast(old);
  const T moved = binary_divergence<kSurrogate>(logp, old, prob, old_prob);
  const T high = prob > old_prob ? (moved > o.high ? T(1) : T(0)) : T(0);
  const T low = prob < old_prob ? (moved > o.low ? T(1) : T(0)) : T(0);
  const T clipped_high = adv > T(0) ? high : T(0), clipped_low = adv > T(0) ? T(0) : low;
  const bool kept = clipped_high + clipped_low == T(0), is_constant = o.delta < std::numeric_limits<T>::infinity();
  const T slope = -adv * (r.value > o.delta ? o.delta : r.value);
  const T grad = slope * weight;
  return {kept ? (is_constant ? slope * logp : slope) : T(0),
          kept ? (is_constant ? grad : clamp_gradient(r.raw, o.log_ratio_clamp, grad)) : T(0), clipped_high,
          adv < T(0) ? clipped_low : T(0), kept && r.value > o.delta ? T(1) : T(0)};
}

template <Surrogate kSurrogate, class T>
PPO_INLINE SurrogateTerm<T> surrogate_term(const Ratio<T>& r, T logp, T old, T adv, T weight,
                                           const SurrogateOptions<T>& o) {
  if constexpr (kSurrogate == Surrogate::kClip) return clip_term(r, adv, weight, o);
  if constexpr (kSurrogate == Surrogate::kCispo) return cispo_term(r, logp, adv, weight, o);
  if constexpr (kSurrogate == Surrogate::kSapo) return sapo_term(r, adv, weight, o);
  if constexpr (is_dppo(kSurrogate)) return dppo_term<kSurrogate>(r, logp, old, adv, weight, o);
}

// Calls f with the surrogate as a compile-time constant.
template <class F>
auto dispatch_surrogate(int64_t surrogate, F&& f) {
  switch (static_cast<Surrogate>(surrogate)) {
    case Surrogate::kClip:
      return f(std::integral_constant<Surrogate, Surrogate::kClip>{});
    case Surrogate::kCispo:
      return f(std::integral_constant<Surrogate, Surrogate::kCispo>{});
    case Surrogate::kSapo:
      return f(std::integral_constant<Surrogate, Surrogate::kSapo>{});
    case Surrogate::kDppoTv:
      return f(std::integral_constant<Surrogate, Surrogate::kDppoTv>{});
    default:
      return f(std::integral_constant<Surrogate, Surrogate::kDppoKl>{});
  }
}

}  // namespace ppo
