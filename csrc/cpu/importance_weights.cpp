// Importance weights on CPU tensors: one pass, after one over the rows where a row decides.
#include "importance_weights.h"

#include "cpu/loss.h"

namespace ppo {
namespace {

struct ImportanceSums {
  double sums[ImportanceSum::kCount] = {};
  double ratio_max = 0.0;

  void add(const ImportanceSums& o) {
    for (int i = 0; i < ImportanceSum::kCount; ++i) sums[i] += o.sums[i];
    ratio_max = max_or_nan(ratio_max, o.ratio_max);
  }
};

struct RowSums {
  double sums[ImportanceRowSum::kCount] = {};
  double max = 0.0;

  void add(const RowSums& o) {
    for (int i = 0; i < ImportanceRowSum::kCount; ++i) sums[i] += o.sums[i];
    max = max_or_nan(max, o.max);
  }
};

template <class T>
struct ImportanceBlock {
  const T *logp, *rollout, *valid;
  int64_t n;
};

template <class T>
struct ImportanceScratch {
  T ratios[kBlock], log_ratios[kBlock], k3s[kBlock], estimates[kBlock], keeps[kBlock];
};

// How far the policies are apart on the tokens of a block.
template <class T>
PPO_CLONES ImportanceSums divergence_block(const ImportanceBlock<T>& in, T log_ratio_clamp, ImportanceScratch<T>& to) {
  T log_ratio = 0, k3 = 0, chi2 = 0, logps = 0, rollouts = 0, count = 0;
  const T *logp = in.logp, *rollout = in.rollout, *valid = in.valid;
#pragma omp simd reduction(+ : log_ratio, k3, chi2, logps, rollouts, count)
  for (int64_t i = 0; i < in.n; ++i) {
    const T l = logp[i], l_rollout = rollout[i], one = valid[i];
    const bool is_valid = one != T(0);
    const T now = is_valid ? l : T(0), before = is_valid ? l_rollout : T(0);
    const DivergenceTerm<T> term = divergence_term(now, before, log_ratio_clamp);
    to.ratios[i] = term.ratio;
    to.log_ratios[i] = term.log_ratio;
    to.k3s[i] = term.k3;
    log_ratio += term.log_ratio;
    k3 += term.k3;
    chi2 += term.chi2;
    logps += now;
    rollouts += before;
    count += one;
  }
  ImportanceSums all;
  all.sums[ImportanceSum::kLogRatio] = log_ratio;
  all.sums[ImportanceSum::kK3] = k3;
  all.sums[ImportanceSum::kChi2] = chi2;
  all.sums[ImportanceSum::kLogp] = logps;
  all.sums[ImportanceSum::kRollout] = rollouts;
  all.sums[ImportanceSum::kTokens] = count;
  return all;
}

template <class T>
PPO_CLONES void estimate_block(int64_t n, RejectBy by, ImportanceScratch<T>& to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to.estimates[i] = rejection_estimate(by, to.log_ratios[i], to.k3s[i]);
}

// Weights and kept tokens of a block, 0 where masked.
template <class T>
PPO_CLONES void weight_block(const ImportanceBlock<T>& in, const ImportanceOptions<T> options, T* weights,
                             ImportanceScratch<T>& to, ImportanceSums& all) {
  const ImportanceOptions<T> o = options;
  T high = 0, low = 0, rejected = 0, ratio_max = 0, ratios = 0;
  const T* valid = in.valid;
#pragma omp simd reduction(+ : high, low, rejected, ratios) reduction(max : ratio_max)
  for (int64_t i = 0; i < in.n; ++i) {
    const T one = valid[i], of_level = to.ratios[i], estimate = to.estimates[i];
    const bool is_valid = one != T(0);
    const WeightTerm<T> term = weight_term(of_level, estimate, o);
    const T ratio = is_valid ? of_level : T(0);
    weights[i] = is_valid ? term.weight : T(0);
    to.keeps[i] = is_valid ? term.keep : T(0);
    high += is_valid ? term.high : T(0);
    low += is_valid ? term.low : T(0);
    rejected += is_valid ? T(1) - term.keep : T(0);
    ratios += ratio;
    ratio_max = ratio > ratio_max ? ratio : ratio_max;
  }
  double weight = 0.0, squared = 0.0;  // their quotient is one of large, nearly equal numbers
#pragma omp simd reduction(+ : weight, squared)
  for (int64_t i = 0; i < in.n; ++i) {
    const double w = static_cast<double>(weights[i]);
    weight += w;
    squared += w * w;
  }
  all.sums[ImportanceSum::kWeight] = weight;
  all.sums[ImportanceSum::kSquaredWeight] = squared;
  all.sums[ImportanceSum::kHigh] = high;
  all.sums[ImportanceSum::kLow] = low;
  all.sums[ImportanceSum::kRejected] = rejected;
  all.ratio_max = std::isnan(ratios) ? static_cast<double>(ratios) : static_cast<double>(ratio_max);
}

// What a row decides by, of one block: its log-ratios, and its estimates.
template <class T>
PPO_CLONES void add_log_ratios(const ImportanceBlock<T>& in, RowSums& all) {
  double count = 0.0, log_ratio = 0.0;
  const T *logp = in.logp, *rollout = in.rollout, *valid = in.valid;
#pragma omp simd reduction(+ : count, log_ratio)
  for (int64_t i = 0; i < in.n; ++i) {
    const T l = logp[i], l_rollout = rollout[i], one = valid[i];
    const bool is_valid = one != T(0);
    const double now = is_valid ? l : T(0), before = is_valid ? l_rollout : T(0);
    log_ratio += now - before;
    count += static_cast<double>(one);
  }
  all.sums[ImportanceRowSum::kTokens] += count;
  all.sums[ImportanceRowSum::kLogRatio] += log_ratio;
}

// Those of masked tokens are 0.
template <class T>
PPO_CLONES void add_estimates(const T* estimates, int64_t n, RowSums& all) {
  double sum = 0.0;
  T max = 0;
#pragma omp simd reduction(+ : sum) reduction(max : max)
  for (int64_t i = 0; i < n; ++i) {
    const T k = estimates[i];
    sum += static_cast<double>(k);
    max = k > max ? k : max;
  }
  all.sums[ImportanceRowSum::kEstimate] += sum;
  all.max = std::isnan(sum) ? sum : max_or_nan(all.max, static_cast<double>(max));
}

template <class T>
struct ImportanceInputs {
  TokenInput<T> logp, rollout;
  TokenInput<uint8_t> mask;
  T* weights;
  bool* keep;
};

// Calls f(block, flat position) for every block of a chunk.
template <class T, class F>
void for_importance_blocks(const ImportanceInputs<T>& in, const Rows& rows, const Chunk& chunk, const F& f) {
  T valid[kBlock];
  std::fill(valid, valid + kBlock, T(1));
  for_blocks(chunk, [&](int64_t begin, int64_t n) {
    valid_block(in.mask, rows, chunk.row, begin, n, valid);
    f(ImportanceBlock<T>{in.logp.row(rows, chunk.row) + begin, in.rollout.row(rows, chunk.row) + begin, valid, n},
      rows.start(chunk.row) + begin);
  });
}

template <class T>
RowSums row_chunk(const ImportanceInputs<T>& in, const Rows& rows, const Chunk& chunk, const ImportanceOptions<T>& o) {
  RowSums sums;
  ImportanceScratch<T> scratch;
  for_importance_blocks(in, rows, chunk, [&](const ImportanceBlock<T>& block, int64_t) {
    add_log_ratios(block, sums);
    if (o.reject == RejectBy::kNothing || o.reject_level == RejectLevel::kToken) return;
    divergence_block(block, o.log_ratio_clamp, scratch);
    estimate_block(block.n, o.reject, scratch);
    add_estimates(scratch.estimates, block.n, sums);
  });
  return sums;
}

template <class T>
ImportanceSums importance_chunk(const ImportanceInputs<T>& in, const Rows& rows, const Chunk& chunk,
                                const RowImportance<T>& row, const ImportanceOptions<T>& o) {
  ImportanceSums total;
  ImportanceScratch<T> scratch = {};
  for_importance_blocks(in, rows, chunk, [&](const ImportanceBlock<T>& block, int64_t at) {
    ImportanceSums sums = divergence_block(block, o.log_ratio_clamp, scratch);
    if (o.level != WeightLevel::kToken) std::fill(scratch.ratios, scratch.ratios + block.n, row.ratio);
    if (o.reject_level != RejectLevel::kToken) {
      std::fill(scratch.estimates, scratch.estimates + block.n, row.estimate);
    } else if (o.reject != RejectBy::kNothing) {
      estimate_block(block.n, o.reject, scratch);
    }
    weight_block(block, o, in.weights + at, scratch, sums);
    for (int64_t i = 0; i < block.n; ++i) in.keep[at + i] = scratch.keeps[i] != T(0);
    total.add(sums);
  });
  return total;
}

ImportanceResult importance_weights(const Tensor& logprobs, const Tensor& rollout_logprobs, const OptTensor& mask,
                                    const OptTensor& cu_seqlens, int64_t level, int64_t mode, int64_t reject,
                                    int64_t reject_level, double low, double high, double reject_low,
                                    double reject_high, double log_ratio_clamp) {
  PPO_COUNT("importance_weights");
  const Rows rows(logprobs, cu_seqlens);
  return dispatch_compute(logprobs, [&](auto zero) -> ImportanceResult {
    using T = decltype(zero);
    const auto o =
        importance_options<T>(level, mode, reject, reject_level, low, high, reject_low, reject_high, log_ratio_clamp);
    const Tensor weights = new_tokens(logprobs, rows);
    const Tensor keep = rows.packed() ? torch::stable::new_zeros(logprobs, logprobs.sizes(), ScalarType::Bool)
                                      : torch::stable::new_empty(logprobs, logprobs.sizes(), ScalarType::Bool);
    const ImportanceInputs<T> in{token_input<T>("logprobs", logprobs, logprobs, rows),
                                 token_input<T>("rollout_logprobs", rollout_logprobs, logprobs, rows),
                                 token_input<uint8_t>("mask", mask, logprobs, rows), data_of<T>(weights),
                                 data_of<bool>(keep)};
    const std::vector<Chunk> chunks = cut_rows(rows);
    const int64_t grain = grain_of(4096, logprobs.numel(), chunks.size());
    std::vector<RowImportance<T>> by_row(rows.count);
    if (o.by_row()) {
      std::vector<RowSums> parts(chunks.size()), sums(rows.count);
      for_each(chunks.size(), grain, [&](int64_t i) { parts[i] = row_chunk(in, rows, chunks[i], o); });
      for (size_t i = 0; i < chunks.size(); ++i) sums[chunks[i].row].add(parts[i]);
      for (int64_t b = 0; b < rows.count; ++b) by_row[b] = row_importance(sums[b].sums, sums[b].max, o);
    }
    std::vector<ImportanceSums> parts(chunks.size());
    for_each(chunks.size(), grain,
             [&](int64_t i) { parts[i] = importance_chunk(in, rows, chunks[i], by_row[chunks[i].row], o); });
    ImportanceSums all;
    for (const ImportanceSums& part : parts) all.add(part);
    const Tensor stats = empty({ImportanceStat::kCount}, dtype_of<T>(), logprobs);
    importance_stats(all.sums, all.ratio_max, data_of<T>(stats));
    return {weights, keep, stats};
  });
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CPU, m) { PPO_IMPL(m, "importance_weights", ppo::importance_weights); }
