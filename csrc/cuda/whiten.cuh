// Moments and whitening on the device.
//
// Each block takes chunks of the tensor by two passes over registers and writes the moments it has found as a column of
// partials. A second launch folds those, and a third one applies what it has found: in one launch every block would
// have to wait for all others.
#pragma once

#include "cuda/loss.cuh"
#include "math/whiten.h"

namespace ppo {

constexpr int kWhitenThreads = kLossThreads;
constexpr int kWhitenVectors = 4;
constexpr int64_t kWhitenChunk = int64_t{kWhitenThreads} * kWhitenVectors * kTokens;
constexpr int64_t kWhitenBlocks = 1024;  // at most, so that the fold is short

using WhitenPartials = Columns<0, 1, 1, false>;

struct WhitenInputs {
  TokenRows rows;  // all of the tensor as one
  TokenInput<float> x;
  TokenInput<uint8_t> mask;
  bool aligned;
};

inline __host__ __device__ int64_t whiten_chunks(int64_t total) { return (total + kWhitenChunk - 1) / kWhitenChunk; }

// A chunk in a block's registers.
struct WhitenChunk {
  float x[kWhitenVectors][kTokens];
  uint32_t mask[kWhitenVectors];

  __device__ static int64_t first(int64_t chunk, int g) {
    return chunk * kWhitenChunk + (int64_t{g} * kWhitenThreads + threadIdx.x) * kTokens;
  }
  template <bool kWhole>
  __device__ void load(const WhitenInputs& in, int64_t chunk) {
#pragma unroll
    for (int g = 0; g < kWhitenVectors; ++g) {
      const TokenVector tokens(in.rows, first(chunk, g), false);
      mask[g] = load_mask<kWhole>(in.mask, tokens);
      load_tokens<kWhole>(in.x, tokens, 0.0f, x[g]);
    }
  }
  __device__ WhitenChunk(const WhitenInputs& in, int64_t chunk) {
    if (in.aligned && (chunk + 1) * kWhitenChunk <= in.rows.total) {
      load<true>(in, chunk);
    } else {
      load<false>(in, chunk);
    }
  }
  // Calls f(x) for every valid token of the thread.
  template <class F>
  __device__ void for_valid(const F& f) const {
#pragma unroll
    for (int g = 0; g < kWhitenVectors; ++g) {
#pragma unroll
      for (int k = 0; k < kTokens; ++k) {
        if (is_valid(mask[g], k)) f(static_cast<double>(x[g][k]));
      }
    }
  }
};

// The moments of the chunk's tokens that a warp has, in every lane.
__device__ inline Moments warp_moments(const WhitenChunk& chunk) {
  double sum = 0.0, squares = 0.0;
  unsigned count = 0;
  chunk.for_valid([&](double x) { sum += x, ++count; });
  const double all = __reduce_add_sync(kAllLanes, count), mean = mean_of(warp_sum(sum), all);
  chunk.for_valid([&](double x) { squares += (x - mean) * (x - mean); });
  return {all, mean, warp_sum(squares)};
}

static __global__ void __launch_bounds__(kWhitenThreads, 3 - kFewerBlocks)
    moments_kernel(WhitenInputs in, double* partials) {
  __shared__ double parts[kWhitenThreads / kWarp][WhitenPartials::kCount];
  allow_dependent_launch();
  Moments mine;
  for (int64_t chunk = blockIdx.x; chunk < whiten_chunks(in.rows.total); chunk += gridDim.x) {
    mine.merge(warp_moments(WhitenChunk(in, chunk)));
  }
  const double all[] = {mine.count, mine.count * mine.mean, mine.mean, mine.m2};
#pragma unroll
  for (int i = 0; i < WhitenPartials::kCount; ++i) {
    if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp][i] = all[i];
  }
  __syncthreads();
  if (threadIdx.x < kWarp) join_warps<WhitenPartials>(parts, partials);
}

static __global__ void __launch_bounds__(kFoldThreads)
    moments_fold_kernel(const double* partials, int64_t blocks, bool followed, double* count, double* mean,
                        double* m2) {
  if (followed) allow_dependent_launch();
  wait_for_primary();
  const Moments all = WhitenPartials::moments(fold_columns<WhitenPartials, kFoldThreads>(partials, blocks), 0);
  if (threadIdx.x == 0) *count = all.count, *mean = all.mean, *m2 = all.m2;
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

static __global__ void __launch_bounds__(kWhitenThreads, 4)
    whiten_kernel(WhitenInputs in, const double* count, const double* mean, const double* m2, WhitenOptions options,
                  float* y) {
  __shared__ WhitenMap map;
  for (int64_t i = blockIdx.x; i < whiten_chunks(in.rows.total); i += gridDim.x) {
    const WhitenChunk chunk(in, i);
    if (i == blockIdx.x) {  // while the first chunk is on its way
      wait_for_primary();
      if (threadIdx.x == 0) map = whiten_map({*count, *mean, *m2}, options);
      __syncthreads();
    }
#pragma unroll
    for (int g = 0; g < kWhitenVectors; ++g) {
      float out[kTokens];
#pragma unroll
      for (int k = 0; k < kTokens; ++k) out[k] = is_valid(chunk.mask[g], k) ? map(chunk.x[g][k]) : 0.0f;
      store_tokens(y, WhitenChunk::first(i, g), in.rows.total, out);
    }
  }
}

}  // namespace ppo
