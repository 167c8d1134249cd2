// The pairwise policy loss on the device: a block per group of responses sums its rows, meets them in pairs and writes
// the gradient, one number per row.
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

// Of one row: what each tile number modulo kTiles adds up to, whichever warp took it.
struct P3OParts {
  double log_ratio[kTiles], ref_log_ratio[kTiles], count[kTiles];
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
  P3OParts* parts;  // per row, like the following two
  Response* responses;
  float* slopes;  // d loss / d S
};

// One tile of the row per warp and turn. `f(begin)` gets where a tile begins.
template <class F>
__device__ void for_tiles(const RowSpan& span, int slot, const F& f) {
  for (int64_t begin = int64_t{slot} * kTile; begin < span.length; begin += kSegment) f(begin);
}

// A group's k-th row has its first tile at warp k, so that rows of one tile keep all warps busy.
__device__ inline int tile_slot(int64_t k) {
  return static_cast<int>((threadIdx.x / kWarp + kTiles - k % kTiles) % kTiles);
}

// A tile of a token input as runs of 8 tokens per lane, wherever its row begins.
__device__ inline void load_runs(const float* row, int64_t begin, int64_t length, bool aligned, float* stage,
                                 float (&x)[kRun]) {
  load_tile<kWarp>(row, begin, length, aligned, x);
  if (!aligned) to_runs<kWarp>(stage, x);
}

__device__ inline void sum_row(const P3OInputs& in, int64_t b, int slot, float* stage) {
  const RowSpan span(in.rows, b);
  const bool aligned = span.aligned(in.rows, in.aligned);
  const float *logp = in.logprobs.row(in.rows, b), *old = in.old_logprobs.row(in.rows, b),
              *ref = in.ref_logprobs.row(in.rows, b);
  const uint8_t* mask = in.mask.row(in.rows, b);
  double sums[4] = {};
  for_tiles(span, slot, [&](int64_t begin) {
    float now[kRun], before[kRun], frozen[kRun];
    load_runs(logp, begin, span.length, aligned, stage, now);
    load_runs(old, begin, span.length, aligned, stage, before);
    load_runs(ref, begin, span.length, aligned, stage, frozen);
    const unsigned valid = valid_run(mask, begin + threadIdx.x % kWarp * kRun, span.length);
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      const bool is_valid = (valid >> k & 1u) != 0;
      const double l = is_valid ? now[k] : 0.0f, l_old = is_valid ? before[k] : 0.0f,
                   l_ref = is_valid ? frozen[k] : 0.0f;
      sums[0] += l - l_old;
      sums[1] += l - l_ref;
      sums[2] += is_valid ? 1.0 : 0.0;
    }
  });
  const double sum = warp_sums(sums);  // number l / 8 in lane l
  const int lane = threadIdx.x % kWarp;
  P3OParts& parts = in.parts[b];
  if (lane == 0) parts.log_ratio[slot] = sum;
  if (lane == 8) parts.ref_log_ratio[slot] = sum;
  if (lane == 16) parts.count[slot] = sum;
}

__device__ inline Response fold_row(const P3OInputs& in, int64_t b, const PairOptions& options) {
  const P3OParts& parts = in.parts[b];
  double log_ratio = 0.0, ref_log_ratio = 0.0, count = 0.0;
  for (int i = 0; i < kTiles; ++i) {
    log_ratio += parts.log_ratio[i];
    ref_log_ratio += parts.ref_log_ratio[i];
    count += parts.count[i];
  }
  return response(count > 0.0, in.scores[b], ref_log_ratio, log_ratio, options);
}

__device__ inline void spread_row(const P3OInputs& in, int64_t b, int slot, float* stage, float* grad) {
  const RowSpan span(in.rows, b);
  const bool aligned = span.aligned(in.rows, in.aligned);
  const uint8_t* mask = in.mask.row(in.rows, b);
  const float slope = in.slopes[b];
  for_tiles(span, slot, [&](int64_t begin) {
    const unsigned valid = valid_run(mask, begin + threadIdx.x % kWarp * kRun, span.length);
    float x[kRun];
#pragma unroll
    for (int k = 0; k < kRun; ++k) x[k] = (valid >> k & 1u) != 0 ? slope : 0.0f;
    if (!aligned) from_runs<kWarp>(stage, x);
    store_tile<kWarp>(grad + span.start, begin, span.length, aligned, x);
  });
}

static __global__ void __launch_bounds__(kRowThreads) p3o_loss_kernel(P3OInputs in, LossOutputs out) {
  __shared__ float stages[kStage];
  float* stage = team_stage<kWarp>(stages);
  PairOptions options = in.options;
  if (in.kl_coef != nullptr) options.kl_coef = *in.kl_coef;
  const int64_t first = blockIdx.x * in.group_size;
  const int64_t size = first < in.rows.count ? in.group_size : 0;
  for (int64_t k = 0; k < size; ++k) sum_row(in, first + k, tile_slot(k), stage);
  __syncthreads();
  for (int64_t k = threadIdx.x; k < size; k += kRowThreads) in.responses[first + k] = fold_row(in, first + k, options);
  __syncthreads();
  double sums[kP3OSumsPadded] = {};
  double ratio_max = 0.0;
  for (int64_t k = threadIdx.x; k < size; k += kRowThreads) {
    const Response* group = in.responses + first;
    in.slopes[first + k] = static_cast<float>(response_terms(group, size, k, options, sums));
    if (group[k].has_tokens) ratio_max = max_or_nan(ratio_max, group[k].ratio);
  }
  __syncthreads();
  if (out.grad != nullptr) {
    for (int64_t k = 0; k < size; ++k) spread_row(in, first + k, tile_slot(k), stage, out.grad);
  }
  __shared__ double of_warps[kTiles][P3OLoss::Partials::kCount];
  constexpr int kLanes = kWarp / kP3OSumsPadded;  // that hold the same sum
  const int number = threadIdx.x % kWarp / kLanes;
  auto& mine = of_warps[threadIdx.x / kWarp];
  const double sum = warp_sums(sums);
  if (number < P3OSum::kCount) mine[number] = sum;
  mine[P3OLoss::Partials::kMax] = warp_max_or_nan(ratio_max);
  __syncthreads();
  if (threadIdx.x < kWarp) join_warps<P3OLoss::Partials>(of_warps, out.partials);
}

}  // namespace ppo
