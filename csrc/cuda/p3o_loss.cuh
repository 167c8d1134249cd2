// The pairwise policy loss on the device: a block per row sums it, a block per group meets its rows in pairs, and a
// block per row writes the gradient, which is one number for the row.
#pragma once

#include "cuda/loss.cuh"
#include "cuda/rows.cuh"
#include "math/p3o_loss.h"

namespace ppo {

static_assert(kRowThreads == kLossThreads);
constexpr int kP3OSumsPadded = 16;

struct P3OLoss {
  using Partials = Columns<P3OSum::kCount, 0, 0, true>;
  static constexpr int kTotal = P3OSum::kPairLoss;

  __device__ static double count(const double* totals) { return 0.5 * totals[P3OSum::kPairs]; }
  __device__ static void stats(const double* totals, float* out) { p3o_stats(totals, totals[Partials::kMax], out); }
};

struct P3OInputs {
  TokenRows rows;
  TokenInput<float> logprobs, old_logprobs, ref_logprobs;
  TokenInput<uint8_t> mask;
  const float* scores;
  PairOptions options;
  const double* kl_coef;  // takes the place of the option where it is given
  int64_t group_size;
  bool aligned;
  Response* responses;  // per row, like the slopes
  float* slopes;        // d loss / d S

  __device__ PairOptions with_coef() const {
    PairOptions all = options;
    if (kl_coef != nullptr) all.kl_coef = *kl_coef;
    return all;
  }
};

// A tile of the row per warp and turn. `f(begin)` gets where a tile begins.
template <class F>
__device__ void for_tiles(const RowSpan& span, const F& f) {
  for (int64_t begin = int64_t{threadIdx.x / kWarp} * kTile; begin < span.length; begin += kSegment) f(begin);
}

static __global__ void __launch_bounds__(kRowThreads, 3) p3o_rows_kernel(P3OInputs in) {
  __shared__ float stages[kStage];
  __shared__ double parts[kTiles][4];
  float* stage = team_stage<kWarp>(stages);
  wait_for_bounds(in.rows);
  const int64_t b = blockIdx.x;
  const RowSpan span(in.rows, b);
  const bool aligned = span.aligned(in.rows, in.aligned);
  const float* row[] = {in.logprobs.row(in.rows, b), in.old_logprobs.row(in.rows, b), in.ref_logprobs.row(in.rows, b)};
  const uint8_t* mask = in.mask.row(in.rows, b);
  double sums[4] = {};
  for_tiles(span, [&](int64_t begin) {
    float x[3][kRun];  // logp, old, ref
#pragma unroll
    for (int i = 0; i < 3; ++i) load_tile<kWarp>(row[i], begin, span.length, aligned, x[i]);
    const unsigned valid = valid_run(mask, begin + threadIdx.x % kWarp * kRun, span.length);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      if (!aligned) to_runs<kWarp>(stage, x[i]);
    }
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      if ((valid >> k & 1u) == 0) continue;
      const double logp = x[0][k];
      sums[0] += logp - x[1][k];
      sums[1] += logp - x[2][k];
      sums[2] += 1.0;
    }
  });
  const double sum = warp_sums(sums);  // number l / 8 in lane l
  const int lane = threadIdx.x % kWarp;
  if (lane % 8 == 0) parts[threadIdx.x / kWarp][lane / 8] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double log_ratio = 0.0, ref_log_ratio = 0.0, count = 0.0;
  for (int w = 0; w < kTiles; ++w) log_ratio += parts[w][0], ref_log_ratio += parts[w][1], count += parts[w][2];
  in.responses[b] = response(count > 0.0, in.scores[b], ref_log_ratio, log_ratio, in.with_coef());
}

static __global__ void __launch_bounds__(kRowThreads) p3o_pairs_kernel(P3OInputs in, LossOutputs out) {
  allow_dependent_launch();
  __shared__ double of_warps[kTiles][P3OLoss::Partials::kCount];
  const PairOptions options = in.with_coef();
  const int64_t first = blockIdx.x * in.group_size;
  const int64_t size = first < in.rows.count ? in.group_size : 0;
  const Response* group = in.responses + first;
  double sums[kP3OSumsPadded] = {}, ratio_max = 0.0;
  for (int64_t k = threadIdx.x; k < size; k += kRowThreads) {
    in.slopes[first + k] = static_cast<float>(response_terms(group, size, k, options, sums));
    if (group[k].has_tokens) ratio_max = max_or_nan(ratio_max, group[k].ratio);
  }
  constexpr int kLanes = kWarp / kP3OSumsPadded;  // that hold the same sum
  const int lane = threadIdx.x % kWarp;
  auto& mine = of_warps[threadIdx.x / kWarp];
  const double sum = warp_sums(sums), largest = warp_max_or_nan(ratio_max);
  if (lane % kLanes == 0 && lane / kLanes < P3OSum::kCount) mine[lane / kLanes] = sum;
  if (lane == 0) mine[P3OLoss::Partials::kMax] = largest;
  __syncthreads();
  if (threadIdx.x < kWarp) join_warps<P3OLoss::Partials>(of_warps, out.partials);
}

static __global__ void __launch_bounds__(kRowThreads, 4) p3o_gradient_kernel(P3OInputs in, float* grad) {
  __shared__ float stages[kStage];
  const int64_t b = blockIdx.x;
  const RowSpan span(in.rows, b);
  const bool aligned = span.aligned(in.rows, in.aligned);
  const uint8_t* mask = in.mask.row(in.rows, b);
  const float slope = in.slopes[b];
  for_tiles(span, [&](int64_t begin) {
    const unsigned valid = valid_run(mask, begin + threadIdx.x % kWarp * kRun, span.length);
    float x[kRun];
#pragma unroll
    for (int k = 0; k < kRun; ++k) x[k] = (valid >> k & 1u) != 0 ? slope : 0.0f;
    if (!aligned) from_runs<kWarp>(team_stage<kWarp>(stages), x);
    store_tile<kWarp>(grad + span.start, begin, span.length, aligned, x);
  });
}

}  // namespace ppo
