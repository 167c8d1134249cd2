#include "cuda/group_advantages.cuh"
#include "cuda/launch.cuh"

namespace ppo {
namespace {

Tensor group_advantages(const Tensor& scores, const OptTensor& sorted_ids, const OptTensor& order, int64_t group_size,
                        int64_t mode, double eps) {
  PPO_COUNT("group_advantages");
  PPO_CHECK(sorted_ids.has_value() == order.has_value(), "sorted_ids and order come together; pass both or neither");
  PPO_CHECK(order.has_value() || group_size >= 1, "group_size must be >= 1, got ", group_size);
  check_code("mode", mode, GroupBaseline::kCount);
  const Launcher launch(scores);
  const int64_t total = scores.numel();
  const Tensor advantages = empty({total}, ScalarType::Float, scores);
  const RowVector<float> score("scores", scores, {total});
  const RowVector<int64_t> ids("sorted_ids", sorted_ids, {total}), from("order", order, {total});
  if (from) launch.clear(advantages.data_ptr(), total * sizeof(float));  // what no place names stays 0
  const GroupInputs in{score.data(), ids.data(), from.data(), total, group_size, mode, eps, data_of<float>(advantages)};
  constexpr int64_t kPerBlock = kGroupThreads / kWarp;
  launch(group_advantages_kernel, (total + kPerBlock - 1) / kPerBlock, kGroupThreads, in);
  return advantages;
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CUDA, m) { PPO_IMPL(m, "group_advantages", ppo::group_advantages); }
