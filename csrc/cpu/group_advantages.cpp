// Advantages over the responses to one prompt, on CPU tensors.
#include "math/group_advantages.h"

#include "cpu/block.h"

namespace ppo {
namespace {

Tensor group_advantages(const Tensor& scores, const OptTensor& sorted_ids, const OptTensor& order, int64_t group_size,
                        int64_t mode, double eps) {
  PPO_COUNT("group_advantages");
  PPO_CHECK(sorted_ids.has_value() == order.has_value(), "sorted_ids and order come together; pass both or neither");
  PPO_CHECK(order.has_value() || group_size >= 1, "group_size must be >= 1, got ", group_size);
  check_code("mode", mode, GroupBaseline::kCount);
  return dispatch_compute(scores, [&](auto zero) {
    using T = decltype(zero);
    const int64_t total = scores.numel();
    const RowVector<T> score("scores", scores, {total});
    const RowVector<int64_t> ids("sorted_ids", sorted_ids, {total}), from("order", order, {total});
    // What no place names stays 0.
    const Tensor advantages = from ? torch::stable::new_zeros(scores, {total}) : empty({total}, dtype_of<T>(), scores);
    T* out = data_of<T>(advantages);
    // A raw call's order may hold anything; the public function sorted it.
    const auto at = [&](int64_t i) { return from ? std::clamp<int64_t>(from[i], 0, total - 1) : i; };
    for (int64_t begin = 0, end = 0; begin < total; begin = end) {
      end = begin + 1;
      while (end < total && (ids ? ids[end] == ids[begin] : end - begin < group_size)) ++end;
      GroupMean group{score[at(begin)]};
      const double count = static_cast<double>(end - begin);
      double sum = 0.0, m2 = 0.0;
      for (int64_t i = begin; i < end; ++i) sum += group.difference(score[at(i)]);
      group.mean = sum / count;
      const auto deviation = [&](int64_t i) { return group.deviation(score[at(i)]); };
      for (int64_t i = begin; i < end; ++i) m2 += deviation(i) * deviation(i);
      const double scale = group_scale(mode, count, m2, eps);
      for (int64_t i = begin; i < end; ++i) out[at(i)] = static_cast<T>(deviation(i) * scale);
    }
    return advantages;
  });
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CPU, m) { PPO_IMPL(m, "group_advantages", ppo::group_advantages); }
