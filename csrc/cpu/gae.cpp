// Generalised advantage estimation on CPU tensors: one backward walk per row, with a float64 carry.
#include "checks.h"
#include "cpu/pages.h"
#include "math/affine_scan.h"

namespace ppo {
namespace {

template <class T>
struct GaeRow {
  const T* rewards;
  const T* values;
  const uint8_t* mask;  // nullptr: all valid
  int64_t length;
  double gamma, lam, bootstrap;
  int64_t interior;
};

template <class T>
void gae_row(const GaeRow<T>& in, T* advantages, T* returns) {
  int64_t t = in.length - 1;
  for (; t >= 0 && in.mask != nullptr && in.mask[t] == 0; --t) advantages[t] = returns[t] = T(0);
  GaeCarry<double> carry{0.0, in.bootstrap};
  const double gamma_lam = in.gamma * in.lam;
  for (; t >= 0; --t) {
    const bool valid = in.mask == nullptr || in.mask[t] != 0;
    const TokenRule rule = token_rule(valid, in.interior);
    double advantage = 0.0, value = 0.0;
    if (rule.live) {
      value = rule.read ? in.values[t] : 0.0;
      advantage = carry.step(rule.read ? in.rewards[t] : 0.0, value, in.gamma, gamma_lam);
    }
    advantages[t] = valid ? static_cast<T>(advantage) : T(0);
    returns[t] = valid ? static_cast<T>(advantage + value) : T(0);
  }
}

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const OptTensor& mask,
                               const OptTensor& lam_rows, const OptTensor& bootstrap_value, const OptTensor& cu_seqlens,
                               double gamma, double lam, int64_t interior) {
  PPO_COUNT("gae");
  STD_TORCH_CHECK(interior >= kCarry && interior <= kIgnore, "unknown interior ", interior);
  const Rows rows(rewards, cu_seqlens);
  return dispatch_compute(rewards, [&](auto zero) {
    using T = decltype(zero);
    const auto r = token_view<T>(rewards, rewards, rows), v = token_view<T>(values, rewards, rows);
    const auto m = token_view<uint8_t>(mask, rewards, rows);
    const Dense<double> lams(lam_rows, rows.count(), ScalarType::Double);
    const Dense<T> bootstraps(bootstrap_value, rows.count(), dtype_of<T>());
    Tensor advantages = on_huge_pages(new_tokens(rewards, rows));
    Tensor returns = on_huge_pages(new_tokens(rewards, rows));
    T* adv = static_cast<T*>(advantages.data_ptr());
    T* ret = static_cast<T*>(returns.data_ptr());
    const int64_t mean_length = rewards.numel() / std::max<int64_t>(rows.count(), 1);
    for_each(rows.count(), 4096 / std::max<int64_t>(mean_length, 1), [&](int64_t b) {
      const GaeRow<T> in{r.row(rows, b),
                         v.row(rows, b),
                         m.data ? m.row(rows, b) : nullptr,
                         rows.length(b),
                         gamma,
                         lams ? lams[b] : lam,
                         bootstraps ? static_cast<double>(bootstraps[b]) : 0.0,
                         interior};
      gae_row(in, adv + rows.start(b), ret + rows.start(b));
    });
    return std::make_tuple(advantages, returns);
  });
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CPU, m) { m.impl("gae", TORCH_BOX(&ppo::gae)); }
