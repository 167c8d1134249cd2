// The clipped policy loss on the device: loss, statistics and gradient from one launch.
#pragma once

#include "cuda/loss.cuh"
#include "math/policy_loss.h"

namespace ppo {

struct PolicyInputs {
  TokenRows rows;
  TokenInput<float> logprobs, old_logprobs, advantages, weights, ref_logprobs, row_weight;
  TokenInput<uint8_t> mask;
  PolicyOptions<float> options;
  const double* kl_coef_tensor;  // takes the place of kl_coef where it is given
  float kl_coef, kl_log_clamp, kl_clamp;
  bool needs_row;
};

// What a block sums, in this order; then the moments of ratio - 1 and its maximum.
enum PolicySum {
  kSumLoss,
  kSumD,
  kSumD2,
  kSumK3,
  kSumRefKl,
  kSumHigh,
  kSumLow,
  kSumDual,
  kSumClamped,
  kSumCount,
  kSumExcess,
  kPolicySums
};
constexpr int kPolicySumsPadded = 16;
enum PolicyPartial {
  kExcessMean = kSumExcess,
  kExcessM2,
  kRatioMax,
  kPolicyPartials
};  // after the sums before kSumExcess

// One group of tokens: its sums, gradients, and the excesses of its valid tokens over a ratio of 1.
template <bool kHasRef, KlEstimator kEstimator>
__device__ void policy_group(const PolicyInputs& in, const TokenGroup& group, float kl_coef, float (&sums)[kPolicySums],
                             float (&excess)[kTokens], bool (&valid)[kTokens], float (&grad)[kTokens]) {
  float logp[kTokens], old[kTokens], advantage[kTokens], weight[kTokens], row_weight[kTokens], ref[kTokens];
  uint8_t mask[kTokens];
  load_tokens(in.logprobs, group, 0.0f, logp);
  load_tokens(in.old_logprobs, group, 0.0f, old);
  load_tokens(in.advantages, group, 0.0f, advantage);
  load_tokens(in.mask, group, uint8_t{1}, mask);
  load_tokens(in.weights, group, 1.0f, weight);
  load_tokens(in.row_weight, group, 1.0f, row_weight);
  if constexpr (kHasRef) load_tokens(in.ref_logprobs, group, 0.0f, ref);
#pragma unroll
  for (int k = 0; k < kTokens; ++k) {
    valid[k] = group.claimed[k] && mask[k] != 0;
    grad[k] = excess[k] = 0.0f;
    if (!valid[k]) continue;
    const PolicyTerm<float> term = policy_term(logp[k], old[k], advantage[k], weight[k], in.options);
    float loss = term.loss, slope = term.grad;
    if constexpr (kHasRef) {
      const KlTerm<float> kl = kl_term<kEstimator>(logp[k], ref[k], in.kl_log_clamp, in.kl_clamp);
      sums[kSumRefKl] += kl.value;
      loss += kl_coef * kl.value;
      slope += kl_coef * kl.grad;
    }
    sums[kSumLoss] += loss * row_weight[k];
    grad[k] = slope * row_weight[k];
    excess[k] = term.ratio_minus_1;
    sums[kSumD] += term.d;
    sums[kSumD2] += term.d * term.d;
    sums[kSumK3] += term.k3;
    sums[kSumHigh] += term.high;
    sums[kSumLow] += term.low;
    sums[kSumDual] += term.dual;
    sums[kSumClamped] += term.clamped;
    sums[kSumCount] += 1.0f;
    sums[kSumExcess] += term.ratio_minus_1;
  }
}

// The last block's work: the partials of all blocks become the loss and its statistics.
__device__ inline void finish_policy_loss(const LossOutputs& out, unsigned blocks) {
  const auto part = [&](int i) { return out.partials + i * static_cast<int64_t>(blocks); };
  double totals[kPolicySumsPadded] = {};
#pragma unroll
  for (int i = 0; i < kSumCount; ++i) totals[i] = fold_sum(part(i), blocks);
  float ratio_max = 0.0f;
  for (unsigned b = threadIdx.x; b < blocks; b += kLossThreads) {
    const float x = static_cast<float>(__ldcg(part(kRatioMax) + b));
    ratio_max = x != x ? x : (x > ratio_max ? x : ratio_max);
  }
  ratio_max = block_max_or_nan(ratio_max);
  const Moments excess = fold_moments(part(kSumCount), part(kExcessMean), part(kExcessM2), blocks);
  const double* sums = block_sums<kPolicySumsPadded, kLossThreads>(totals);
  if (threadIdx.x != 0) return;
  const double n = excess.count;
  finish_loss(out, sums[kSumLoss], n);
  const double inverse = n > 0.0 ? 1.0 / n : 0.0;
  const auto put = [&](int i, double x) { out.stats[i] = static_cast<float>(n > 0.0 ? x : 0.0); };
  put(0, -sums[kSumD] * inverse);
  put(1, 0.5 * sums[kSumD2] * inverse);
  put(2, sums[kSumK3] * inverse);
  put(3, 1.0 + excess.mean);
  put(4, excess.m2 * inverse);
  put(5, ratio_max);
  put(6, sums[kSumHigh] * inverse);
  put(7, sums[kSumLow] * inverse);
  put(8, sums[kSumDual] * inverse);
  put(9, sums[kSumRefKl] * inverse);
  put(10, sums[kSumClamped] * inverse);
  out.stats[11] = static_cast<float>(n);
}

template <bool kHasRef, KlEstimator kEstimator>
__global__ void __launch_bounds__(kLossThreads, 2) policy_loss_kernel(PolicyInputs in, LossOutputs out) {
  const float kl_coef = in.kl_coef_tensor != nullptr ? static_cast<float>(*in.kl_coef_tensor) : in.kl_coef;
  float excess[kLossGroups][kTokens], sums[kPolicySums] = {};
  bool valid[kLossGroups][kTokens];
  float ratio_max = -1.0f;
#pragma unroll
  for (int g = 0; g < kLossGroups; ++g) {
    const int64_t first = blockIdx.x * kLossTokens + (int64_t{g} * kLossThreads + threadIdx.x) * kTokens;
    const TokenGroup group(in.rows, first, in.needs_row);
    float grad[kTokens];
    policy_group<kHasRef, kEstimator>(in, group, kl_coef, sums, excess[g], valid[g], grad);
    if (out.grad != nullptr) store_tokens(out.grad, group, in.rows.total, grad);
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      if (valid[g][k] && !(excess[g][k] <= ratio_max)) ratio_max = ratio_max != ratio_max ? ratio_max : excess[g][k];
    }
  }
  double wide[kPolicySumsPadded] = {};
#pragma unroll
  for (int i = 0; i < kPolicySums; ++i) wide[i] = sums[i];
  ratio_max = block_max_or_nan(ratio_max) + 1.0f;
  const double* block = block_sums<kPolicySumsPadded, kLossThreads>(wide);
  const double mine = threadIdx.x < kSumExcess ? block[threadIdx.x] : 0.0, count = block[kSumCount];
  const double mean = count > 0.0 ? block[kSumExcess] / count : 0.0;
  double squares[1] = {};
#pragma unroll
  for (int g = 0; g < kLossGroups; ++g) {
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      const double deviation = valid[g][k] ? excess[g][k] - mean : 0.0;
      squares[0] += deviation * deviation;
    }
  }
  const double m2 = block_sums<1, kLossThreads>(squares)[0];
  const unsigned blocks = gridDim.x;
  double* partial = out.partials + blockIdx.x;
  if (threadIdx.x < kSumExcess) partial[threadIdx.x * static_cast<int64_t>(blocks)] = mine;
  if (threadIdx.x == 0) {
    partial[kExcessMean * static_cast<int64_t>(blocks)] = mean;
    partial[kExcessM2 * static_cast<int64_t>(blocks)] = m2;
    partial[kRatioMax * static_cast<int64_t>(blocks)] = ratio_max;
  }
  if (is_last_block(out.ticket, blocks)) finish_policy_loss(out, blocks);
}

}  // namespace ppo
