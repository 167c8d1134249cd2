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

}  // namespace ppo
