// What both launchers of policy_loss refuse.
#pragma once

#include "checks.h"
#include "math/policy_loss.h"

namespace ppo {

inline void check_policy_codes(int64_t kl_estimator, int64_t surrogate, int64_t level, bool unbiased_kl) {
  check_code("kl_estimator", kl_estimator, kEstimators);
  check_code("surrogate", surrogate, static_cast<int64_t>(Surrogate::kCount));
  check_code("level", level, static_cast<int64_t>(RatioLevel::kCount));
  const auto of = static_cast<Surrogate>(surrogate);
  const auto at = static_cast<RatioLevel>(level);
  PPO_CHECK(at == RatioLevel::kToken || !is_dppo(of), "surrogate ", surrogate, " takes level 0, got ", level);
  PPO_CHECK(at != RatioLevel::kGeometric || of == Surrogate::kClip, "level 3 takes surrogate 0, got ", surrogate);
  PPO_CHECK(at == RatioLevel::kToken || !unbiased_kl, "unbiased_kl takes level 0, got ", level);
}

}  // namespace ppo
