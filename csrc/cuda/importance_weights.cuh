// Importance weights on the device: a block per row finds what a row decides by, blocks of tokens write weights and
// kept tokens, and one block folds their sums into the statistics.
#pragma once

#include "cuda/loss.cuh"
#include "math/importance_weights.h"

namespace ppo {

struct ImportanceInputs {
  TokenRows rows;
  TokenInput<float> logprobs, rollout_logprobs;
  TokenInput<float> row_ratio, row_estimate;  // absent where every token decides for itself
  TokenInput<uint8_t> mask;
  ImportanceOptions<float> options;
  uint8_t* keep;
  bool needs_row;
};

// As a loss, whose gradient is the weights and whose total nobody wants.
struct ImportanceLoss {
  using Partials = Columns<ImportanceSum::kHigh, ImportanceSum::kCount - ImportanceSum::kHigh, 0, true>;
  static constexpr int kTotal = ImportanceSum::kWeight;

  __device__ static double count(const double* totals) { return totals[Partials::kTokens]; }
  __device__ static void stats(const double* totals, float* out) {
    importance_stats(totals, totals[Partials::kMax], out);
  }
};

using ImportanceCounts = WarpCounts<ImportanceLoss::Partials::kCounts>;

struct ImportanceTokens {
  float logp[kTokens], rollout[kTokens], ratio[kTokens], estimate[kTokens];
  uint32_t mask;
  uint8_t keep[kTokens];

