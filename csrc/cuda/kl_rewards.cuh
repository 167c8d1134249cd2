// KL-shaped rewards on the device: rewards, the rows' sums of the estimates and their scores from one pass.
#pragma once

#include "cuda/rows.cuh"
#include "math/kl.h"

namespace ppo {

struct KlRewardsInputs {
  TokenRows rows;
  TokenInput<float> logprobs, ref_logprobs;
  TokenInput<uint8_t> mask;
  const float* scores;
  const int64_t* score_index;  // null: the last valid token
  const double* kl_coef;       // null: coef
  int64_t estimator;
  float coef, score_clip, log_clamp, value_clamp;
  bool aligned;
  float *rewards, *kl;
};

// What a part of a row adds to its end: the sum of the estimates and the last valid token, -1 for none.
struct KlPart {
  double sum;
  int64_t last;
};

struct KlRow {
  RowSpan span;
  const float *logprobs, *ref;
  const uint8_t* mask;
  bool aligned;
  float scale;

  __device__ KlRow(const KlRewardsInputs& in, int64_t b)
      : span(in.rows, b),
        logprobs(in.logprobs.row(in.rows, span.row)),
        ref(in.ref_logprobs.row(in.rows, span.row)),
        mask(in.mask.row(in.rows, span.row)),
        aligned(span.aligned(in.rows, in.aligned)),
        scale(-(in.kl_coef != nullptr ? static_cast<float>(*in.kl_coef) : in.coef)) {}

  // The token that gets the score, -1 for none, and the score.
  __device__ int64_t scored(const KlRewardsInputs& in, int64_t last) const {
    const int64_t at = last < 0 || in.score_index == nullptr ? last : in.score_index[span.row];
    return at < span.length ? at : -1;
  }
  __device__ float score(const KlRewardsInputs& in) const { return clamp(in.scores[span.row], in.score_clip); }
};

// The sum over a team's lanes, and the highest of their tokens.
template <int kLanes>
__device__ KlPart team_part(KlPart part) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes >= 1; lanes /= 2) {
    part.sum += __shfl_xor_sync(kAllLanes, part.sum, lanes);
    const int64_t last = __shfl_xor_sync(kAllLanes, part.last, lanes);
    part.last = last > part.last ? last : part.last;
  }
  return part;
}

// A run of 8 tokens per lane.
template <int kLanes>
struct KlTile {
  float rewards[kRun];
  int64_t begin;
  KlPart part;  // of the team

  __device__ KlTile(const KlRewardsInputs& in, const KlRow& row, int64_t tile, float* stage) : begin(tile * kTile) {
    float ref[kRun];
    load_tile<kLanes>(row.logprobs, begin, row.span.length, row.aligned, rewards);
    load_tile<kLanes>(row.ref, begin, row.span.length, row.aligned, ref);
    const unsigned valid = valid_run(row.mask, at(), row.span.length);  // waits when all has been asked for
    if (!row.aligned) {
      to_runs<kLanes>(stage, rewards);
      to_runs<kLanes>(stage, ref);
    }
    float sum = 0.0f;
    part.last = -1;
    dispatch_estimator(in.estimator, [&](auto estimator) {
#pragma unroll
      for (int k = 0; k < kRun; ++k) {
        const bool is_valid = (valid >> k & 1u) != 0;
        const float logprob = is_valid ? rewards[k] : 0.0f, ref_logprob = is_valid ? ref[k] : 0.0f;
        const float estimate = kl_term<estimator()>(logprob, ref_logprob, in.log_clamp, in.value_clamp).value;
        sum += estimate;
        rewards[k] = is_valid ? 0.0f + scaled_or_off(row.scale, estimate) : 0.0f;  // never -0
        if (is_valid) part.last = at() + k;
      }
    });
    part.sum = static_cast<double>(sum);
    part = team_part<kLanes>(part);
  }

  __device__ int64_t at() const { return begin + threadIdx.x % kLanes * kRun; }

  __device__ void add(int64_t token, float score) {
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      if (at() + k == token) rewards[k] += score;
    }
  }

  __device__ void store(const KlRewardsInputs& in, const KlRow& row, float* stage) {
    if (!row.aligned) from_runs<kLanes>(stage, rewards);
    store_tile<kLanes>(in.rewards + row.span.start, begin, row.span.length, row.aligned, rewards);
  }
};

