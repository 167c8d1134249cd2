// Advantages over the responses to one prompt on the device. A warp per reward and place in the sorted order: the one
// at which a group begins takes the whole group, however long, and the others end at once. So nobody has to know how
// many groups there are.
#pragma once

#include "cuda/reduce.cuh"
#include "math/group_advantages.h"

namespace ppo {

constexpr int kGroupThreads = 256;

struct GroupInputs {
  const float* scores;
  const int64_t *sorted_ids, *order;  // null: every group_size neighbours are a group
  int64_t rewards, total, group_size, mode;
  double eps;
  float* advantages;
  uint8_t* heads;  // null: nobody asks

  // Whether place i, not the first of all, belongs to the group that begins at `begin`.
  __device__ bool joined(int64_t begin, int64_t i) const {
    return i < total && (sorted_ids != nullptr ? sorted_ids[i] == sorted_ids[begin] : i - begin < group_size);
  }
  __device__ bool begins(int64_t i) const {
    if (sorted_ids == nullptr) return i % group_size == 0;
    return i == 0 || sorted_ids[i] != sorted_ids[i - 1];
  }
  // Where the score at a place is. A raw call's order may hold anything; the public function sorted it.
  __device__ int64_t at(int64_t row, int64_t i) const {
    if (order == nullptr) return row + i;
    const int64_t from = order[i];
    return row + (from < 0 ? 0 : (from >= total ? total - 1 : from));
  }
};

// One group of one reward, of which each lane has a part.
struct WarpGroup {
  const GroupInputs& in;
  int64_t row, begin;  // of the reward's scores; of the group

  // Calls f(where, score) for the lane's part; returns after all lanes have seen the group's end.
  template <class F>
  __device__ void for_each(const F& f) const {
    for (int64_t base = begin;; base += kWarp) {
      const int64_t i = base + threadIdx.x % kWarp;
      const bool mine = in.joined(begin, i);
      if (mine) {
        const int64_t where = in.at(row, i);
        f(where, static_cast<double>(in.scores[where]));
      }
      if (__ballot_sync(kAllLanes, mine) != kAllLanes) return;
    }
  }
  template <class F>
  __device__ double sum(const F& f) const {
    double mine = 0.0;
    for_each([&](int64_t, double score) { mine += is_score(score) ? f(score) : 0.0; });
    return warp_sum(mine);
  }
  template <class Of>
  __device__ double sum_of_squares(const Of& of) const {
    return sum([&](double score) { return of.deviation(score) * of.deviation(score); });
  }
  __device__ GroupRange range() const {
    GroupRange all;
    for_each([&](int64_t, double score) {
      if (is_score(score)) all.add(score);
    });
    all.count = warp_sum(all.count);
    all.low = -warp_max_or_nan(-all.low), all.high = warp_max_or_nan(all.high);
    return all;
  }
};

// kByOthers: over the deviation of the others, which needs more registers than the rest.
template <bool kByOthers>
__global__ void __launch_bounds__(kGroupThreads, 4) group_advantages_kernel(GroupInputs in) {
  const int64_t place = blockIdx.x * int64_t{kGroupThreads / kWarp} + threadIdx.x / kWarp;
  if (place >= in.rewards * in.total) return;
  const int64_t row = place / in.total * in.total, begin = place - row;
  const bool begins = in.begins(begin), first_lane = threadIdx.x % kWarp == 0;
  if (!begins) {
    if (in.heads != nullptr && first_lane) in.heads[place] = GroupHead::kNone;
    return;
  }
  const WarpGroup scores{in, row, begin};
  const GroupRange range = scores.range();
  if (in.heads != nullptr && first_lane) in.heads[place] = range.head();
  GroupMean group{range.low};
  group.mean = mean_or_0(scores.sum([&](double score) { return group.difference(score); }), range.count);
  const double m2 = kByOthers || in.mode == GroupBaseline::kGrpo ? scores.sum_of_squares(group) : 0.0;
  const auto write = [&](const auto& scale) {
    scores.for_each([&](int64_t where, double score) {
      const double own = group.deviation(score);
      in.advantages[where] = is_score(score) ? static_cast<float>(product_or_0(own, scale(score, own))) : 0.0f;
    });
  };
  if constexpr (kByOthers) {
    GroupOthers others(range, group);
    others.far_count = scores.sum([&](double score) { return others.is_far(score) ? 1.0 : 0.0; });
    others.mean =
        mean_or_0(scores.sum([&](double score) { return others.difference(score); }), range.count - others.far_count);
    others.m2 = scores.sum_of_squares(others);
    write([&](double score, double own) { return others.scale(score, own, m2, in.eps); });
  } else {
    const double scale = group_scale(in.mode, range.count, group, m2, in.eps);
    write([&](double, double) { return scale; });
  }
}

}  // namespace ppo
