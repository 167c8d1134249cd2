#include "cuda/group_advantages.cuh"
#include "cuda/launch.cuh"

namespace ppo {
namespace {

std::tuple<Tensor, Tensor> group_advantages(const Tensor& scores, const OptTensor& sorted_ids, const OptTensor& order,
                                            int64_t group_size, int64_t mode, double eps, bool stats) {
  PPO_COUNT("group_advantages");
  PPO_CHECK(sorted_ids.has_value() == order.has_value(), "sorted_ids and order come together; pass both or neither");
  PPO_CHECK(order.has_value() || group_size >= 1, "group_size must be >= 1, got ", group_size);
  PPO_CHECK(scores.dim() == 2, "scores must be [R, B], got the shape ", shape_text(scores.sizes()));
  check_code("mode", mode, GroupBaseline::kCount);
  const Launcher launch(scores);
  const int64_t rewards = scores.size(0), total = scores.size(1), places = rewards * total;
  const Tensor advantages = new_like(scores);
  const Tensor heads = empty({stats ? rewards : 0, total}, ScalarType::Byte, scores);
  const RowVector<float> score("scores", scores, {rewards, total});
  const RowVector<int64_t> ids("sorted_ids", sorted_ids, {total}), from("order", order, {total});
  if (from) launch.clear(advantages.data_ptr(), places * sizeof(float));  // what no place names stays 0
  const GroupInputs in{score.data(),
                       ids.data(),
                       from.data(),
                       rewards,
                       total,
                       group_size,
                       mode,
                       eps,
                       data_of<float>(advantages),
                       stats ? data_of<uint8_t>(heads) : nullptr};
  constexpr int64_t kPerBlock = kGroupThreads / kWarp;
  const bool by_others = mode == GroupBaseline::kRlooScaled;
  launch(by_others ? group_advantages_kernel<true> : group_advantages_kernel<false>,
         (places + kPerBlock - 1) / kPerBlock, kGroupThreads, in);
  return {advantages, heads};
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CUDA, m) { PPO_IMPL(m, "group_advantages", ppo::group_advantages); }
