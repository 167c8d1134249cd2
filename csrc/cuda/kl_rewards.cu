#include "cuda/kl_rewards.cuh"
#include "cuda/rows_launch.cuh"

namespace ppo {
namespace {

std::tuple<Tensor, Tensor> kl_rewards(const Tensor& logprobs, const Tensor& ref_logprobs, const Tensor& scores,
                                      const OptTensor& mask, const OptTensor& score_index, const OptTensor& cu_seqlens,
                                      const OptTensor& kl_coef_tensor, double kl_coef, int64_t kl_estimator,
                                      double score_clip, double kl_log_clamp, double kl_clamp) {
  PPO_COUNT("kl_rewards");
  check_code("kl_estimator", kl_estimator, kEstimators);
  const Launcher launch(logprobs);
  const Tensor rewards = empty(logprobs.sizes(), ScalarType::Float, logprobs);
  const RowWork work(launch, logprobs, cu_seqlens, {rewards});
  const Tensor kl = empty({work.rows.count}, ScalarType::Float, logprobs);
  const RowVector<float> score("scores", scores, {work.rows.count});
  const RowVector<int64_t> index("score_index", score_index, {work.rows.count});
  const RowVector<double> coef("kl_coef_tensor", kl_coef_tensor, {});
  const KlRewardsInputs in{work.rows,
                           token_input<float>("logprobs", logprobs, logprobs, work.rows),
                           token_input<float>("ref_logprobs", ref_logprobs, logprobs, work.rows),
                           token_input<uint8_t>("mask", mask, logprobs, work.rows),
                           score.data(),
                           index.data(),
                           coef.data(),
                           kl_estimator,
                           static_cast<float>(kl_coef),
                           static_cast<float>(score_clip),
                           static_cast<float>(kl_log_clamp),
                           static_cast<float>(kl_clamp),
                           vector_aligned(logprobs) && vector_aligned(ref_logprobs) && vector_aligned(rewards),
                           data_of<float>(rewards),
                           data_of<float>(kl)};
  const bool linked = work.kind == RowWork::kSegments;
  const Tensor scratch = empty({linked ? 2 * work.segments : 0}, ScalarType::Double, logprobs);
  auto* parts = data_of<KlPart>(scratch);
  if (work.kind == RowWork::kShortTeams) {
    work.launch(kl_teams_kernel<kShortTeam>, work.blocks, in);
  } else if (work.kind == RowWork::kWarps) {
    work.launch(kl_teams_kernel<kWarp>, work.blocks, in);
  } else {
    work.launch(kl_segments_kernel, work.blocks, in, linked ? parts : nullptr);
    const int64_t blocks = (work.rows.count + kRowThreads - 1) / kRowThreads;
    if (linked) launch.dependent(kl_rows_kernel, blocks, kRowThreads, in, parts);
  }
  return std::make_tuple(rewards, kl);
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CUDA, m) { PPO_IMPL(m, "kl_rewards", ppo::kl_rewards); }
