// The labels of a row of logits, by a warp: the one the row is read for, and what comes in for all of them.
#pragma once

#include "cuda/logits.cuh"
#include "cuda/reduce.cuh"
#include "math/labels.h"

namespace ppo {

// The likeliest label of a row, in every lane of a warp.
template <class T>
__device__ Anchor anchor_of(const RowLabels& labels, const T* x) {
  const auto logit_of = [x](int64_t label) { return static_cast<double>(to_compute(x[label])); };
  Anchor anchor;
  if (labels.count == 1) {
    anchor.merge(labels, 0, logit_of);
    return anchor;
  }
  for (int64_t k = threadIdx.x % kWarp; k < labels.count; k += kWarp) anchor.merge(labels, k, logit_of);
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    Anchor other;
    other.label = __shfl_xor_sync(kAllLanes, anchor.label, lanes);
    other.logit = __shfl_xor_sync(kAllLanes, anchor.logit, lanes);
    anchor.merge(other);
  }
  anchor.counts = __ballot_sync(kAllLanes, anchor.counts) != 0;
  anchor.outside = __ballot_sync(kAllLanes, anchor.outside) != 0;
  return anchor;
}

// What comes in for the labels of a row, together, in every lane of a warp; `g` is null for zeros.
__device__ inline LabelGradients gradients_of(const RowLabels& labels, const float* g) {
  LabelGradients all;
  if (labels.count == 1) {
    all.add(labels, 0, g != nullptr ? g[0] : 0.0);
    return all;
  }
  for (int64_t k = threadIdx.x % kWarp; k < labels.count; k += kWarp) all.add(labels, k, g != nullptr ? g[k] : 0.0);
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) all.sum += __shfl_xor_sync(kAllLanes, all.sum, lanes);
  all.any = __ballot_sync(kAllLanes, all.any) != 0;
  return all;
}

}  // namespace ppo
