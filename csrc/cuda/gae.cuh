// Generalised advantage estimation on the device: every token read once and written once, the scan in between in
// registers.
//
// Within a run of 8 tokens the recurrence is walked in float32; runs, tiles and segments are joined as affine maps in
// float64, because gamma lam close to 1 multiplies what a float32 map loses.
#pragma once

#include "cuda/rows.cuh"
#include "math/gae.h"

namespace ppo {

struct GaeInputs {
  TokenRows rows;
  TokenInput<float> rewards, values;
  TokenInput<uint8_t> mask;
  const double* lam_rows;        // null: lam
  const float* bootstrap_value;  // null: 0
  double gamma, lam;
  int64_t masked_steps;
  bool aligned;
  float *advantages, *returns;
};

// What the segments of long rows tell each other, from one launch to the next.
struct GaeLink {
  AffineMap map;
  bool reached;  // a valid token follows the segment
};

// What a block or warp knows of its row.
struct GaeRow {
  RowSpan span;
  const float *rewards, *values;
  const uint8_t* mask;
  bool aligned, looks_back;  // looks_back: a masked token matters if a valid one follows
  int64_t masked_steps;
  GaeStep<float> step;
  double gamma_lam;

  __device__ GaeRow(const GaeInputs& in, int64_t b)
      : span(in.rows, b),
        rewards(in.rewards.row(in.rows, span.row)),
        values(in.values.row(in.rows, span.row)),
        mask(in.mask.row(in.rows, span.row)),
        aligned(span.aligned(in.rows, in.aligned)),
        looks_back(mask != nullptr && in.masked_steps != MaskedSteps::kSkip),
        masked_steps(in.masked_steps) {
    const double lam = in.lam_rows != nullptr ? in.lam_rows[span.row] : in.lam;
    gamma_lam = in.gamma * lam;
    step = {static_cast<float>(in.gamma), static_cast<float>(lam)};
  }
  __device__ double bootstrap(const GaeInputs& in) const {
    return in.bootstrap_value != nullptr ? static_cast<double>(in.bootstrap_value[span.row]) : 0.0;
  }
};

// A run of 8 tokens per lane.
template <int kLanes>
struct GaeTile {
  float rewards[kRun], values[kRun];
  int64_t begin;
  unsigned valid, live = 0;

  __device__ GaeTile(const GaeRow& row, int64_t tile, float* stage) : begin(tile * kTile) {
    load_tile<kLanes>(row.rewards, begin, row.span.length, row.aligned, rewards);
    load_tile<kLanes>(row.values, begin, row.span.length, row.aligned, values);
    valid = valid_run(row.mask, at(), row.span.length);  // waits for the mask when all has been asked for
    if (row.aligned) return;
    to_runs<kLanes>(stage, rewards);
    to_runs<kLanes>(stage, values);
  }

  __device__ int64_t at() const { return begin + threadIdx.x % kLanes * kRun; }

  // Finds the transitions and blanks what they must not read; `reached`: a valid token follows the tile. Returns
  // whether one follows the token before the tile.
  __device__ bool settle(const GaeRow& row, bool reached) {
    const unsigned lane = threadIdx.x % kWarp, team = lane / kLanes * kLanes;
    const unsigned votes = __ballot_sync(kAllLanes, valid != 0) >> team & (kAllLanes >> (kWarp - kLanes));
    const bool follows = reached || votes >> (lane - team) > 1u;
    unsigned until_last = valid | valid >> 1;
    until_last |= until_last >> 2;
    until_last |= until_last >> 4;
    if (follows) until_last = valid_run(nullptr, at(), row.span.length);
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      const TokenRule rule = token_rule((valid >> k & 1u) != 0, row.masked_steps);
      if (rule.transition && (until_last >> k & 1u) != 0) live |= 1u << k;
      if (!rule.read) rewards[k] = values[k] = 0.0f;
    }
    return reached || votes != 0;
  }

  // The lane's run as a map of what lies ahead of it.
  __device__ AffineMap map(const GaeRow& row) const {
    float ahead = 0.0f;
    unsigned count = 0;
#pragma unroll
    for (int k = kRun - 1; k >= 0; --k) {
      if ((live >> k & 1u) == 0) continue;
      ahead = row.step.next(rewards[k], values[k], ahead);
      ++count;
    }
    double scale = 1.0, power = row.gamma_lam;
#pragma unroll
    for (unsigned bit = 1; bit <= kRun; bit *= 2, power *= power) scale *= (count & bit) != 0 ? power : 1.0;
    return {scale, static_cast<double>(ahead)};
  }

  __device__ void finish(const GaeInputs& in, const GaeRow& row, double lies_ahead, float* stage) {
    float ahead = static_cast<float>(lies_ahead);
#pragma unroll
    for (int k = kRun - 1; k >= 0; --k) {
      const float advantage = row.step.advantage(rewards[k], values[k], ahead);
      if ((live >> k & 1u) != 0) ahead = row.step.next(rewards[k], values[k], ahead);
      const bool is_valid = (valid >> k & 1u) != 0;
      rewards[k] = is_valid ? advantage : 0.0f;
      values[k] = is_valid ? advantage + values[k] : 0.0f;
    }
    if (!row.aligned) {
      from_runs<kLanes>(stage, rewards);
      from_runs<kLanes>(stage, values);
    }
    store_tile<kLanes>(in.advantages + row.span.start, begin, row.span.length, row.aligned, rewards);
    store_tile<kLanes>(in.returns + row.span.start, begin, row.span.length, row.aligned, values);
  }
};

