// The policy loss on the device: the gradient and partial sums from one launch, the loss and its statistics from a
// second one. Where the ratio is the row's, a launch before them writes it.
#pragma once

#include "cuda/loss.cuh"
#include "math/policy_loss.h"

namespace ppo {

struct PolicyInputs {
  TokenRows rows;
  TokenInput<float> logprobs, old_logprobs, advantages, weights, ref_logprobs, row_weight;
  TokenInput<float> row_log_ratio, row_slope;  // RowRatio of each row; absent where the ratio is the token's
  TokenInput<uint8_t> mask;
  LevelOptions<float> options;
  const double* kl_coef_tensor;  // takes the place of kl_coef where it is given
  int64_t kl_estimator;
  float kl_coef, kl_log_clamp, kl_clamp;
  bool unbiased_kl, needs_row;
};

// The sums of PolicySum, of which the last four are counts, as is the number of tokens; the moments of ratio - 1 and
// the largest ratio.
template <bool kHasWeights>
struct PolicyLoss {
  using Partials = Columns<PolicySum::kClippedHigh, PolicySum::kCount - PolicySum::kClippedHigh + 1, 1, true>;
  static constexpr int kTotal = PolicySum::kLoss;

  __device__ static double count(const double* totals) { return totals[Partials::kTokens]; }
  __device__ static void stats(const double* totals, float* out) {
    policy_stats<true>(totals, Partials::moments(totals, 0), totals[Partials::kMax], kHasWeights, out);
  }
};

using PolicyPartials = PolicyLoss<true>::Partials;
using PolicyCounts = WarpCounts<PolicyPartials::kCounts>;

// What is added to the surrogate: nothing, an estimate of the KL divergence, or that times the ratio. Flat kernels have
// one for each, as the last needs registers that the second has not; in the others a flag chooses between the two.
enum Penalty { kNoPenalty, kKlPenalty, kAnyPenalty };

// A vector of tokens: what is loaded of it.
struct PolicyTokens {
  float logp[kTokens], old[kTokens], advantage[kTokens], weight[kTokens], row_weight[kTokens], ref[kTokens];
  float log_ratio[kTokens], slope[kTokens];  // of the row
  uint32_t mask;

