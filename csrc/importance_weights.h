// What both launchers of importance_weights make of their arguments.
#pragma once

#include "checks.h"
#include "math/importance_weights.h"

namespace ppo {

using ImportanceResult = std::tuple<Tensor, Tensor, Tensor>;

template <class T>
ImportanceOptions<T> importance_options(int64_t level, int64_t mode, int64_t reject, int64_t reject_level, double low,
                                        double high, double reject_low, double reject_high, double log_ratio_clamp) {
  check_code("level", level, static_cast<int64_t>(WeightLevel::kCount));
  check_code("mode", mode, static_cast<int64_t>(WeightMode::kCount));
  check_code("reject", reject, static_cast<int64_t>(RejectBy::kCount));
  check_code("reject_level", reject_level, static_cast<int64_t>(RejectLevel::kCount));
  return {static_cast<WeightLevel>(level),
          static_cast<WeightMode>(mode),
          static_cast<RejectBy>(reject),
          static_cast<RejectLevel>(reject_level),
          static_cast<T>(low),
          static_cast<T>(high),
          static_cast<T>(reject_low),
          static_cast<T>(reject_high),
          static_cast<T>(log_ratio_clamp)};
}

}  // namespace ppo
