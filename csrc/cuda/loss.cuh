// What the losses share on the device: blocks of tokens, and how the last block ends a launch.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/tokens.cuh"
#include "math/loss.h"

namespace ppo {

constexpr int kLossThreads = 256;
constexpr int kLossVectors = 2;  // vectors of tokens that a thread keeps in registers
constexpr int64_t kLossTokens = int64_t{kLossThreads} * kLossVectors * kTokens;  // per block, whatever the batch

struct LossOutputs {
  float *loss, *stats, *grad, *inv_normalizer;  // grad is null unless asked for
  const double* normalizer;                     // null: the number of valid tokens
  double* partials;                             // [kPartials][blocks]
  unsigned* ticket;
};

__device__ inline void finish_loss(const LossOutputs& out, double total, double count) {
  const NormalizedLoss result = normalize_loss(total, out.normalizer != nullptr ? *out.normalizer : count);
  *out.loss = static_cast<float>(result.loss);
  *out.inv_normalizer = static_cast<float>(result.inv_normalizer);
}

// Where the thread's vector number g begins.
__device__ inline int64_t first_token(int g) {
  return blockIdx.x * kLossTokens + (int64_t{g} * kLossThreads + threadIdx.x) * kTokens;
}

// Where the partials number i of all blocks begin.
__device__ inline double* partials_of(const LossOutputs& out, int i, unsigned blocks) {
  return out.partials + i * static_cast<int64_t>(blocks);
}

// The moments of the blocks' partials, folded by one block: each thread takes blocks in order, then a fixed tree.
__device__ inline Moments fold_moments(const double* count, const double* mean, const double* m2, unsigned blocks) {
  Moments m;
  for (unsigned b = threadIdx.x; b < blocks; b += kLossThreads) {
    m.merge({__ldcg(count + b), __ldcg(mean + b), __ldcg(m2 + b)});
  }
  return block_moments<kLossThreads>(m);
}

__device__ inline double fold_sum(const double* parts, unsigned blocks) {
  double sum = 0.0;
  for (unsigned b = threadIdx.x; b < blocks; b += kLossThreads) sum += __ldcg(parts + b);
  return sum;
}

__device__ inline double fold_max(const double* parts, unsigned blocks, double least) {
  for (unsigned b = threadIdx.x; b < blocks; b += kLossThreads) least = max_or_nan(least, __ldcg(parts + b));
  return least;
}

// The largest value of a block, NaN if one is NaN, in every thread.
__device__ inline float block_max_or_nan(float x) {
  __shared__ float parts[kLossThreads / kWarp];
#pragma unroll
  for (int lanes = kWarp / 2; lanes >= 1; lanes /= 2) x = max_or_nan(x, __shfl_xor_sync(kAllLanes, x, lanes));
  __syncthreads();
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = x;
  __syncthreads();
  for (int w = 0; w < kLossThreads / kWarp; ++w) x = max_or_nan(x, parts[w]);
  return x;
}

}  // namespace ppo