  template <bool kWhole, bool kFlat, bool kWeighted, Penalty kPenalty>
  __device__ void load(const PolicyInputs& in, int g) {
    const TokenVector tokens(in.rows, first_token(g), !kFlat && in.needs_row);
    mask = load_mask<kWhole>(in.mask, tokens);
    load_tokens<kWhole>(in.logprobs, tokens, 0.0f, logp);
    load_tokens<kWhole>(in.old_logprobs, tokens, 0.0f, old);
    load_tokens<kWhole>(in.advantages, tokens, 0.0f, advantage);
    load_tokens<kWhole>(kWeighted ? in.weights : TokenInput<float>{}, tokens, 1.0f, weight);
    if constexpr (kPenalty != kNoPenalty) load_tokens<kWhole>(in.ref_logprobs, tokens, 0.0f, ref);
    load_tokens<kWhole>(kFlat ? TokenInput<float>{} : in.row_weight, tokens, 1.0f, row_weight);
    if constexpr (kFlat) return;
    load_tokens<kWhole>(in.row_log_ratio, tokens, 0.0f, log_ratio);
    load_tokens<kWhole>(in.row_slope, tokens, 0.0f, slope);
  }
};

// The term of token k of a vector, by its own ratio or by its row's.
template <Surrogate kSurrogate, bool kFlat>
__device__ PolicyTerm<float> term_of(const PolicyInputs& in, const PolicyTokens& t, int k) {
  const LevelOptions<float>& o = in.options;
  const bool in_row = !kFlat && !is_dppo(kSurrogate) && in.row_log_ratio.data != nullptr;
  const float raw = in_row ? t.log_ratio[k] : t.logp[k] - t.old[k];
  PolicyTerm<float> term = policy_term<kSurrogate>(t.logp[k], t.old[k], raw, t.advantage[k], t.weight[k], o.row);
  if (!in_row) return term;
  if (kSurrogate == Surrogate::kClip && o.level == RatioLevel::kGeometric)
    return term_in_row<true>(term, t.logp[k], t.old[k], t.advantage[k], t.slope[k], o);
  return term_in_row<false>(term, t.logp[k], t.old[k], t.advantage[k], t.slope[k], o);
}

// Adds what a vector adds to the sums; its gradients take the place of logp, the excesses over a ratio of 1 of old.
template <Surrogate kSurrogate, bool kFlat, bool kWeighted, Penalty kPenalty>
__device__ void policy_tokens(const PolicyInputs& in, PolicyTokens& t, float kl_coef, float (&sums)[PolicySum::kCount],
                              double (&weights)[2], PolicyCounts& counts, float& max) {
#pragma unroll
  for (int k = 0; k < kTokens; ++k) {
    const float logp = t.logp[k], old = t.old[k];
    const PolicyTerm<float> term = is_valid(t.mask, k) ? term_of<kSurrogate, kFlat>(in, t, k) : PolicyTerm<float>{};
    t.logp[k] = t.old[k] = 0.0f;
    if (!is_valid(t.mask, k)) continue;
    float loss = term.loss, slope = term.grad;
    if constexpr (kPenalty != kNoPenalty) {
      KlTerm<float> kl = dispatch_estimator(in.kl_estimator, [&](auto estimator) {
        return kl_term<estimator()>(logp, t.ref[k], in.kl_log_clamp, in.kl_clamp);
      });
      sums[PolicySum::kRefKl] += kl.value;
      if (kPenalty == kAnyPenalty && in.unbiased_kl) {
        const float clamp = in.options.row.log_ratio_clamp, ratio = exp_fast(term.log_ratio);
        kl = times_ratio(kl, ratio, clamp_gradient(logp - old, clamp, ratio));
      }
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
    if constexpr (kWeighted) {  // a square may be beyond what a float holds
      const double weight = t.weight[k];
      weights[0] += weight, weights[1] += weight * weight;
    }
    sums[PolicyPartials::kSums] += term.ratio_minus_1;
    const float flags[] = {term.clipped_high, term.clipped_low, term.dual_clipped, term.clamped, 1.0f};
#pragma unroll
    for (int i = 0; i < PolicyPartials::kCounts; ++i) counts.add(i, flags[i] != 0.0f);
  }
}

constexpr int kRowSumsPadded = 4;
static_assert(RowSum::kCount <= kRowSumsPadded);

// A block per row: the sums of its tokens, and from them the log-ratio and the slope of all of them.
template <Surrogate kSurrogate>
__global__ void __launch_bounds__(kLossThreads) policy_rows_kernel(PolicyInputs in, float* log_ratios, float* slopes) {
  __shared__ double parts[kLossWarps][RowSum::kCount];
  const int64_t b = blockIdx.x, start = in.rows.start(b), end = start + in.rows.size(b);
  double sums[kRowSumsPadded] = {};
  for (int64_t i = start + threadIdx.x; i < end; i += kLossThreads) {
    if (in.mask.data != nullptr && in.mask.at(i, b) == 0) continue;
    const float weight = in.weights.data != nullptr ? in.weights.at(i, b) : 1.0f;
    const RowTerm<float> term =
        row_term(in.logprobs.at(i, b), in.old_logprobs.at(i, b), in.advantages.at(i, b), weight, in.options);
    sums[RowSum::kTokens] += 1.0;
    sums[RowSum::kLogRatio] += term.log_ratio;
    sums[RowSum::kPositive] += term.positive;
    sums[RowSum::kNegative] += term.negative;
  }
  constexpr int kLanes = kWarp / kRowSumsPadded;  // that hold the same sum
  const double sum = warp_sums(sums);
  const int lane = threadIdx.x % kWarp;
  if (lane % kLanes == 0) parts[threadIdx.x / kWarp][lane / kLanes] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double totals[RowSum::kCount] = {};
#pragma unroll
  for (int i = 0; i < RowSum::kCount; ++i) {
    for (int w = 0; w < kLossWarps; ++w) totals[i] += parts[w][i];
  }
  const RowRatio<float> ratio = row_ratio<kSurrogate>(totals, in.options);
  log_ratios[b] = ratio.raw, slopes[b] = ratio.slope;
}

// How many blocks fit a multiprocessor without a spill.
constexpr int policy_blocks(bool flat, bool weighted, Penalty penalty, Surrogate surrogate) {
  if (!flat) return 2;
  if (weighted) return 3;
  if (penalty == kNoPenalty) return 4;
  return penalty == kKlPenalty && surrogate == Surrogate::kClip ? 4 - kFewerBlocks : 3;
}

// kFlat: every input has its tokens in flat, aligned vectors, and none is one for each row. kWeighted: there may be
// weights.
template <bool kFlat, bool kWeighted, Penalty kPenalty, Surrogate kSurrogate>
__global__ void __launch_bounds__(kLossThreads, policy_blocks(kFlat, kWeighted, kPenalty, kSurrogate))
    policy_loss_kernel(PolicyInputs in, LossOutputs out) {
  PolicyTokens tokens[kLossVectors];
  load_block<kFlat>(in.rows, [&](auto whole) {
#pragma unroll
    for (int g = 0; g < kLossVectors; ++g) tokens[g].template load<whole(), kFlat, kWeighted, kPenalty>(in, g);
  });
  const float kl_coef = in.kl_coef_tensor != nullptr ? static_cast<float>(*in.kl_coef_tensor) : in.kl_coef;
  float sums[PolicySum::kCount] = {}, max = -1.0f;
  double weights[2] = {};  // and their squares
  PolicyCounts counts;
#pragma unroll
  for (int g = 0; g < kLossVectors; ++g) {
    policy_tokens<kSurrogate, kFlat, kWeighted, kPenalty>(in, tokens[g], kl_coef, sums, weights, counts, max);
    if (out.grad != nullptr) store_tokens(out.grad, first_token(g), in.rows.total, tokens[g].logp);
  }
  double wide[8] = {};
#pragma unroll
  for (int i = 0; i <= PolicyPartials::kSums; ++i) wide[i] = sums[i];
  wide[PolicySum::kWeight] = weights[0], wide[PolicySum::kSquaredWeight] = weights[1];
  write_partials<PolicyPartials, kLossThreads>(
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
