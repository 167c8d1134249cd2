// Sums over warps, blocks and launches, in an order that the shape alone decides.
#pragma once

#include "cuda/dependent_launch.cuh"
#include "math/loss.h"
#include "math/moments.h"

namespace ppo {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = ~0u;

// K sums over a warp at once: each step halves the values a lane is responsible for, 16 shuffles instead of 80 for
// K = 16. Lane l gets the sum number l / (32 / K). (A recursion, because loops like this one are not unrolled.)
template <int K, int kBit = kWarp / 2>
__device__ double warp_sums(const double (&v)[K]) {
  static_assert(K <= kWarp && (K & (K - 1)) == 0);
  if constexpr (K > 1) {
    const bool upper = (threadIdx.x & kBit) != 0;
    double halves[K / 2];
#pragma unroll
    for (int i = 0; i < K / 2; ++i) {
      const double keep = upper ? v[i + K / 2] : v[i], give = upper ? v[i] : v[i + K / 2];
      halves[i] = keep + __shfl_xor_sync(kAllLanes, give, kBit);
    }
    return warp_sums<K / 2, kBit / 2>(halves);
  } else if constexpr (kBit > 0) {
    const double sum[1] = {v[0] + __shfl_xor_sync(kAllLanes, v[0], kBit)};
    return warp_sums<1, kBit / 2>(sum);
  } else {
    return v[0];
  }
}

__device__ inline double warp_sum(double x) {
  const double all[1] = {x};
  return warp_sums(all);
}

// The largest value of a warp, NaN if one is NaN, in every lane.
template <class T>
__device__ T warp_max_or_nan(T x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes >= 1; lanes /= 2) x = max_or_nan(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}

// Counts of what the lanes of a warp have, of each at most 1023 in all: three share a word.
template <int kCounts>
struct WarpCounts {
  static constexpr int kPerWord = 3, kBits = 10, kWords = (kCounts + kPerWord - 1) / kPerWord;
  unsigned words[kWords] = {};

  __device__ void add(int i, bool yes) { words[i / kPerWord] += yes ? 1u << i % kPerWord * kBits : 0u; }
  __device__ void sum() {
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = __reduce_add_sync(kAllLanes, words[w]);
  }
  __device__ unsigned operator[](int i) const {
    return words[i / kPerWord] >> i % kPerWord * kBits & ((1u << kBits) - 1);
  }
};

// Whether any thread of the block says so.
template <int kThreads>
__device__ bool block_any(bool mine) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ bool parts[kWarps];
  const bool any_of_warp = __ballot_sync(kAllLanes, mine) != 0;
  __syncthreads();  // the answers of the call before have been read
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = any_of_warp;
  __syncthreads();
  bool any = false;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) any |= parts[w];
  return any;
}

}  // namespace ppo
