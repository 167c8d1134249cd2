// The clipped squared error of one token and its gradient.
#pragma once

#include <limits>

#include "loss.h"
#include "moments.h"

namespace ppo {

template <class T>
struct ValueTerm {
  T loss, grad;  // grad = d loss / d value
  T clipped;     // 1 where the clipped term is the larger, else 0
};

// With an infinite clip the two terms are equal and the result is the plain squared error. Ties and NaN as autograd has
// them: max gives each side half, or all of it if one is NaN, and clamp nothing beyond its bounds. Every choice is a
// select between two values at hand: gcc turns no nested one into vectors.
template <class T>
PPO_INLINE ValueTerm<T> value_term(T value, T old, T target, T clip) {
  const bool off = clip == std::numeric_limits<T>::infinity();
  const T low = off ? -clip : old - clip, high = off ? clip : old + clip;
  const T below_high = value > high ? high : value, within = value < low ? low : below_high;
  const T bounded = low == low ? within : low;  // a NaN among the old values must show
  const T error = value - target, bounded_error = bounded - target;
  const T plain = error * error, clipped = bounded_error * bounded_error;
  const T tie = plain == clipped ? T(0.5) : T(0), less = plain < clipped ? T(1) : T(0),
          more = plain > clipped ? T(1) : T(0);
  const T slope = (T(1) - more - tie) * bounded_error, not_below = value >= low ? slope : T(0);
  const T from_bounded = value <= high ? not_below : T(0);
  return {T(0.5) * max_or_nan(plain, clipped), (T(1) - less - tie) * error + from_bounded, less};
}

// ValueStats, in its order.
struct ValueStat {
  enum { kClipfrac, kErrorMean, kExplainedVariance, kTokenCount, kCount };
};

// `clipped` counts clipped tokens; `error` are the moments of value - return, `target` those of the returns.
template <class T>
PPO_INLINE void value_stats(double clipped, const Moments& error, const Moments& target, T* stats) {
  const double n = error.count;
  stats[ValueStat::kClipfrac] = static_cast<T>(mean_of(clipped, n));
  stats[ValueStat::kErrorMean] = static_cast<T>(error.mean);
  stats[ValueStat::kExplainedVariance] = static_cast<T>(n > 0.0 && target.m2 > 0.0 ? 1.0 - error.m2 / target.m2 : 0.0);
  stats[ValueStat::kTokenCount] = static_cast<T>(n);
}

}  // namespace ppo
