#include "cuda/importance_weights.cuh"
#include "cuda/launch.cuh"
#include "importance_weights.h"

namespace ppo {
namespace {

ImportanceResult importance_weights(const Tensor& logprobs, const Tensor& rollout_logprobs, const OptTensor& mask,
                                    const OptTensor& cu_seqlens, int64_t level, int64_t mode, int64_t reject,
                                    int64_t reject_level, double low, double high, double reject_low,
                                    double reject_high, double log_ratio_clamp) {
  PPO_COUNT("importance_weights");
  const auto options =
      importance_options<float>(level, mode, reject, reject_level, low, high, reject_low, reject_high, log_ratio_clamp);
  check_dtype<float>("logprobs", logprobs);
  const Launcher launch(logprobs);
  const TokenRows rows = token_rows(logprobs, cu_seqlens);
  const Tensor keep = empty(logprobs.sizes(), ScalarType::Bool, logprobs);
  ImportanceInputs in{rows,
                      token_input<float>("logprobs", logprobs, logprobs, rows),
                      token_input<float>("rollout_logprobs", rollout_logprobs, logprobs, rows),
                      {},
                      {},
                      token_input<uint8_t>("mask", mask, logprobs, rows),
                      options,
                      reinterpret_cast<uint8_t*>(data_of<bool>(keep)),
                      false};
  const Tensor of_rows = empty({options.by_row() ? 2 * rows.count : 0}, ScalarType::Float, logprobs);
  if (options.by_row()) {
    float* ratios = data_of<float>(of_rows);
    float* estimates = ratios + rows.count;
    launch(importance_rows_kernel, rows.count, kLossThreads, in, ratios, estimates);
    in.row_ratio = per_row<float>(ratios), in.row_estimate = per_row<float>(estimates);
  }
  const auto of_all = [&](const auto& f) {
    return f(in.logprobs, in.rollout_logprobs, in.row_ratio, in.row_estimate, in.mask);
  };
  in.needs_row = of_all([](const auto&... all) { return any_needs_row(all...); });
  const bool flat = of_all([&](const auto&... all) { return flat_and_aligned(rows, all...); });
  const int64_t blocks = loss_blocks(logprobs.numel());
  const LossTensors out(logprobs, blocks, ImportanceLoss::Partials::kCount, ImportanceStat::kCount, {}, true);
  out.run<ImportanceLoss>(launch, flat ? importance_weights_kernel<true> : importance_weights_kernel<false>, blocks,
                          in);
  return {out.grad, keep, out.stats};
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CUDA, m) { PPO_IMPL(m, "importance_weights", ppo::importance_weights); }
