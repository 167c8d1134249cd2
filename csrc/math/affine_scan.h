// The recurrence of generalised advantage estimation, as one rule for every way to treat interior masked tokens.
#pragma once

#include <cstdint>

#include "macros.h"

namespace ppo {

enum Interior : int64_t { kCarry = 0, kDecay = 1, kIgnore = 2 };

// What a token at or before the last valid one is: a transition or not, and whether its inputs are read.
struct TokenRule {
  bool live;
  bool read;
};

PPO_INLINE TokenRule token_rule(bool valid, int64_t interior) {
  return {valid || interior != kCarry, valid || interior == kIgnore};
}

// A_t = r_t + gamma V+ - V_t + gamma lam A+, walking back from the end of a row.
template <class T>
struct GaeCarry {
  T advantage;   // A+
  T next_value;  // V+

  PPO_INLINE T step(T reward, T value, T gamma, T gamma_lam) {
    const T delta = reward + gamma * next_value - value;
    advantage = delta + gamma_lam * advantage;
    next_value = value;
    return advantage;
  }
};

// The same recurrence over one number, S_t = V_t + lam A_t, so that a token is an affine map of the S+ that lies ahead
// of it and tokens can be scanned in parallel:
//   A_t = r_t - V_t + gamma S+,   S_t = lam r_t + (1 - lam) V_t + gamma lam S+.
// S+ after the last token is the bootstrap value.
template <class T>
struct GaeStep {
  T gamma, lam, one_less_lam, gamma_lam;

  PPO_INLINE T advantage(T reward, T value, T ahead) const { return (reward - value) + gamma * ahead; }
  PPO_INLINE T next(T reward, T value, T ahead) const {
    return (lam * reward + one_less_lam * value) + gamma_lam * ahead;
  }
};

struct AffineMap {
  double scale, shift;

  PPO_INLINE static AffineMap identity() { return {1.0, 0.0}; }
  PPO_INLINE double operator()(double x) const { return shift + scale * x; }
  // x -> this(later(x))
  PPO_INLINE AffineMap after(const AffineMap& later) const { return {scale * later.scale, (*this)(later.shift)}; }
};

}  // namespace ppo
