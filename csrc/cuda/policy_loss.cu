#include "cuda/launch.cuh"
#include "cuda/policy_loss.cuh"

namespace ppo {
namespace {

LossResult policy_loss(const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages,
                       const OptTensor& mask, const OptTensor& weights, const OptTensor& ref_logprobs,
                       const OptTensor& row_weight, const OptTensor& normalizer, const OptTensor& cu_seqlens,
                       const OptTensor& kl_coef_tensor, double cliprange_low, double cliprange_high, double dual_clip,
                       double log_ratio_clamp, double kl_coef, int64_t kl_estimator, double kl_log_clamp,
                       double kl_clamp, bool grad) {
  PPO_COUNT("policy_loss");
  check_code("kl_estimator", kl_estimator, kEstimators);
  const Launcher launch(logprobs);
  const TokenRows rows = token_rows(logprobs, cu_seqlens);
  const auto input = [&](const char* name, const OptTensor& x, bool may_be_per_row = false) {
    return token_input<float>(name, x, logprobs, rows, may_be_per_row);
  };
  const RowVector<float> row_weights("row_weight", row_weight, {rows.count});
  const RowVector<double> coef("kl_coef_tensor", kl_coef_tensor, {});
  PolicyInputs in{rows,
                  input("logprobs", logprobs),
                  input("old_logprobs", old_logprobs),
                  input("advantages", advantages, true),
                  input("weights", weights, true),
                  input("ref_logprobs", ref_logprobs),
                  per_row(row_weights.data()),
                  token_input<uint8_t>("mask", mask, logprobs, rows),
                  {static_cast<float>(1.0 - cliprange_low), static_cast<float>(1.0 + cliprange_high),
                   static_cast<float>(dual_clip), static_cast<float>(log_ratio_clamp)},
                  coef.data(),
                  kl_estimator,
                  static_cast<float>(kl_coef),
                  static_cast<float>(kl_log_clamp),
                  static_cast<float>(kl_clamp),
                  false};
  const auto of_all = [&](const auto& f) {
    return f(in.logprobs, in.old_logprobs, in.advantages, in.weights, in.ref_logprobs, in.row_weight, in.mask);
  };
  in.needs_row = of_all([](const auto&... all) { return any_needs_row(all...); });
  const bool flat = of_all([&](const auto&... all) { return flat_and_aligned(rows, all...); });
  const int64_t blocks = loss_blocks(logprobs.numel());
  const LossTensors out(logprobs, blocks, PolicyLoss::Partials::kCount, PolicyStat::kCount, normalizer, grad);
  auto* with_ref = flat ? policy_loss_kernel<true, true> : policy_loss_kernel<false, true>;
  auto* without = flat ? policy_loss_kernel<true, false> : policy_loss_kernel<false, false>;
  return out.run<PolicyLoss>(launch, ref_logprobs.has_value() ? with_ref : without, blocks, in);
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CUDA, m) { PPO_IMPL(m, "policy_loss", ppo::policy_loss); }
