// Advantages over the responses to one prompt, on CPU tensors.
#include "math/group_advantages.h"

#include "cpu/block.h"

namespace ppo {
namespace {

// Writes the advantage of each of n scores, and says so. Unless all are known to be finite, one that is not shows in
// the first sum, and then nothing is written.
template <class Score, class Write>
bool advantages_of(int64_t n, bool finite, const Score& score, int64_t mode, double eps, const Write& write) {
  const auto sum = [&](const auto& f) {
    double total = 0.0;
    for (int64_t i = 0; i < n; ++i) total += f(score(i));
    return total;
  };
  const auto sum_of_squares = [&](const auto& of) {
    return sum([&](double x) { return of.deviation(x) * of.deviation(x); });
  };
  const auto count = static_cast<double>(n);
  GroupMean group{score(0)};
  group.mean = sum([&](double x) { return group.difference(x); }) / count;
  if (!finite && !is_score(group.mean)) return false;
  if (mode != GroupBaseline::kRlooScaled) {
    const double scale =
        group_scale(mode, count, group, mode == GroupBaseline::kGrpo ? sum_of_squares(group) : 0.0, eps);
    for (int64_t i = 0; i < n; ++i) write(i, product_or_0(group.deviation(score(i)), scale));
    return true;
  }
  GroupRange range;
  for (int64_t i = 0; i < n; ++i) range.add(score(i));
  GroupOthers others(range, group);
  others.far_count = sum([&](double x) { return others.is_far(x) ? 1.0 : 0.0; });
  others.mean = mean_or_0(sum([&](double x) { return others.difference(x); }), count - others.far_count);
  others.m2 = sum_of_squares(others);
  const double m2 = sum_of_squares(group);
  for (int64_t i = 0; i < n; ++i) {
    const double own = group.deviation(score(i));
    write(i, product_or_0(own, others.scale(score(i), own, m2, eps)));
  }
  return true;
}

// The same for scores of which some may be no members: those get 0. `members` is memory for their places.
template <class Score, class Write>
void advantages_of_members(int64_t n, std::vector<int64_t>& members, const Score& score, int64_t mode, double eps,
                           const Write& write) {
  if (advantages_of(n, false, score, mode, eps, write)) return;
  members.clear();
  for (int64_t i = 0; i < n; ++i) is_score(score(i)) ? members.push_back(i) : write(i, 0.0);
  if (members.empty()) return;
  advantages_of(
      members.size(), true, [&](int64_t i) { return score(members[i]); }, mode, eps,
      [&](int64_t i, double advantage) { write(members[i], advantage); });
}

template <class Score>
uint8_t head_of(int64_t n, const Score& score) {
  GroupRange range;
  for (int64_t i = 0; i < n; ++i) {
    if (is_score(score(i))) range.add(score(i));
  }
  return range.head();
}

std::tuple<Tensor, Tensor> group_advantages(const Tensor& scores, const OptTensor& sorted_ids, const OptTensor& order,
                                            int64_t group_size, int64_t mode, double eps, bool stats) {
  PPO_COUNT("group_advantages");
  PPO_CHECK(sorted_ids.has_value() == order.has_value(), "sorted_ids and order come together; pass both or neither");
  PPO_CHECK(order.has_value() || group_size >= 1, "group_size must be >= 1, got ", group_size);
  PPO_CHECK(scores.dim() == 2, "scores must be [R, B], got the shape ", shape_text(scores.sizes()));
  check_code("mode", mode, GroupBaseline::kCount);
  return dispatch_compute(scores, [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    const int64_t rewards = scores.size(0), total = scores.size(1);
    const RowVector<T> all("scores", scores, {rewards, total});
    const RowVector<int64_t> ids("sorted_ids", sorted_ids, {total}), from("order", order, {total});
    // What no place names stays 0.
    const Tensor advantages = from ? torch::stable::new_zeros(scores, scores.sizes()) : new_like(scores);
    const Tensor heads = empty({stats ? rewards : 0, total}, ScalarType::Byte, scores);
    T* out = data_of<T>(advantages);
    uint8_t* head = stats ? data_of<uint8_t>(heads) : nullptr;
    if (stats) std::fill(head, head + rewards * total, GroupHead::kNone);
    // A raw call's order may hold anything; the public function sorted it.
    const auto at = [&](int64_t i) { return from ? std::clamp<int64_t>(from[i], 0, total - 1) : i; };
    std::vector<int64_t> members;
    for (int64_t begin = 0, end = 0; begin < total; begin = end) {
      end = begin + 1;
      while (end < total && (ids ? ids[end] == ids[begin] : end - begin < group_size)) ++end;
      for (int64_t r = 0; r < rewards; ++r) {
        const int64_t row = r * total;
        const auto score = [&](int64_t i) { return static_cast<double>(all[row + at(begin + i)]); };
        const auto write = [&](int64_t i, double advantage) { out[row + at(begin + i)] = static_cast<T>(advantage); };
        advantages_of_members(end - begin, members, score, mode, eps, write);
        if (stats) head[row + begin] = head_of(end - begin, score);
      }
    }
    return {advantages, heads};
  });
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CPU, m) { PPO_IMPL(m, "group_advantages", ppo::group_advantages); }
