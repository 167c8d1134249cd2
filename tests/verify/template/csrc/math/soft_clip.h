// Soft clipping: near 0 the value itself, far from it the cap.
#pragma once

#include "macros.h"

namespace ppo {

template <class T>
PPO_INLINE T soft_clip(T x, T cap) {
  return x / (T(1) + (x < T(0) ? -x : x) / cap);
}

}  // namespace ppo
