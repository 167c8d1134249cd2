#include "cuda/launch.cuh"
#include "cuda/policy_loss.cuh"
#include "policy_loss.h"

namespace ppo {
namespace {

using PolicyKernel = void (*)(PolicyInputs, LossOutputs);
using RowsKernel = void (*)(PolicyInputs, float*, float*);

template <bool kFlat, bool kWeighted, Surrogate kSurrogate>
PolicyKernel loss_kernel(bool has_ref, bool unbiased_kl) {
  if (!has_ref) return policy_loss_kernel<kFlat, kWeighted, kNoPenalty, kSurrogate>;
  if constexpr (kFlat && !kWeighted) {
    if (!unbiased_kl) return policy_loss_kernel<true, false, kKlPenalty, kSurrogate>;
  }
  return policy_loss_kernel<kFlat, kWeighted, kAnyPenalty, kSurrogate>;
}

template <Surrogate kSurrogate>
PolicyKernel loss_kernel(bool flat, bool weighted, bool has_ref, bool unbiased_kl) {
  if (!flat) return loss_kernel<false, true, kSurrogate>(has_ref, unbiased_kl);
  return weighted ? loss_kernel<true, true, kSurrogate>(has_ref, unbiased_kl)
                  : loss_kernel<true, false, kSurrogate>(has_ref, unbiased_kl);
}

LossResult policy_loss(const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages,
                       const OptTensor& mask, const OptTensor& weights, const OptTensor& ref_logprobs,
                       const OptTensor& row_weight, const OptTensor& normalizer, const OptTensor& cu_seqlens,
                       const OptTensor& kl_coef_tensor, double cliprange_low, double cliprange_high, double dual_clip,
                       double log_ratio_clamp, double kl_coef, int64_t kl_estimator, double kl_log_clamp,
                       double kl_clamp, bool unbiased_kl, int64_t surrogate, int64_t level, double delta,
                       double tau_pos, double tau_neg, bool grad) {
  PPO_COUNT("policy_loss");
  check_policy_codes(kl_estimator, surrogate, level, unbiased_kl);
  const Launcher launch(logprobs);
  const TokenRows rows = token_rows(logprobs, cu_seqlens);
  const auto input = [&](const char* name, const OptTensor& x, bool may_be_per_row = false) {
    return token_input<float>(name, x, logprobs, rows, may_be_per_row);
  };
  const RowVector<float> row_weights("row_weight", row_weight, {rows.count});
  const RowVector<double> coef("kl_coef_tensor", kl_coef_tensor, {});
  const auto options = surrogate_options<float>(surrogate, cliprange_low, cliprange_high, dual_clip, delta,
                                                log_ratio_clamp, tau_pos, tau_neg);
  PolicyInputs in{rows,
                  input("logprobs", logprobs),
                  input("old_logprobs", old_logprobs),
                  input("advantages", advantages, true),
                  input("weights", weights, true),
                  input("ref_logprobs", ref_logprobs),
                  per_row(row_weights.data()),
                  {},
                  {},
                  token_input<uint8_t>("mask", mask, logprobs, rows),
                  level_options<float>(surrogate, level, cliprange_low, cliprange_high, options),
                  coef.data(),
                  kl_estimator,
                  static_cast<float>(kl_coef),
                  static_cast<float>(kl_log_clamp),
                  static_cast<float>(kl_clamp),
                  unbiased_kl,
                  false};
  const bool by_row = static_cast<RatioLevel>(level) != RatioLevel::kToken;
  const Tensor ratios = empty({by_row ? 2 * rows.count : 0}, ScalarType::Float, logprobs);
  if (by_row) {
    float* log_ratios = data_of<float>(ratios);
    float* slopes = log_ratios + rows.count;
    RowsKernel kernel = policy_rows_kernel<Surrogate::kClip>;
    if (static_cast<Surrogate>(surrogate) == Surrogate::kCispo) kernel = policy_rows_kernel<Surrogate::kCispo>;
    if (static_cast<Surrogate>(surrogate) == Surrogate::kSapo) kernel = policy_rows_kernel<Surrogate::kSapo>;
    launch(kernel, rows.count, kLossThreads, in, log_ratios, slopes);
    in.row_log_ratio = per_row<float>(log_ratios), in.row_slope = per_row<float>(slopes);
  }
  const auto of_all = [&](const auto& f) {
    return f(in.logprobs, in.old_logprobs, in.advantages, in.weights, in.ref_logprobs, in.row_weight, in.row_log_ratio,
             in.row_slope, in.mask);
  };
  in.needs_row = of_all([](const auto&... all) { return any_needs_row(all...); });
  const bool flat = of_all([&](const auto&... all) { return flat_and_aligned(rows, all...); });
  const bool weighted = weights.has_value();
  const int64_t blocks = loss_blocks(logprobs.numel());
  const LossTensors out(logprobs, blocks, PolicyPartials::kCount, PolicyStat::kCount, normalizer, grad);
  const PolicyKernel kernel = dispatch_surrogate(
      surrogate, [&](auto kind) { return loss_kernel<kind()>(flat, weighted, ref_logprobs.has_value(), unbiased_kl); });
  return weighted ? out.run<PolicyLoss<true>>(launch, kernel, blocks, in)
                  : out.run<PolicyLoss<false>>(launch, kernel, blocks, in);
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CUDA, m) { PPO_IMPL(m, "policy_loss", ppo::policy_loss); }
