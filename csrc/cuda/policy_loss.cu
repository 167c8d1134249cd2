#include "cuda/loss_launch.cuh"
#include "cuda/policy_loss.cuh"

namespace ppo {
namespace {

using PolicyKernel = void (*)(PolicyInputs, LossOutputs);

PolicyKernel policy_kernel(bool has_ref, int64_t estimator) {
  if (!has_ref) return policy_loss_kernel<false, kK1>;
  switch (estimator) {
    case kK1:
      return policy_loss_kernel<true, kK1>;
    case kAbs:
      return policy_loss_kernel<true, kAbs>;
    case kK2:
      return policy_loss_kernel<true, kK2>;
    default:
      return policy_loss_kernel<true, kK3>;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss(const Tensor& logprobs, const Tensor& old_logprobs,
                                                       const Tensor& advantages, const OptTensor& mask,
                                                       const OptTensor& weights, const OptTensor& ref_logprobs,
                                                       const OptTensor& row_weight, const OptTensor& normalizer,
                                                       const OptTensor& cu_seqlens, const OptTensor& kl_coef_tensor,
                                                       double cliprange_low, double cliprange_high, double dual_clip,
                                                       double log_ratio_clamp, double kl_coef, int64_t kl_estimator,
                                                       double kl_log_clamp, double kl_clamp, bool grad) {
  PPO_COUNT("policy_loss");
  STD_TORCH_CHECK(kl_estimator >= kK1 && kl_estimator <= kK3, "unknown KL estimator ", kl_estimator);
  const Launcher launch(logprobs);
  const TokenRows rows = token_rows(logprobs, cu_seqlens);
  const auto input = [&](const OptTensor& x, bool per_row = false) {
    return token_input<float>(x, logprobs, rows, per_row);
  };
  PolicyInputs in{rows,
                  input(logprobs),
                  input(old_logprobs),
                  input(advantages, true),
                  input(weights, true),
                  input(ref_logprobs),
                  row_input(row_weight, rows),
                  token_input<uint8_t>(mask, logprobs, rows),
                  {static_cast<float>(1.0 - cliprange_low), static_cast<float>(1.0 + cliprange_high),
                   static_cast<float>(dual_clip), static_cast<float>(log_ratio_clamp)},
                  data_or_null<double>(kl_coef_tensor, 1, ScalarType::Double),
                  static_cast<float>(kl_coef),
                  static_cast<float>(kl_log_clamp),
                  static_cast<float>(kl_clamp),
                  false};
  for (const auto* x :
       {&in.logprobs, &in.old_logprobs, &in.advantages, &in.weights, &in.ref_logprobs, &in.row_weight}) {
    in.needs_row = in.needs_row || x->needs_row();
  }
  in.needs_row = in.needs_row || in.mask.needs_row();
  const int64_t blocks = loss_blocks(logprobs.numel());
  const LossTensors out(launch, logprobs, blocks, kPolicyPartials, 12, grad);
  launch(policy_kernel(ref_logprobs.has_value(), kl_estimator), blocks, kLossThreads, in, out.outputs(normalizer));
  return std::make_tuple(out.loss, out.stats, out.grad, out.inv_normalizer);
}

}  // namespace
}  // namespace ppo

PPO_CUDA_OPS(m) { m.impl("policy_loss", TORCH_BOX(&ppo::policy_loss)); }
