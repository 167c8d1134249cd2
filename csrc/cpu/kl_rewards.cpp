// KL-shaped rewards on CPU tensors.
#include "cpu/loss.h"

namespace ppo {
namespace {

struct KlOptions {
  double kl_coef, score_clip, kl_log_clamp, kl_clamp;
};

// Writes the penalties of one row and returns the sum of the estimates.
template <KlEstimator kEstimator, class T>
double penalty_row(const TokenInput<T>& logp, const TokenInput<T>& ref, const TokenInput<uint8_t>& mask,
                   const Rows& rows, int64_t row, const KlOptions& o, T* rewards) {
  T valid[kBlock], logp_block[kBlock], ref_block[kBlock], out_block[kBlock];
  std::fill(valid, valid + kBlock, T(1));
  double sum = 0.0;
  for (int64_t begin = 0; begin < rows.size(row); begin += kBlock) {
    const int64_t n = std::min(kBlock, rows.size(row) - begin), padded = padded_to_vectors(n);
    T* out = n < padded ? out_block : rewards + begin;
    valid_block(mask, rows, row, begin, n, valid);
    std::fill(valid + n, valid + padded, T(0));
    sum += kl_block<kEstimator, false>(padded_block(logp.row(rows, row) + begin, n, logp_block),
                                       padded_block(ref.row(rows, row) + begin, n, ref_block), valid, padded,
                                       static_cast<T>(o.kl_log_clamp), static_cast<T>(o.kl_clamp),
                                       static_cast<T>(-o.kl_coef), out);
    if (n < padded) std::copy(out, out + n, rewards + begin);
  }
  return sum;
}

int64_t last_valid(const uint8_t* mask, int64_t n) {
  int64_t t = n - 1;
  while (t >= 0 && mask != nullptr && mask[t] == 0) --t;
  return t;
}

std::tuple<Tensor, Tensor> kl_rewards(const Tensor& logprobs, const Tensor& ref_logprobs, const Tensor& scores,
                                      const OptTensor& mask, const OptTensor& score_index, const OptTensor& cu_seqlens,
                                      const OptTensor& kl_coef_tensor, double kl_coef, int64_t kl_estimator,
                                      double score_clip, double kl_log_clamp, double kl_clamp) {
  PPO_COUNT("kl_rewards");
  check_code("kl_estimator", kl_estimator, kEstimators);
  const Rows rows(logprobs, cu_seqlens);
  const RowVector<double> coef("kl_coef_tensor", kl_coef_tensor, {});
  const KlOptions options{coef ? coef[0] : kl_coef, score_clip, kl_log_clamp, kl_clamp};
  return dispatch_compute(logprobs, [&](auto zero) {
    using T = decltype(zero);
    const auto logp = token_input<T>("logprobs", logprobs, logprobs, rows),
               ref = token_input<T>("ref_logprobs", ref_logprobs, logprobs, rows);
    const auto m = token_input<uint8_t>("mask", mask, logprobs, rows);
    const RowVector<T> score("scores", scores, {rows.count});
    const RowVector<int64_t> index("score_index", score_index, {rows.count});
    Tensor rewards = on_huge_pages(new_tokens(logprobs, rows));
    Tensor kl = empty({rows.count}, dtype_of<T>(), logprobs);
    T* out = data_of<T>(rewards);
    T* sums = data_of<T>(kl);
    for_each(rows.count, grain_of(8192, logprobs.numel(), rows.count), [&](int64_t b) {
      const int64_t length = rows.size(b);
      T* row = out + rows.start(b);
      sums[b] = dispatch_estimator(kl_estimator, [&](auto estimator) {
        return static_cast<T>(penalty_row<estimator()>(logp, ref, m, rows, b, options, row));
      });
      const int64_t last = last_valid(m.row(rows, b), length);
      const int64_t at = last < 0 || !index ? last : index[b];
      if (at >= 0 && at < length) row[at] += clamp(score[b], static_cast<T>(score_clip));
    });
    return std::make_tuple(rewards, kl);
  });
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CPU, m) { PPO_IMPL(m, "kl_rewards", ppo::kl_rewards); }
