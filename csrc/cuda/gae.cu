#include "cuda/gae.cuh"
#include "cuda/rows_launch.cuh"

namespace ppo {
namespace {

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const OptTensor& mask,
                               const OptTensor& lam_rows, const OptTensor& bootstrap_value, const OptTensor& cu_seqlens,
                               double gamma, double lam, int64_t masked_steps) {
  PPO_COUNT("gae");
  check_code("masked_steps", masked_steps, MaskedSteps::kCount);
  const Launcher launch(rewards);
  const Tensor advantages = empty(rewards.sizes(), ScalarType::Float, rewards);
  const Tensor returns = empty(rewards.sizes(), ScalarType::Float, rewards);
  const RowWork work(launch, rewards, cu_seqlens, {advantages, returns});
  const RowVector<double> lams("lam_rows", lam_rows, {work.rows.count});
  const RowVector<float> bootstraps("bootstrap_value", bootstrap_value, {work.rows.count});
  const GaeInputs in{
      work.rows,
      token_input<float>("rewards", rewards, rewards, work.rows),
      token_input<float>("values", values, rewards, work.rows),
      token_input<uint8_t>("mask", mask, rewards, work.rows),
      lams.data(),
      bootstraps.data(),
      gamma,
      lam,
      masked_steps,
      vector_aligned(rewards) && vector_aligned(values) && vector_aligned(advantages) && vector_aligned(returns),
      data_of<float>(advantages),
      data_of<float>(returns)};
  const bool linked = work.kind == RowWork::kSegments;
  const Tensor scratch =
      empty({linked ? work.segments * int64_t{sizeof(GaeLink) / 8} : 0}, ScalarType::Double, rewards);
  auto* links = data_of<GaeLink>(scratch);
  switch (work.kind) {
    case RowWork::kShortTeams:
      work.launch(gae_teams_kernel<kShortTeam>, work.blocks, in);
      break;
    case RowWork::kWarps:
      work.launch(gae_teams_kernel<kWarp>, work.blocks, in);
      break;
    case RowWork::kOneSegment:
      work.launch(gae_segments_kernel<GaePass::kAlone>, work.blocks, in, links);
      break;
    case RowWork::kSegments:
      work.launch(gae_segments_kernel<GaePass::kMaps>, work.blocks, in, links);
      launch.dependent(gae_segments_kernel<GaePass::kTokens>, work.blocks, kRowThreads, in, links);
      break;
  }
  return std::make_tuple(advantages, returns);
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CUDA, m) { PPO_IMPL(m, "gae", ppo::gae); }
