// The pairwise policy loss on CPU tensors: sums over rows, then pairs, then the gradient, the same for every token of a
// row.
#include "math/p3o_loss.h"

#include <array>

#include "cpu/loss.h"

namespace ppo {
namespace {

struct RowSums {
  double ref_log_ratio = 0.0, log_ratio = 0.0, count = 0.0;

  void add(const RowSums& o) { ref_log_ratio += o.ref_log_ratio, log_ratio += o.log_ratio, count += o.count; }
};

template <class T>
PPO_CLONES RowSums sum_block(const T* logp, const T* old, const T* ref, const T* valid, int64_t n) {
  double ref_log_ratio = 0.0, log_ratio = 0.0, count = 0.0;
#pragma omp simd reduction(+ : ref_log_ratio, log_ratio, count)
  for (int64_t i = 0; i < n; ++i) {
    const T one = valid[i], l = logp[i], l_old = old[i], l_ref = ref[i];
    const bool is_valid = one != T(0);
    const double now = is_valid ? l : T(0), before = is_valid ? l_old : T(0), frozen = is_valid ? l_ref : T(0);
    log_ratio += now - before;
    ref_log_ratio += now - frozen;
    count += static_cast<double>(one);
  }
  return {ref_log_ratio, log_ratio, count};
}

template <class T>
PPO_CLONES void spread_block(const T* valid, int64_t n, T value, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = valid[i] != T(0) ? value : T(0);
}

template <class T>
struct P3OInputs {
  TokenInput<T> logp, old, ref;
  TokenInput<uint8_t> mask;
};

template <class T>
RowSums sum_chunk(const P3OInputs<T>& in, const Rows& rows, const Chunk& chunk) {
  T valid[kBlock], copies[3][kBlock];
  std::fill(valid, valid + kBlock, T(1));
  RowSums sums;
  for_blocks(chunk, [&](int64_t begin, int64_t n) {
    const int64_t padded = padded_to_vectors(n);
    const auto block = [&](const TokenInput<T>& x, T* copy) {
      return padded_block(x.row(rows, chunk.row) + begin, n, copy);
    };
    valid_block(in.mask, rows, chunk.row, begin, n, valid);
    std::fill(valid + n, valid + padded, T(0));
    sums.add(sum_block(block(in.logp, copies[0]), block(in.old, copies[1]), block(in.ref, copies[2]), valid, padded));
  });
  return sums;
}

// The gradient is the same for every valid token of a row.
template <class T>
void spread_chunk(const P3OInputs<T>& in, const Rows& rows, const Chunk& chunk, T value, T* grad) {
  T valid[kBlock];
  std::fill(valid, valid + kBlock, T(1));
  for_blocks(chunk, [&](int64_t begin, int64_t n) {
    spread_block(valid_block(in.mask, rows, chunk.row, begin, n, valid), n, value,
                 grad + rows.start(chunk.row) + begin);
  });
}

LossResult p3o_loss(const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& ref_logprobs,
                    const Tensor& scores, const OptTensor& mask, const OptTensor& normalizer,
                    const OptTensor& cu_seqlens, const OptTensor& kl_coef_tensor, int64_t variant, int64_t group_size,
                    double kl_coef, double cliprange, double weight_clip, double log_ratio_clamp, bool grad) {
  PPO_COUNT("p3o_loss");
  const Rows rows(logprobs, cu_seqlens);
  check_code("variant", variant, P3OVariant::kCount);
  PPO_CHECK(group_size >= 1 && rows.count % group_size == 0, "group_size must divide the ", rows.count, " rows, got ",
            group_size);
  return dispatch_compute(logprobs, [&](auto zero) {
    using T = decltype(zero);
    const auto input = [&](const char* name, const Tensor& x) { return token_input<T>(name, x, logprobs, rows); };
    const P3OInputs<T> in{input("logprobs", logprobs), input("old_logprobs", old_logprobs),
                          input("ref_logprobs", ref_logprobs), token_input<uint8_t>("mask", mask, logprobs, rows)};
    const RowVector<T> score("scores", scores, {rows.count});
    const RowVector<double> coef("kl_coef_tensor", kl_coef_tensor, {});
    const PairOptions options =
        pair_options(variant, coef ? coef[0] : kl_coef, cliprange, weight_clip, log_ratio_clamp);

    const std::vector<Chunk> chunks = cut_rows(rows);
    const int64_t grain = grain_of(4096, logprobs.numel(), chunks.size());
    std::vector<RowSums> parts(chunks.size()), by_row(rows.count);
    for_each(chunks.size(), grain, [&](int64_t i) { parts[i] = sum_chunk(in, rows, chunks[i]); });
    for (size_t i = 0; i < chunks.size(); ++i) by_row[chunks[i].row].add(parts[i]);

    std::vector<Response> responses(rows.count);
    std::vector<std::array<double, P3OSum::kCount>> terms(rows.count);
    std::vector<T> slopes(rows.count);
    double ratio_max = 0.0;
    for (int64_t b = 0; b < rows.count; ++b) {
      const RowSums& sums = by_row[b];
      responses[b] = response(sums.count > 0.0, score[b], sums.ref_log_ratio, sums.log_ratio, options);
      if (responses[b].has_tokens) ratio_max = max_or_nan(ratio_max, responses[b].ratio);
    }
    for_each(rows.count, 1024 / group_size, [&](int64_t b) {
      terms[b] = {};
      const int64_t first = b / group_size * group_size;
      slopes[b] = static_cast<T>(response_terms(&responses[first], group_size, b - first, options, terms[b].data()));
    });
    double total[P3OSum::kCount] = {};
    for (const auto& term : terms) {
      for (int i = 0; i < P3OSum::kCount; ++i) total[i] += term[i];
    }

    const Tensor gradient = new_gradient(logprobs, rows, grad);
    if (grad) {
      T* out = data_of<T>(gradient);
      for_each(chunks.size(), grain, [&](int64_t i) { spread_chunk(in, rows, chunks[i], slopes[chunks[i].row], out); });
    }
    const Tensor stats = empty({P3OStat::kCount}, dtype_of<T>(), logprobs);
    p3o_stats(total, ratio_max, data_of<T>(stats));
    return finish_loss<T>(total[P3OSum::kPairLoss], 0.5 * total[P3OSum::kPairs], normalizer, stats, gradient);
  });
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CPU, m) { PPO_IMPL(m, "p3o_loss", ppo::p3o_loss); }
