// Advantages over the responses to one prompt on the device. A warp per place in the sorted order: the one at which a
// group begins takes the whole group, however long, and the others end at once. So nobody has to know how many groups
// there are.
#pragma once

#include "cuda/reduce.cuh"
#include "math/group_advantages.h"

namespace ppo {

constexpr int kGroupThreads = 256;

struct GroupInputs {
  const float* scores;
  const int64_t *sorted_ids, *order;  // null: every group_size neighbours are a group
  int64_t total, group_size, mode;
  double eps;
  float* advantages;

  // Whether place i, not the first of all, belongs to the group that begins at `begin`.
  __device__ bool joined(int64_t begin, int64_t i) const {
    return i < total && (sorted_ids != nullptr ? sorted_ids[i] == sorted_ids[begin] : i - begin < group_size);
  }
  __device__ bool begins(int64_t i) const {
    if (sorted_ids == nullptr) return i % group_size == 0;
    return i == 0 || sorted_ids[i] != sorted_ids[i - 1];
  }
  // The score at a place. A raw call's order may hold anything; the public function sorted it.
  __device__ int64_t at(int64_t i) const {
    if (order == nullptr) return i;
    const int64_t from = order[i];
    return from < 0 ? 0 : (from >= total ? total - 1 : from);
  }
};

// Calls f(place) for the lane's part of the group that begins at `begin`; returns after all lanes have seen its end.
template <class F>
__device__ void for_group(const GroupInputs& in, int64_t begin, const F& f) {
  for (int64_t base = begin;; base += kWarp) {
    const int64_t i = base + threadIdx.x % kWarp;
    const bool mine = in.joined(begin, i);
    if (mine) f(i);
    if (__ballot_sync(kAllLanes, mine) != kAllLanes) return;
  }
}

static __global__ void __launch_bounds__(kGroupThreads) group_advantages_kernel(GroupInputs in) {
  const int64_t begin = blockIdx.x * int64_t{kGroupThreads / kWarp} + threadIdx.x / kWarp;
  if (begin >= in.total || !in.begins(begin)) return;
  GroupMean group{in.scores[in.at(begin)]};
  double sum = 0.0, count = 0.0, m2 = 0.0;
  for_group(in, begin, [&](int64_t i) { sum += group.difference(in.scores[in.at(i)]), count += 1.0; });
  sum = warp_sum(sum), count = warp_sum(count);
  group.mean = sum / count;
  const auto deviation = [&](int64_t i) { return group.deviation(in.scores[in.at(i)]); };
  if (in.mode == GroupBaseline::kGrpo) {
    for_group(in, begin, [&](int64_t i) { m2 += deviation(i) * deviation(i); });
    m2 = warp_sum(m2);
  }
  const double scale = group_scale(in.mode, count, m2, in.eps);
  for_group(in, begin, [&](int64_t i) { in.advantages[in.at(i)] = static_cast<float>(deviation(i) * scale); });
}

}  // namespace ppo
