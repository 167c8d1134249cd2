// The clipped policy loss on the device: the gradient and partial sums from one launch, the loss and
// its statistics from a second one.
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
  int64_t kl_estimator;
  float kl_coef, kl_log_clamp, kl_clamp;
  bool needs_row;
};

// The sums of PolicySum, of which the last four are counts, as is the number of tokens; the moments of ratio - 1 and
// the largest ratio.
struct PolicyLoss {
  using Partials = Columns<PolicySum::kClippedHigh, PolicySum::kCount - PolicySum::kClippedHigh + 1, 1, true>;
  static constexpr int kTotal = PolicySum::kLoss;

  __device__ static double count(const double* totals) { return totals[Partials::kTokens]; }
  __device__ static void stats(const double* totals, float* out) {
    policy_stats<true>(totals, Partials::moments(totals, 0), totals[Partials::kMax], out);
  }
};

using PolicyCounts = WarpCounts<PolicyLoss::Partials::kCounts>;

// A vector of tokens: what is loaded of it.
struct PolicyTokens {
  float logp[kTokens], old[kTokens], advantage[kTokens], weight[kTokens], row_weight[kTokens], ref[kTokens];
  uint32_t mask;

  template <bool kWhole, bool kFlat, bool kHasRef>
  __device__ void load(const PolicyInputs& in, int g) {
    const TokenVector tokens(in.rows, first_token(g), !kFlat && in.needs_row);
    mask = load_mask<kWhole>(in.mask, tokens);
    load_tokens<kWhole>(in.logprobs, tokens, 0.0f, logp);
    load_tokens<kWhole>(in.old_logprobs, tokens, 0.0f, old);
    load_tokens<kWhole>(in.advantages, tokens, 0.0f, advantage);
    load_tokens<kWhole>(in.weights, tokens, 1.0f, weight);
    if constexpr (kHasRef) load_tokens<kWhole>(in.ref_logprobs, tokens, 0.0f, ref);
    load_tokens<kWhole>(kFlat ? TokenInput<float>{} : in.row_weight, tokens, 1.0f, row_weight);
  }
};

// Adds what a vector adds to the sums; its gradients take the place of logp, the excesses over a ratio of 1 of old.
template <bool kHasRef>
__device__ void policy_tokens(const PolicyInputs& in, PolicyTokens& t, float kl_coef, float (&sums)[PolicySum::kCount],
                              PolicyCounts& counts, float& max) {
#pragma unroll
  for (int k = 0; k < kTokens; ++k) {
    const float logp = t.logp[k], old = t.old[k];
    t.logp[k] = t.old[k] = 0.0f;
    if (!is_valid(t.mask, k)) continue;
    const PolicyTerm<float> term = policy_term(logp, old, t.advantage[k], t.weight[k], in.options);
    float loss = term.loss, slope = term.grad;
    if constexpr (kHasRef) {
      const KlTerm<float> kl = dispatch_estimator(in.kl_estimator, [&](auto estimator) {
        return kl_term<estimator()>(logp, t.ref[k], in.kl_log_clamp, in.kl_clamp);
      });
      sums[PolicySum::kRefKl] += kl.value;
      loss += scaled_or_off(kl_coef, kl.value);
      slope += scaled_or_off(kl_coef, kl.grad);
    }
    t.logp[k] = slope * t.row_weight[k];
    t.old[k] = term.ratio_minus_1;
    max = max_or_nan(max, term.ratio_minus_1);
    sums[PolicySum::kLoss] += loss * t.row_weight[k];
    sums[PolicySum::kLogRatio] += term.log_ratio;
    sums[PolicySum::kSquaredLogRatio] += term.log_ratio * term.log_ratio;
    sums[PolicySum::kK3] += term.k3;
    sums[PolicyLoss::Partials::kSums] += term.ratio_minus_1;
    const float flags[] = {term.clipped_high, term.clipped_low, term.dual_clipped, term.clamped, 1.0f};
#pragma unroll
    for (int i = 0; i < PolicyLoss::Partials::kCounts; ++i) counts.add(i, flags[i] != 0.0f);
  }
}

// kFlat: every input has its tokens in flat, aligned vectors, and none is one for each row.
template <bool kFlat, bool kHasRef>
__global__ void __launch_bounds__(kLossThreads, kFlat ? (kHasRef ? 4 - kFewerBlocks : 4) : 2)
    policy_loss_kernel(PolicyInputs in, LossOutputs out) {
  PolicyTokens tokens[kLossVectors];
  load_block<kFlat>(in.rows, [&](auto whole) {
#pragma unroll
    for (int g = 0; g < kLossVectors; ++g) tokens[g].template load<whole(), kFlat, kHasRef>(in, g);
  });
  const float kl_coef = in.kl_coef_tensor != nullptr ? static_cast<float>(*in.kl_coef_tensor) : in.kl_coef;
  float sums[PolicySum::kCount] = {}, max = -1.0f;
  PolicyCounts counts;
#pragma unroll
  for (int g = 0; g < kLossVectors; ++g) {
    policy_tokens<kHasRef>(in, tokens[g], kl_coef, sums, counts, max);
    if (out.grad != nullptr) store_tokens(out.grad, first_token(g), in.rows.total, tokens[g].logp);
  }
  double wide[8] = {};
#pragma unroll
  for (int i = 0; i <= PolicyLoss::Partials::kSums; ++i) wide[i] = sums[i];
  write_partials<PolicyLoss::Partials, kLossThreads>(
      wide, counts, warp_max_or_nan(max) + 1.0f, out.partials, [&](int, double mean) {
        double squares = 0.0;
#pragma unroll
        for (int g = 0; g < kLossVectors; ++g) {
#pragma unroll
          for (int k = 0; k < kTokens; ++k) {
            const double deviation = is_valid(tokens[g].mask, k) ? tokens[g].old[k] - mean : 0.0;
            squares += deviation * deviation;
          }
        }
        return squares;
      });
}

}  // namespace ppo