  template <bool kWhole, bool kFlat>
  __device__ void load(const ImportanceInputs& in, int g) {
    const TokenVector tokens(in.rows, first_token(g), !kFlat && in.needs_row);
    mask = load_mask<kWhole>(in.mask, tokens);
    load_tokens<kWhole>(in.logprobs, tokens, 0.0f, logp);
    load_tokens<kWhole>(in.rollout_logprobs, tokens, 0.0f, rollout);
    if constexpr (kFlat) return;
    load_tokens<kWhole>(in.row_ratio, tokens, 1.0f, ratio);
    load_tokens<kWhole>(in.row_estimate, tokens, 0.0f, estimate);
  }
};

// Adds what a vector adds to the sums, and to those of the weights and of their squares; its weights take the place of
// logp.
template <bool kFlat>
__device__ void importance_tokens(const ImportanceInputs& in, ImportanceTokens& t, float (&sums)[8],
                                  double (&weights)[2], ImportanceCounts& counts, float& max) {
  const ImportanceOptions<float>& o = in.options;
#pragma unroll
  for (int k = 0; k < kTokens; ++k) {
    const float logp = t.logp[k], rollout = t.rollout[k];
    t.logp[k] = 0.0f, t.keep[k] = 0;
    if (!is_valid(t.mask, k)) continue;
    const DivergenceTerm<float> apart = divergence_term(logp, rollout, o.log_ratio_clamp);
    const float own = rejection_estimate(o.reject, apart.log_ratio, apart.k3);
    const float ratio = kFlat || o.level == WeightLevel::kToken ? apart.ratio : t.ratio[k];
    const float estimate = kFlat || o.reject_level == RejectLevel::kToken ? own : t.estimate[k];
    const WeightTerm<float> term = weight_term(ratio, estimate, o);
    t.logp[k] = term.weight;
    t.keep[k] = term.keep != 0.0f;
    max = max_or_nan(max, ratio);
    sums[ImportanceSum::kLogRatio] += apart.log_ratio;
    sums[ImportanceSum::kK3] += apart.k3;
    sums[ImportanceSum::kChi2] += apart.chi2;
    sums[ImportanceSum::kLogp] += logp;
    sums[ImportanceSum::kRollout] += rollout;
    const double weight = term.weight;  // its square may be beyond what a float holds
    weights[0] += weight, weights[1] += weight * weight;
    const float flags[] = {term.high, term.low, 1.0f - term.keep, 1.0f};
#pragma unroll
    for (int i = 0; i < ImportanceLoss::Partials::kCounts; ++i) counts.add(i, flags[i] != 0.0f);
  }
}

__device__ inline void store_keep(uint8_t* out, int64_t first, int64_t total, const uint8_t (&keep)[kTokens]) {
  uint8_t* to = out + first;
  if (first + kTokens <= total && aligned_tokens(to)) {
    *reinterpret_cast<TokensOf<uint8_t>*>(to) = {keep[0], keep[1], keep[2], keep[3]};
    return;
  }
#pragma unroll
  for (int k = 0; k < kTokens; ++k) {
    if (first + k < total) to[k] = keep[k];
  }
}

// kFlat: every input has its tokens in flat, aligned vectors, and no row decides.
template <bool kFlat>
__global__ void __launch_bounds__(kLossThreads, kFlat ? 4 : 2)
    importance_weights_kernel(ImportanceInputs in, LossOutputs out) {
  ImportanceTokens tokens[kLossVectors];
  load_block<kFlat>(in.rows, [&](auto whole) {
#pragma unroll
    for (int g = 0; g < kLossVectors; ++g) tokens[g].template load<whole(), kFlat>(in, g);
  });
  float sums[8] = {}, max = 0.0f;
  double weights[2] = {};
  ImportanceCounts counts;
#pragma unroll
  for (int g = 0; g < kLossVectors; ++g) {
    importance_tokens<kFlat>(in, tokens[g], sums, weights, counts, max);
    store_tokens(out.grad, first_token(g), in.rows.total, tokens[g].logp);
    store_keep(in.keep, first_token(g), in.rows.total, tokens[g].keep);
  }
  double wide[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) wide[i] = sums[i];
  wide[ImportanceSum::kWeight] = weights[0], wide[ImportanceSum::kSquaredWeight] = weights[1];
  write_partials<ImportanceLoss::Partials, kLossThreads>(wide, counts, warp_max_or_nan(max), out.partials,
                                                         [](int, double) { return 0.0; });
}

constexpr int kImportanceRowSumsPadded = 4;
static_assert(ImportanceRowSum::kCount <= kImportanceRowSumsPadded);

static __global__ void __launch_bounds__(kLossThreads)
    importance_rows_kernel(ImportanceInputs in, float* ratios, float* estimates) {
  __shared__ double parts[kLossWarps][ImportanceRowSum::kCount], maxima[kLossWarps];
  const ImportanceOptions<float>& o = in.options;
  const int64_t b = blockIdx.x, start = in.rows.start(b), end = start + in.rows.size(b);
  double sums[kImportanceRowSumsPadded] = {}, max = 0.0;
  for (int64_t i = start + threadIdx.x; i < end; i += kLossThreads) {
    if (in.mask.data != nullptr && in.mask.at(i, b) == 0) continue;
    const float logp = in.logprobs.at(i, b), rollout = in.rollout_logprobs.at(i, b);
    const DivergenceTerm<float> apart = divergence_term(logp, rollout, o.log_ratio_clamp);
    const double estimate = rejection_estimate(o.reject, apart.log_ratio, apart.k3);
    sums[ImportanceRowSum::kTokens] += 1.0;
    sums[ImportanceRowSum::kLogRatio] += static_cast<double>(logp) - static_cast<double>(rollout);
    sums[ImportanceRowSum::kEstimate] += estimate;
    max = max_or_nan(max, estimate);
  }
  constexpr int kLanes = kWarp / kImportanceRowSumsPadded;  // that hold the same sum
  const double sum = warp_sums(sums), largest = warp_max_or_nan(max);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (lane % kLanes == 0 && lane / kLanes < ImportanceRowSum::kCount) parts[warp][lane / kLanes] = sum;
  if (lane == 0) maxima[warp] = largest;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double totals[ImportanceRowSum::kCount] = {}, of_all = 0.0;
  for (int w = 0; w < kLossWarps; ++w) {
#pragma unroll
    for (int i = 0; i < ImportanceRowSum::kCount; ++i) totals[i] += parts[w][i];
    of_all = max_or_nan(of_all, maxima[w]);
  }
  const RowImportance<float> row = row_importance(totals, of_all, o);
  ratios[b] = row.ratio, estimates[b] = row.estimate;
}

}  // namespace ppo
