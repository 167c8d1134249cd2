// What the losses share on the device: blocks of tokens, and sums over them in two launches. A block writes a column of
// partials, from what its warps know; the second launch, of one block, folds the columns of all blocks. No block waits
// for another one, and no counter has to be cleared.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/tokens.cuh"
#include "math/loss.h"

namespace ppo {

constexpr int kLossThreads = 256;
constexpr int kLossWarps = kLossThreads / kWarp;
constexpr int kLossVectors = 2;  // vectors of tokens that a thread keeps in registers
constexpr int64_t kLossTokens = int64_t{kLossThreads} * kLossVectors * kTokens;  // per block, whatever the batch
constexpr int kFoldThreads = 512;                                                // of the second launch

struct LossOutputs {
  float *loss, *stats, *grad, *inv_normalizer;  // grad is null unless asked for
  const double* normalizer;                     // null: the number of valid tokens
  double* partials;                             // [Columns::kCount][blocks]
};

// Where the thread's vector number g begins.
__device__ inline int64_t first_token(int g) {
  return blockIdx.x * kLossTokens + (int64_t{g} * kLossThreads + threadIdx.x) * kTokens;
}

// Calls load(whole): whether all inputs have all tokens of this block in flat, aligned vectors is a constant for it.
template <bool kFlat, class Load>
__device__ void load_block(const TokenRows& rows, const Load& load) {
  allow_dependent_launch();  // of the fold
  if (kFlat && (blockIdx.x + int64_t{1}) * kLossTokens <= rows.total) {
    load(std::true_type{});
  } else {
    load(std::false_type{});
  }
}

// What is known of a set of tokens, in this order: sums; counts, the last one of the valid tokens; and of each quantity
// whose moments are wanted the sum, the mean and the squared deviations from it; perhaps a maximum.
template <int kSums_, int kCounts_, int kMoments_, bool kHasMax_>
struct Columns {
  static constexpr int kSums = kSums_, kCounts = kCounts_, kMoments = kMoments_;
  static constexpr bool kHasMax = kHasMax_;
  static constexpr int kTokens = kSums + kCounts - 1, kTotals = kSums + kCounts, kMeans = kTotals + kMoments,
                       kSquares = kMeans + kMoments, kMax = kSquares + kMoments, kCount = kMax + kHasMax;
  static_assert(kCount <= kWarp);

  // The squared deviations of a whole from its mean, what a part of it adds.
  __device__ static double squares(double count, double mean, double own, double mean_of_whole) {
    const double step = mean - mean_of_whole;
    return count == 0.0 ? 0.0 : own + count * step * step;
  }
  __device__ static Moments moments(const double* columns, int i) {
    return {columns[kTokens], columns[kMeans + i], columns[kSquares + i]};
  }
};

// A column of a block's partials from those of its warps, by the lane of the first warp whose number it has.
template <class C, int kWarps>
__device__ void join_warps(const double (&parts)[kWarps][C::kCount], double* partials) {
  const int lane = threadIdx.x;
  double mine = 0.0;
  if (lane < C::kMeans || (C::kHasMax && lane == C::kMax)) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const double x = parts[w][lane];
      mine = lane < C::kMeans ? mine + x : max_or_nan(mine, x);
    }
  }
  const double count = __shfl_sync(kAllLanes, mine, C::kTokens);
#pragma unroll
  for (int i = 0; i < C::kMoments; ++i) {
    const double mean = mean_of(__shfl_sync(kAllLanes, mine, C::kTotals + i), count);
    if (lane == C::kMeans + i) mine = mean;
    if (lane != C::kSquares + i) continue;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      mine += C::squares(parts[w][C::kTokens], parts[w][C::kMeans + i], parts[w][C::kSquares + i], mean);
    }
  }
  if (lane < C::kCount) partials[lane * static_cast<int64_t>(gridDim.x) + blockIdx.x] = mine;
}

