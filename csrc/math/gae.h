// The recurrence of generalised advantage estimation, as one rule for every way to treat masked tokens inside a row.
#pragma once

#include <cstdint>

#include "macros.h"

namespace ppo {

struct MaskedSteps {
  enum : int64_t { kSkip = 0, kZero = 1, kKeep = 2, kCount };
};

// What a token at or before the last valid one is: a transition or not, and whether its inputs are read.
struct TokenRule {
  bool transition;
  bool read;
};

PPO_INLINE TokenRule token_rule(bool valid, int64_t masked_steps) {
  return {valid || masked_steps != MaskedSteps::kSkip, valid || masked_steps == MaskedSteps::kKeep};
}

// A_t = r_t + gamma V+ - V_t + gamma lam A+ over one number, S_t = V_t + lam A_t, so that a token is an affine map of
// the S+ that lies ahead of it and tokens can be scanned in any grouping:
//   A_t = r_t - V_t + gamma S+,   S_t = lam r_t + (1 - lam) V_t + gamma lam S+.
// S+ after the last token is the bootstrap value.
template <class T>
struct GaeStep {
  T gamma, lam;

  PPO_INLINE T advantage(T reward, T value, T ahead) const { return (reward - value) + gamma * ahead; }
  // By way of A, as it is written above: (1 - lam) V would lose the NaN that an infinite V makes of A before it.
  PPO_INLINE T next(T reward, T value, T ahead) const { return value + lam * advantage(reward, value, ahead); }
};

struct AffineMap {
  double scale, shift;

  PPO_INLINE static AffineMap identity() { return {1.0, 0.0}; }
  PPO_INLINE double operator()(double x) const { return shift + scale * x; }
  // x -> this(later(x))
  PPO_INLINE AffineMap after(const AffineMap& later) const { return {scale * later.scale, (*this)(later.shift)}; }
};

}  // namespace ppo