__device__ inline AffineMap shuffle_down(const AffineMap& m, int lanes) {
  return {__shfl_down_sync(kAllLanes, m.scale, lanes), __shfl_down_sync(kAllLanes, m.shift, lanes)};
}

struct TeamMaps {
  AffineMap later, all;  // of the lanes after this one, of the team
};

template <int kLanes>
__device__ TeamMaps scan_team(AffineMap m) {
  const int lane = threadIdx.x % kLanes, first = threadIdx.x % kWarp - lane;
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) {
    const AffineMap later = shuffle_down(m, lanes);
    if (lane + lanes < kLanes) m = m.after(later);
  }
  const AffineMap later = shuffle_down(m, 1);
  return {lane + 1 < kLanes ? later : AffineMap::identity(),
          {__shfl_sync(kAllLanes, m.scale, first), __shfl_sync(kAllLanes, m.shift, first)}};
}

// A team per row, walking it from its end.
template <int kLanes>
__global__ void __launch_bounds__(kRowThreads, kLanes == kWarp ? 3 : 4) gae_teams_kernel(GaeInputs in) {
  __shared__ float stages[kStage];
  float* stage = team_stage<kLanes>(stages);
  if (kLanes == kWarp) wait_for_bounds(in.rows);
  const GaeRow row(in, team_row<kLanes>());
  double ahead = row.bootstrap(in), after_segment = ahead;
  AffineMap segment = AffineMap::identity();
  bool reached = false;
  for (int64_t i = team_tiles<kLanes>(row.span.length) - 1; i >= 0; --i) {
    GaeTile<kLanes> tile(row, i, stage);
    reached = tile.settle(row, reached);
    const TeamMaps maps = scan_team<kLanes>(tile.map(row));
    tile.finish(in, row, maps.later(ahead), stage);
    ahead = maps.all(ahead);
    segment = maps.all.after(segment);
    if (i % kTiles != 0) continue;
    ahead = after_segment = segment(after_segment);
    segment = AffineMap::identity();
  }
}

// What a launch does for a segment: its row has no other one, or it leaves its map for those before it, or it takes
// the maps of those after it.
struct GaePass {
  enum : int { kAlone, kMaps, kTokens };
};

// A block per segment. A row of many is read twice, the second time mostly from the cache: no block waits for another.
template <int kPass>
__global__ void __launch_bounds__(kRowThreads, 4) gae_segments_kernel(GaeInputs in, GaeLink* links) {
  __shared__ float stages[kStage];
  __shared__ double scales[kTiles], shifts[kTiles];
  __shared__ bool any[kTiles];
  // The second launch begins with what the first one has read last.
  const int64_t number = kPass == GaePass::kTokens ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  if (kPass == GaePass::kMaps) allow_dependent_launch();
  if (kPass != GaePass::kAlone) wait_for_bounds(in.rows);
  const RowSegment segment(in.rows, number);
  if (segment.row < 0 || (kPass == GaePass::kMaps && segment.count == 1)) return;
  const int warp = threadIdx.x / kWarp;
  const int64_t index = number - segment.first;
  float* stage = team_stage<kWarp>(stages);
  const GaeRow row(in, segment.row);
  GaeTile<kWarp> tile(row, index * kTiles + warp, stage);
  if (kPass == GaePass::kTokens) wait_for_primary();

  bool reached = false;
  if (row.looks_back) {
    if (kPass == GaePass::kTokens && segment.count > 1) reached = links[number].reached;
    const bool any_of_warp = __ballot_sync(kAllLanes, tile.valid != 0) != 0;
    if (threadIdx.x % kWarp == 0) any[warp] = any_of_warp;
    __syncthreads();
    if (kPass == GaePass::kMaps) reached = any_valid(row.mask, (index + 1) * kSegment, row.span.length);
    if (kPass == GaePass::kMaps && threadIdx.x == 0) links[number].reached = reached;
    for (int w = warp + 1; w < kTiles; ++w) reached |= any[w];
  }
  tile.settle(row, reached);
  const TeamMaps maps = scan_team<kWarp>(tile.map(row));
  if (threadIdx.x % kWarp == 0) scales[warp] = maps.all.scale, shifts[warp] = maps.all.shift;
  __syncthreads();
  if (kPass == GaePass::kMaps) {
    if (threadIdx.x != 0) return;
    AffineMap all = AffineMap::identity();
    for (int w = kTiles - 1; w >= 0; --w) all = AffineMap{scales[w], shifts[w]}.after(all);
    links[number].map = all;
    return;
  }
  double ahead = row.bootstrap(in);
  if (kPass == GaePass::kTokens) {
#pragma unroll 8
    for (int64_t i = segment.count - 1; i > index; --i) ahead = links[segment.first + i].map(ahead);
  }
  for (int w = kTiles - 1; w > warp; --w) ahead = AffineMap{scales[w], shifts[w]}(ahead);
  tile.finish(in, row, maps.later(ahead), stage);
}

}  // namespace ppo