// Ends a row whose rewards are already in memory; for one thread.
__device__ inline void finish_row(const KlRewardsInputs& in, const KlRow& row, const KlPart& all) {
  in.kl[row.span.row] = static_cast<float>(all.sum);
  const int64_t at = row.scored(in, all.last);
  if (at < 0) return;
  float* reward = in.rewards + row.span.start + at;
  *reward += row.score(in);
}

// A team per row, walking it from its end.
template <int kLanes>
__global__ void __launch_bounds__(kRowThreads, kLanes == kWarp ? 3 : 4) kl_teams_kernel(KlRewardsInputs in) {
  __shared__ float stages[kStage];
  float* stage = team_stage<kLanes>(stages);
  if (kLanes == kWarp) wait_for_bounds(in.rows);
  const int64_t b = team_row<kLanes>();
  const bool writes = b < in.rows.count && threadIdx.x % kLanes == 0;
  const KlRow row(in, b);
  const int64_t tiles = team_tiles<kLanes>(row.span.length);
  KlPart all{0.0, -1};
  double segment = 0.0;
  for (int64_t i = tiles - 1; i >= 0; --i) {
    KlTile<kLanes> tile(in, row, i, stage);
    segment += tile.part.sum;
    all.last = all.last < 0 ? tile.part.last : all.last;
    if (tiles == 1) {
      const int64_t at = row.scored(in, all.last);
      if (at >= 0) tile.add(at, row.score(in));
    }
    tile.store(in, row, stage);
    if (i % kTiles != 0) continue;
    all.sum += segment;
    segment = 0.0;
  }
  if (tiles == 1) {
    if (writes) in.kl[row.span.row] = static_cast<float>(all.sum);
    return;
  }
  __syncwarp();  // the rewards of the other lanes are in memory
  if (writes) finish_row(in, row, all);
}

// Ends rows of many segments, from their parts: a thread for each.
static __global__ void __launch_bounds__(kRowThreads) kl_rows_kernel(KlRewardsInputs in, const KlPart* parts) {
  const int64_t b = team_row<1>();
  wait_for_primary();
  if (b >= in.rows.count) return;
  const KlRow row(in, b);
  const int64_t count = (row.span.length + kSegment - 1) / kSegment;
  const KlPart* first = parts + RowSegment::first_of(in.rows, b);
  KlPart all{0.0, -1};
#pragma unroll 8
  for (int64_t i = count - 1; i >= 0; --i) {
    all.sum += first[i].sum;
    all.last = first[i].last > all.last ? first[i].last : all.last;
  }
  if (count != 1) finish_row(in, row, all);  // else its block has done so
}

// A block per segment. `parts` is null where no row has a second one.
static __global__ void __launch_bounds__(kRowThreads, 4) kl_segments_kernel(KlRewardsInputs in, KlPart* parts) {
  __shared__ float stages[kStage];
  __shared__ double sums[kTiles];
  __shared__ int64_t lasts[kTiles];
  if (parts != nullptr) allow_dependent_launch();
  wait_for_bounds(in.rows);
  const RowSegment segment(in.rows, blockIdx.x);
  if (segment.row < 0) return;
  const int warp = threadIdx.x / kWarp;
  const int64_t index = blockIdx.x - segment.first;
  float* stage = team_stage<kWarp>(stages);
  const KlRow row(in, segment.row);
  KlTile<kWarp> tile(in, row, index * kTiles + warp, stage);
  if (threadIdx.x % kWarp == 0) sums[warp] = tile.part.sum, lasts[warp] = tile.part.last;
  __syncthreads();
  KlPart part{0.0, -1};
  for (int w = kTiles - 1; w >= 0; --w) {
    part.sum += sums[w];
    part.last = lasts[w] > part.last ? lasts[w] : part.last;
  }
  const bool alone = segment.count == 1;
  if (alone) {
    const int64_t at = row.scored(in, part.last);
    if (at >= 0) tile.add(at, row.score(in));
  }
  tile.store(in, row, stage);
  if (threadIdx.x != 0) return;
  if (alone) {
    in.kl[row.span.row] = static_cast<float>(part.sum);
  } else {
    parts[blockIdx.x] = part;
  }
}

}  // namespace ppo