// A thread's sums become partials of its block. `sums` holds those of C, then those of the quantities with moments;
// squares(i, mean) is the sum of a thread's squared deviations of one of these from its warp's mean.
template <class C, int kThreads, int kPadded, class Squares>
__device__ void write_partials(const double (&sums)[kPadded], WarpCounts<C::kCounts> counts, double max,
                               double* partials, const Squares& squares) {
  static_assert(C::kSums + C::kMoments <= kPadded);
  __shared__ double parts[kThreads / kWarp][C::kCount];
  constexpr int kLanes = kWarp / kPadded;  // that hold the same sum
  const int lane = threadIdx.x % kWarp, number = lane / kLanes;
  auto& mine = parts[threadIdx.x / kWarp];
  const double sum = warp_sums(sums);
  if (lane % kLanes == 0 && number < C::kSums + C::kMoments)
    mine[number < C::kSums ? number : C::kCounts + number] = sum;
  counts.sum();
#pragma unroll
  for (int i = 0; i < C::kCounts; ++i) {
    if (lane == 0) mine[C::kSums + i] = counts[i];
  }
#pragma unroll
  for (int i = 0; i < C::kMoments; ++i) {
    const double mean = mean_of(__shfl_sync(kAllLanes, sum, (C::kSums + i) * kLanes), counts[C::kCounts - 1]);
    const double own = warp_sum(squares(i, mean));
    if (lane == 0) mine[C::kMeans + i] = mean, mine[C::kSquares + i] = own;
  }
  if (C::kHasMax && lane == 0) mine[C::kCount - 1] = max;
  __syncthreads();
  if (threadIdx.x < kWarp) join_warps<C>(parts, partials);
}

// The columns of all blocks, folded by one block for every thread to read: a warp for each, in an order that the number
// of blocks decides, then all of them for the squared deviations.
template <class C, int kThreads>
__device__ const double* fold_columns(const double* partials, int64_t blocks) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ double totals[C::kCount], squares[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int c = warp; c < C::kCount; c += kWarps) {
    if (c >= C::kMeans && c < C::kMax) continue;
    const double* column = partials + c * blocks;
    double mine = 0.0;
#pragma unroll 8
    for (int64_t b = lane; b < blocks; b += kWarp)
      mine = c < C::kMeans ? mine + column[b] : max_or_nan(mine, column[b]);
    mine = c < C::kMeans ? warp_sum(mine) : warp_max_or_nan(mine);
    if (lane == 0) totals[c] = mine;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < C::kMoments; ++i) {
    const double mean = mean_of(totals[C::kTotals + i], totals[C::kTokens]);
    const double *count = partials + C::kTokens * blocks, *means = partials + (C::kMeans + i) * blocks,
                 *own = partials + (C::kSquares + i) * blocks;
    double mine = 0.0;
    for (int64_t b = threadIdx.x; b < blocks; b += kThreads) mine += C::squares(count[b], means[b], own[b], mean);
    mine = warp_sum(mine);
    if (lane == 0) squares[warp] = mine;
    __syncthreads();
    if (threadIdx.x == 0) {
      mine = 0.0;
      for (int w = 0; w < kWarps; ++w) mine += squares[w];
      totals[C::kMeans + i] = mean, totals[C::kSquares + i] = mine;
    }
    __syncthreads();
  }
  return totals;
}

// The second launch of a loss: the partials become the loss and its statistics.
template <class Loss>
__global__ void __launch_bounds__(kFoldThreads) loss_fold_kernel(LossOutputs out, int64_t blocks) {
  wait_for_primary();
  const double* totals = fold_columns<typename Loss::Partials, kFoldThreads>(out.partials, blocks);
  if (threadIdx.x == 0) {
    const double normalizer = out.normalizer != nullptr ? *out.normalizer : Loss::count(totals);
    const NormalizedLoss result = normalize_loss(totals[Loss::kTotal], normalizer);
    *out.loss = static_cast<float>(result.loss);
    *out.inv_normalizer = static_cast<float>(result.inv_normalizer);
  }
  if (threadIdx.x == kWarp) Loss::stats(totals, out.stats);  // at the same time, by another warp
}

}  // namespace ppo
