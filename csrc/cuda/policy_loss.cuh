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

// A block's sums are those of PolicySum and two more, padded to a power of two for block_sums().
struct PolicyBlockSum {
  enum { kTokens = PolicySum::kCount, kExcess, kCount, kPadded = 16 };
};
// Its partials: those of PolicySum, then the moments and the maximum of ratio - 1.
struct PolicyPartial {
  enum { kTokens = PolicySum::kCount, kExcessMean, kExcessM2, kRatioMax, kCount };
};

// A vector of tokens: its sums, gradients, and the excesses of its valid tokens over a ratio of 1.
template <bool kHasRef, KlEstimator kEstimator>
__device__ void policy_tokens(const PolicyInputs& in, const TokenVector& tokens, float kl_coef,
                              float (&sums)[PolicyBlockSum::kCount], float (&excess)[kTokens], bool (&valid)[kTokens],
                              float (&grad)[kTokens]) {
  float logp[kTokens], old[kTokens], advantage[kTokens], weight[kTokens], row_weight[kTokens], ref[kTokens];
  uint8_t mask[kTokens];
  load_tokens(in.logprobs, tokens, 0.0f, logp);
  load_tokens(in.old_logprobs, tokens, 0.0f, old);
  load_tokens(in.advantages, tokens, 0.0f, advantage);
  load_tokens(in.mask, tokens, uint8_t{1}, mask);
  load_tokens(in.weights, tokens, 1.0f, weight);
  load_tokens(in.row_weight, tokens, 1.0f, row_weight);
  if constexpr (kHasRef) load_tokens(in.ref_logprobs, tokens, 0.0f, ref);
#pragma unroll
  for (int k = 0; k < kTokens; ++k) {
    valid[k] = tokens.claimed[k] && mask[k] != 0;
    grad[k] = excess[k] = 0.0f;
    if (!valid[k]) continue;
    const PolicyTerm<float> term = policy_term(logp[k], old[k], advantage[k], weight[k], in.options);
    float loss = term.loss, slope = term.grad;
    if constexpr (kHasRef) {
      const KlTerm<float> kl = kl_term<kEstimator>(logp[k], ref[k], in.kl_log_clamp, in.kl_clamp);
      sums[PolicySum::kRefKl] += kl.value;
      loss += scaled_or_off(kl_coef, kl.value);
      slope += scaled_or_off(kl_coef, kl.grad);
    }
    sums[PolicySum::kLoss] += loss * row_weight[k];
    grad[k] = slope * row_weight[k];
    excess[k] = term.ratio_minus_1;
    sums[PolicySum::kLogRatio] += term.log_ratio;
    sums[PolicySum::kSquaredLogRatio] += term.log_ratio * term.log_ratio;
    sums[PolicySum::kK3] += term.k3;
    sums[PolicySum::kClippedHigh] += term.clipped_high;
    sums[PolicySum::kClippedLow] += term.clipped_low;
    sums[PolicySum::kDualClipped] += term.dual_clipped;
    sums[PolicySum::kClamped] += term.clamped;
    sums[PolicyBlockSum::kTokens] += 1.0f;
    sums[PolicyBlockSum::kExcess] += term.ratio_minus_1;
  }
}

// The last block's work: the partials of all blocks become the loss and its statistics.
__device__ inline void finish_policy_loss(const LossOutputs& out, unsigned blocks) {
  const auto part = [&](int i) { return partials_of(out, i, blocks); };
  double totals[PolicyBlockSum::kPadded] = {};
#pragma unroll
  for (int i = 0; i < PolicySum::kCount; ++i) totals[i] = fold_sum(part(i), blocks);
  const float ratio_max = block_max_or_nan(static_cast<float>(fold_max(part(PolicyPartial::kRatioMax), blocks, 0.0)));
  const Moments excess = fold_moments(part(PolicyPartial::kTokens), part(PolicyPartial::kExcessMean),
                                      part(PolicyPartial::kExcessM2), blocks);
  const double* sums = block_sums<PolicyBlockSum::kPadded, kLossThreads>(totals);
  if (threadIdx.x != 0) return;
  finish_loss(out, sums[PolicySum::kLoss], excess.count);
  policy_stats<true>(sums, excess, ratio_max, out.stats);
}

template <bool kHasRef, KlEstimator kEstimator>
__global__ void __launch_bounds__(kLossThreads, 2) policy_loss_kernel(PolicyInputs in, LossOutputs out) {
  const float kl_coef = in.kl_coef_tensor != nullptr ? static_cast<float>(*in.kl_coef_tensor) : in.kl_coef;
  float excess[kLossVectors][kTokens], sums[PolicyBlockSum::kCount] = {};
  bool valid[kLossVectors][kTokens];
  float ratio_max = -1.0f;
#pragma unroll
  for (int g = 0; g < kLossVectors; ++g) {
    const TokenVector tokens(in.rows, first_token(g), in.needs_row);
    float grad[kTokens];
    policy_tokens<kHasRef, kEstimator>(in, tokens, kl_coef, sums, excess[g], valid[g], grad);
    if (out.grad != nullptr) store_tokens(out.grad, tokens, in.rows.total, grad);
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      if (valid[g][k]) ratio_max = max_or_nan(ratio_max, excess[g][k]);
    }
  }
  double wide[PolicyBlockSum::kPadded] = {};
#pragma unroll
  for (int i = 0; i < PolicyBlockSum::kCount; ++i) wide[i] = sums[i];
  ratio_max = block_max_or_nan(ratio_max) + 1.0f;
  const double* block = block_sums<PolicyBlockSum::kPadded, kLossThreads>(wide);
  const double mine = threadIdx.x <= PolicyBlockSum::kTokens ? block[threadIdx.x] : 0.0,
               count = block[PolicyBlockSum::kTokens];
  const double mean = mean_of(block[PolicyBlockSum::kExcess], count);
  double squares[1] = {};
#pragma unroll
  for (int g = 0; g < kLossVectors; ++g) {
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      const double deviation = valid[g][k] ? excess[g][k] - mean : 0.0;
      squares[0] += deviation * deviation;
    }
  }
  const double m2 = block_sums<1, kLossThreads>(squares)[0];
  const unsigned blocks = gridDim.x;
  const auto partial = [&](int i) { return out.partials + blockIdx.x + i * static_cast<int64_t>(blocks); };
  if (threadIdx.x <= PolicyBlockSum::kTokens) *partial(threadIdx.x) = mine;
  if (threadIdx.x == 0) {
    *partial(PolicyPartial::kExcessMean) = mean;
    *partial(PolicyPartial::kExcessM2) = m2;
    *partial(PolicyPartial::kRatioMax) = ratio_max;
  }
  if (is_last_block(out.ticket, blocks)) finish_policy_loss(out, blocks);
}

}  // namespace ppo
