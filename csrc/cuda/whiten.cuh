// Moments and whitening on the device.
//
// Each block takes chunks of the tensor by two passes over registers and merges their moments; the blocks' moments are
// folded in order, by the last block (moments) or by every block of the launch that applies them (whiten).
#pragma once

#include "cuda/loss.cuh"
#include "math/whiten.h"

namespace ppo {

constexpr int kWhitenThreads = kLossThreads;
constexpr int kWhitenVectors = 4;
constexpr int64_t kWhitenChunk = int64_t{kWhitenThreads} * kWhitenVectors * kTokens;
constexpr int64_t kWhitenBlocks = 1024;  // at most: every block that applies the moments reads those of all blocks

struct WhitenInputs {
  TokenRows rows;  // all of the tensor as one
  TokenInput<float> x;
  TokenInput<uint8_t> mask;
};

// Either the moments themselves, or those of `blocks` blocks: counts, then means, then sums of squares.
struct MomentSources {
  const double *count, *mean, *m2;
  unsigned blocks;
};

struct MomentOutputs {
  double *partials, *count, *mean, *m2;
  unsigned* ticket;  // null: the partials are all that is wanted
};

// A chunk in a block's registers.
struct WhitenChunk {
  float x[kWhitenVectors][kTokens];
  bool valid[kWhitenVectors][kTokens];

  __device__ static TokenVector tokens_of(const WhitenInputs& in, int64_t chunk, int g) {
    return {in.rows, chunk * kWhitenChunk + (int64_t{g} * kWhitenThreads + threadIdx.x) * kTokens, false};
  }
  __device__ WhitenChunk(const WhitenInputs& in, int64_t chunk) {
#pragma unroll
    for (int g = 0; g < kWhitenVectors; ++g) {
      const TokenVector tokens = tokens_of(in, chunk, g);
      uint8_t mask[kTokens];
      load_tokens(in.x, tokens, 0.0f, x[g]);
      load_tokens(in.mask, tokens, uint8_t{1}, mask);
#pragma unroll
      for (int k = 0; k < kTokens; ++k) valid[g][k] = tokens.claimed[k] && mask[k] != 0;
    }
  }
};

__device__ inline Moments chunk_moments(const WhitenChunk& chunk) {
  double sums[2] = {}, squares[1] = {};
#pragma unroll
  for (int g = 0; g < kWhitenVectors; ++g) {
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      sums[0] += chunk.valid[g][k] ? 1.0 : 0.0;
      sums[1] += chunk.valid[g][k] ? static_cast<double>(chunk.x[g][k]) : 0.0;
    }
  }
  const double* block = block_sums<2, kWhitenThreads>(sums);
  const double count = block[0], mean = mean_of(block[1], count);
#pragma unroll
  for (int g = 0; g < kWhitenVectors; ++g) {
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      const double d = chunk.valid[g][k] ? static_cast<double>(chunk.x[g][k]) - mean : 0.0;
      squares[0] += d * d;
    }
  }
  return {count, mean, block_sums<1, kWhitenThreads>(squares)[0]};
}

inline __host__ __device__ int64_t whiten_chunks(int64_t total) { return (total + kWhitenChunk - 1) / kWhitenChunk; }

static __global__ void __launch_bounds__(kWhitenThreads) moments_kernel(WhitenInputs in, MomentOutputs out) {
  Moments mine;
  for (int64_t chunk = blockIdx.x; chunk < whiten_chunks(in.rows.total); chunk += gridDim.x) {
    mine.merge(chunk_moments(WhitenChunk(in, chunk)));
  }
  const unsigned blocks = gridDim.x;
  if (threadIdx.x == 0) {
    out.partials[blockIdx.x] = mine.count;
    out.partials[blocks + blockIdx.x] = mine.mean;
    out.partials[2 * blocks + blockIdx.x] = mine.m2;
  }
  if (out.ticket == nullptr || !is_last_block(out.ticket, blocks)) return;
  const Moments all = fold_moments(out.partials, out.partials + blocks, out.partials + 2 * blocks, blocks);
  if (threadIdx.x == 0) *out.count = all.count, *out.mean = all.mean, *out.m2 = all.m2;
}

struct WhitenOptions {
  bool shift_mean, unbiased;
  double eps;
};

// y = ((x - mean) - mean_rest) scale + shift: a mean in two parts keeps x - mean exact to float32.
struct WhitenMap {
  float mean, mean_rest, scale, shift;

  __device__ float operator()(float x) const { return (x - mean - mean_rest) * scale + shift; }
};

__device__ inline WhitenMap whiten_map(const Moments& m, const WhitenOptions& o) {
  const double scale = whiten_scale(m, o.unbiased, o.eps);
  const auto mean = static_cast<float>(m.mean);
  return {mean, static_cast<float>(m.mean - static_cast<double>(mean)), static_cast<float>(scale),
          o.shift_mean ? 0.0f : mean};
}

static __global__ void __launch_bounds__(kWhitenThreads)
    whiten_kernel(WhitenInputs in, MomentSources from, WhitenOptions options, float* y) {
  __shared__ WhitenMap map;
  for (int64_t i = blockIdx.x; i < whiten_chunks(in.rows.total); i += gridDim.x) {
    const WhitenChunk chunk(in, i);
    if (i == blockIdx.x) {  // while the first chunk is on its way
      const Moments all = fold_moments(from.count, from.mean, from.m2, from.blocks);
      if (threadIdx.x == 0) map = whiten_map(all, options);
      __syncthreads();
    }
#pragma unroll
    for (int g = 0; g < kWhitenVectors; ++g) {
      float out[kTokens];
#pragma unroll
      for (int k = 0; k < kTokens; ++k) out[k] = chunk.valid[g][k] ? map(chunk.x[g][k]) : 0.0f;
      store_tokens(y, WhitenChunk::tokens_of(in, i, g), in.rows.total, out);
    }
  }
}

}  // namespace ppo
