// The clipped policy loss on CPU tensors: loss, statistics and gradient from one pass.
#include "math/policy_loss.h"

#include "cpu/loss.h"

namespace ppo {
namespace {

struct PolicySums {
  double sums[PolicySum::kCount] = {};
  double ratio_max = 0.0;
  Moments excess;  // of ratio - 1; its count is the number of valid tokens

  void add(const PolicySums& o) {
    for (int i = 0; i < PolicySum::kCount; ++i) sums[i] += o.sums[i];
    ratio_max = max_or_nan(o.ratio_max, ratio_max);
    excess.merge(o.excess);
  }
};

template <class T>
struct PolicyBlock {
  const T *logp, *old, *adv, *weights, *valid;
  int64_t n;
  T row_weight;
};

// Sums over one block, and the gradient of each token's surrogate, 0 where masked.
template <class T>
PPO_CLONES PolicySums policy_block(const PolicyBlock<T>& in, const PolicyOptions<T> o, T* grads) {
  T loss = 0, count = 0, log_ratio = 0, squared = 0, k3 = 0, excess = 0;
  T clipped_high = 0, clipped_low = 0, dual_clipped = 0, clamped = 0, ratio_max = -1;
  const T *logp = in.logp, *old = in.old, *adv = in.adv, *weights = in.weights, *valid = in.valid;
  const T row_weight = in.row_weight;
  T excesses[kBlock];
#pragma omp simd reduction(+ : loss, count, log_ratio, squared, k3, excess, clipped_high, clipped_low, dual_clipped, \
                               clamped) reduction(max : ratio_max)
  for (int64_t i = 0; i < in.n; ++i) {
    const T l = logp[i], l_old = old[i], a = adv[i], w = weights[i], one = valid[i];
    const bool is_valid = one != T(0);
    const PolicyTerm<T> term =
        policy_term(is_valid ? l : T(0), is_valid ? l_old : T(0), is_valid ? a : T(0), is_valid ? w : T(0), o);
    loss += term.loss;
    grads[i] = is_valid ? term.grad * row_weight : T(0);
    count += one;
    log_ratio += term.log_ratio;
    squared += term.log_ratio * term.log_ratio;
    k3 += term.k3;
    excess += term.ratio_minus_1;
    excesses[i] = term.ratio_minus_1;
    clipped_high += term.clipped_high;
    clipped_low += term.clipped_low;
    dual_clipped += term.dual_clipped;
    clamped += term.clamped;
    const T above = is_valid ? term.ratio_minus_1 : T(-1);
    ratio_max = above > ratio_max ? above : ratio_max;
  }
  if (count == T(0)) return {};
  const double mean = static_cast<double>(excess) / static_cast<double>(count);
  double m2 = 0.0;
#pragma omp simd reduction(+ : m2)
  for (int64_t i = 0; i < in.n; ++i) {
    const double e = static_cast<double>(excesses[i]) - mean;
    m2 += valid[i] != T(0) ? e * e : 0.0;
  }
  PolicySums all;
  all.sums[PolicySum::kLoss] = loss;
  all.sums[PolicySum::kLogRatio] = log_ratio;
  all.sums[PolicySum::kSquaredLogRatio] = squared;
  all.sums[PolicySum::kK3] = k3;
  all.sums[PolicySum::kClippedHigh] = clipped_high;
  all.sums[PolicySum::kClippedLow] = clipped_low;
  all.sums[PolicySum::kDualClipped] = dual_clipped;
  all.sums[PolicySum::kClamped] = clamped;
  all.ratio_max = std::isnan(excess) ? static_cast<double>(excess) : static_cast<double>(ratio_max) + 1.0;
  all.excess = {static_cast<double>(count), mean, m2};
  return all;
}

template <class T>
struct KlPenalty {
  T coef;
  int64_t estimator;
  T log_clamp, value_clamp;
};

template <class T>
struct PolicyInputs {
  TokenInput<T> logp, old, adv, weights, ref;
  TokenInput<uint8_t> mask;
  const T* row_weight;
  T* grad;
};

template <class T>
PolicySums policy_chunk(const PolicyInputs<T>& in, const Rows& rows, const Chunk& chunk, const PolicyOptions<T>& o,
                        const KlPenalty<T>& kl) {
  T adv[kBlock], weights[kBlock], valid[kBlock], unwanted[kBlock], off[kBlock];
  std::fill(valid, valid + kBlock, T(1));
  PolicySums total;
  const T row_weight = in.row_weight ? in.row_weight[chunk.row] : T(1);
  for_blocks(chunk, [&](int64_t begin, int64_t n) {
    const auto at = [&](const auto& input, auto absent, auto* scratch) {
      return block_of(input, rows, chunk.row, begin, n, absent, scratch);
    };
    const T* logp = in.logp.row(rows, chunk.row) + begin;
    T* grads = in.grad != nullptr ? in.grad + rows.start(chunk.row) + begin : unwanted;
    valid_block(in.mask, rows, chunk.row, begin, n, valid);
    PolicySums block = policy_block<T>({logp, in.old.row(rows, chunk.row) + begin, at(in.adv, T(0), adv),
                                        at(in.weights, T(1), weights), valid, n, row_weight},
                                       o, grads);
    double& loss = block.sums[PolicySum::kLoss];
    if (in.ref.data != nullptr) {
      const T* ref = in.ref.row(rows, chunk.row) + begin;
      const double ref_kl = dispatch_estimator(kl.estimator, [&](auto estimator) {
        if (kl.coef == T(0)) {  // for the statistic alone
          return kl_block<estimator(), false>(logp, ref, valid, n, kl.log_clamp, kl.value_clamp, T(0), off);
        }
        return kl_block<estimator(), true>(logp, ref, valid, n, kl.log_clamp, kl.value_clamp, kl.coef * row_weight,
                                           grads);
      });
      block.sums[PolicySum::kRefKl] = ref_kl;
      loss += scaled_or_off(static_cast<double>(kl.coef), ref_kl);
    }
    loss = block.excess.count > 0.0 ? loss * row_weight : 0.0;
    total.add(block);
  });
  return total;
}

LossResult policy_loss(const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages,
                       const OptTensor& mask, const OptTensor& weights, const OptTensor& ref_logprobs,
                       const OptTensor& row_weight, const OptTensor& normalizer, const OptTensor& cu_seqlens,
                       const OptTensor& kl_coef_tensor, double cliprange_low, double cliprange_high, double dual_clip,
                       double log_ratio_clamp, double kl_coef, int64_t kl_estimator, double kl_log_clamp,
                       double kl_clamp, bool grad) {
  PPO_COUNT("policy_loss");
  check_code("kl_estimator", kl_estimator, kEstimators);
  const Rows rows(logprobs, cu_seqlens);
  return dispatch_compute(logprobs, [&](auto zero) {
    using T = decltype(zero);
    const auto input = [&](const char* name, const OptTensor& x, bool may_be_per_row = false) {
      return token_input<T>(name, x, logprobs, rows, may_be_per_row);
    };
    const PolicyOptions<T> options{static_cast<T>(1.0 - cliprange_low), static_cast<T>(1.0 + cliprange_high),
                                   static_cast<T>(dual_clip), static_cast<T>(log_ratio_clamp)};
    const RowVector<double> coef("kl_coef_tensor", kl_coef_tensor, {});
    const KlPenalty<T> kl{static_cast<T>(coef ? coef[0] : kl_coef), kl_estimator, static_cast<T>(kl_log_clamp),
                          static_cast<T>(kl_clamp)};
    const RowVector<T> row_weights("row_weight", row_weight, {rows.count});
    const Tensor gradient = new_gradient(logprobs, rows, grad);
    const PolicyInputs<T> in{input("logprobs", logprobs),
                             input("old_logprobs", old_logprobs),
                             input("advantages", advantages, true),
                             input("weights", weights, true),
                             input("ref_logprobs", ref_logprobs),
                             token_input<uint8_t>("mask", mask, logprobs, rows),
                             row_weights.data(),
                             grad ? data_of<T>(gradient) : nullptr};
    const std::vector<Chunk> chunks = cut_rows(rows);
    std::vector<PolicySums> parts(chunks.size());
    for_each(chunks.size(), grain_of(4096, logprobs.numel(), chunks.size()),
             [&](int64_t i) { parts[i] = policy_chunk(in, rows, chunks[i], options, kl); });
    PolicySums s;
    for (const PolicySums& part : parts) s.add(part);
    const Tensor stats = empty({PolicyStat::kCount}, dtype_of<T>(), logprobs);
    policy_stats<false>(s.sums, s.excess, s.ratio_max, data_of<T>(stats));
    return finish_loss<T>(s.sums[PolicySum::kLoss], s.excess.count, normalizer, stats, gradient);
  });
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CPU, m) { PPO_IMPL(m, "policy_loss", ppo::policy_loss); }
