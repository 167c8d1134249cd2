// The policy loss on CPU tensors: loss, statistics and gradient from one pass, after one over the rows where the ratio
// is the row's.
#include "policy_loss.h"

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

struct RowSums {
  double sums[RowSum::kCount] = {};

  void add(const RowSums& o) {
    for (int i = 0; i < RowSum::kCount; ++i) sums[i] += o.sums[i];
  }
};

template <class T>
struct PolicyBlock {
  const T *logp, *old, *adv, *weights, *valid;
  int64_t n;
  T row_weight;
};

// The ratio of a token: its own.
template <class T>
struct OwnRatio {
  SurrogateOptions<T> options;

  template <Surrogate kSurrogate>
  PPO_INLINE PolicyTerm<T> term(T logp, T old, T adv, T weight, bool) const {
    return policy_term<kSurrogate>(logp, old, logp - old, adv, weight, options);
  }
};

// That of its row.
template <bool kGeometric, class T>
struct RatioOfRow {
  LevelOptions<T> options;
  RowRatio<T> row;

  template <Surrogate kSurrogate>
  PPO_INLINE PolicyTerm<T> term(T logp, T old, T adv, T weight, bool is_valid) const {
    const T raw = is_valid ? row.raw : T(0);
    const PolicyTerm<T> of_row = policy_term<kSurrogate>(logp, old, raw, adv, weight, options.row);
    return term_in_row<kGeometric>(of_row, logp, old, adv, row.slope, options);
  }
};

// Sums over one block, and the gradient of each token's surrogate, 0 where masked.
template <Surrogate kSurrogate, class R, class T>
PPO_CLONES PolicySums policy_block(const PolicyBlock<T>& in, const R given, T* grads) {
  const R ratio = given;
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
    const PolicyTerm<T> term = ratio.template term<kSurrogate>(is_valid ? l : T(0), is_valid ? l_old : T(0),
                                                               is_valid ? a : T(0), is_valid ? w : T(0), is_valid);
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

// Adds the weights of one block and their squares, which may be beyond what T holds.
template <class T>
PPO_CLONES void add_weights(const PolicyBlock<T>& in, double (&sums)[PolicySum::kCount]) {
  double weight = 0.0, squared = 0.0;
  const T *weights = in.weights, *valid = in.valid;
#pragma omp simd reduction(+ : weight, squared)
  for (int64_t i = 0; i < in.n; ++i) {
    const double w = static_cast<double>(valid[i] != T(0) ? weights[i] : T(0));
    weight += w;
    squared += w * w;
  }
  sums[PolicySum::kWeight] += weight;
  sums[PolicySum::kSquaredWeight] += squared;
}

// What a row's ratio is made of, of one block.
template <class T>
PPO_CLONES RowSums row_block(const PolicyBlock<T>& in, const LevelOptions<T> o) {
  double count = 0.0, log_ratio = 0.0, positive = 0.0, negative = 0.0;
  const T *logp = in.logp, *old = in.old, *adv = in.adv, *weights = in.weights, *valid = in.valid;
#pragma omp simd reduction(+ : count, log_ratio, positive, negative)
  for (int64_t i = 0; i < in.n; ++i) {
    const T l = logp[i], l_old = old[i], a = adv[i], w = weights[i], one = valid[i];
    const bool is_valid = one != T(0);
    const RowTerm<T> term =
        row_term(is_valid ? l : T(0), is_valid ? l_old : T(0), is_valid ? a : T(0), is_valid ? w : T(0), o);
    count += static_cast<double>(one);
    log_ratio += static_cast<double>(term.log_ratio);
    positive += static_cast<double>(term.positive);
    negative += static_cast<double>(term.negative);
  }
  return {{count, log_ratio, positive, negative}};
}

template <class T>
struct KlPenalty {
  T coef;
  int64_t estimator;
  T log_clamp, value_clamp;
  bool unbiased;
};

// Adds the gradient of coef times the estimates `kl` times the ratio; returns the sum of the latter product.
template <class T>
PPO_CLONES double times_ratio_block(const PolicyBlock<T>& in, const T* kl, const T* kl_slopes, T log_ratio_clamp,
                                    T scale, T* grads) {
  T sum = 0;
  const T *logp = in.logp, *old = in.old, *valid = in.valid;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < in.n; ++i) {
    const T l = logp[i], l_old = old[i], before = grads[i];
    const bool is_valid = valid[i] != T(0);
    const T raw = (is_valid ? l : T(0)) - (is_valid ? l_old : T(0));
    const T ratio = exp_fast(clamp(raw, log_ratio_clamp));
    const KlTerm<T> term = times_ratio<T>({kl[i], kl_slopes[i]}, ratio, clamp_gradient(raw, log_ratio_clamp, ratio));
    const T after = before + scale * term.grad;
    sum += term.value;
    grads[i] = is_valid ? after : before;
  }
  return static_cast<double>(sum);
}

template <class T>
struct PolicyInputs {
  TokenInput<T> logp, old, adv, weights, ref;
  TokenInput<uint8_t> mask;
  const T* row_weight;
  T* grad;
};

// Calls f(block, begin, grads) for every block of a chunk.
template <class T, class F>
void for_policy_blocks(const PolicyInputs<T>& in, const Rows& rows, const Chunk& chunk, const F& f) {
  T adv[kBlock], weights[kBlock], valid[kBlock], unwanted[kBlock];
  std::fill(valid, valid + kBlock, T(1));
  const T row_weight = in.row_weight ? in.row_weight[chunk.row] : T(1);
  for_blocks(chunk, [&](int64_t begin, int64_t n) {
    const auto at = [&](const auto& input, auto absent, auto* scratch) {
      return block_of(input, rows, chunk.row, begin, n, absent, scratch);
    };
    valid_block(in.mask, rows, chunk.row, begin, n, valid);
    const PolicyBlock<T> block{in.logp.row(rows, chunk.row) + begin,
                               in.old.row(rows, chunk.row) + begin,
                               at(in.adv, T(0), adv),
                               at(in.weights, T(1), weights),
                               valid,
                               n,
                               row_weight};
    f(block, begin, in.grad != nullptr ? in.grad + rows.start(chunk.row) + begin : unwanted);
  });
}

// Adds the penalty's gradient; returns the sum of the penalty and of the estimates.
template <class T>
std::pair<double, double> kl_penalty(const PolicyBlock<T>& block, const T* ref, const KlPenalty<T>& kl,
                                     T log_ratio_clamp, T* grads) {
  T off[kBlock];
  return dispatch_estimator(kl.estimator, [&](auto estimator) -> std::pair<double, double> {
    const T scale = kl.coef * block.row_weight;
    if (kl.coef == T(0)) {  // for the statistic alone
      return {0.0, kl_block<estimator(), false>(block.logp, ref, block.valid, block.n, kl.log_clamp, kl.value_clamp,
                                                T(0), off)};
    }
    if (kl.unbiased) {
      T values[kBlock], slopes[kBlock] = {};
      const auto all = [&](auto gradient, T* out) {
        return kl_block<estimator(), gradient()>(block.logp, ref, block.valid, block.n, kl.log_clamp, kl.value_clamp,
                                                 T(1), out);
      };
      const double sum = all(std::false_type{}, values);
      all(std::true_type{}, slopes);
      return {static_cast<double>(kl.coef) * times_ratio_block(block, values, slopes, log_ratio_clamp, scale, grads),
              sum};
    }
    const double sum =
        kl_block<estimator(), true>(block.logp, ref, block.valid, block.n, kl.log_clamp, kl.value_clamp, scale, grads);
    return {static_cast<double>(kl.coef) * sum, sum};
  });
}

template <Surrogate kSurrogate, class R, class T>
PolicySums policy_chunk(const PolicyInputs<T>& in, const Rows& rows, const Chunk& chunk, const R& ratio,
                        T log_ratio_clamp, const KlPenalty<T>& kl) {
  PolicySums total;
  for_policy_blocks(in, rows, chunk, [&](const PolicyBlock<T>& block, int64_t begin, T* grads) {
    PolicySums sums = policy_block<kSurrogate>(block, ratio, grads);
    double& loss = sums.sums[PolicySum::kLoss];
    if (in.weights.data != nullptr) add_weights(block, sums.sums);
    if (in.ref.data != nullptr) {
      const auto [penalty, ref_kl] = kl_penalty(block, in.ref.row(rows, chunk.row) + begin, kl, log_ratio_clamp, grads);
      sums.sums[PolicySum::kRefKl] = ref_kl;
      loss += penalty;
    }
    loss = sums.excess.count > 0.0 ? loss * block.row_weight : 0.0;
    total.add(sums);
  });
  return total;
}

// The ratio of every row, from sums over its chunks.
template <Surrogate kSurrogate, class T>
std::vector<RowRatio<T>> row_ratios(const PolicyInputs<T>& in, const Rows& rows, const std::vector<Chunk>& chunks,
                                    int64_t grain, const LevelOptions<T>& o) {
  std::vector<RowSums> parts(chunks.size()), by_row(rows.count);
  for_each(chunks.size(), grain, [&](int64_t i) {
    for_policy_blocks(in, rows, chunks[i],
                      [&](const PolicyBlock<T>& block, int64_t, T*) { parts[i].add(row_block(block, o)); });
  });
  for (size_t i = 0; i < chunks.size(); ++i) by_row[chunks[i].row].add(parts[i]);
  std::vector<RowRatio<T>> ratios(rows.count);
  for (int64_t b = 0; b < rows.count; ++b) ratios[b] = row_ratio<kSurrogate>(by_row[b].sums, o);
  return ratios;
}

// The sums over the batch, chunk by chunk.
template <Surrogate kSurrogate, class T>
PolicySums policy_sums(const PolicyInputs<T>& in, const Rows& rows, int64_t tokens, const SurrogateOptions<T>& o,
                       const LevelOptions<T>& levels, const KlPenalty<T>& kl) {
  const std::vector<Chunk> chunks = cut_rows(rows);
  const int64_t grain = grain_of(4096, tokens, chunks.size());
  std::vector<PolicySums> parts(chunks.size());
  const auto run = [&](const auto& ratio_of) {
    for_each(chunks.size(), grain, [&](int64_t i) {
      parts[i] = policy_chunk<kSurrogate>(in, rows, chunks[i], ratio_of(chunks[i].row), o.log_ratio_clamp, kl);
    });
  };
  if constexpr (is_dppo(kSurrogate)) {
    run([&](int64_t) { return OwnRatio<T>{o}; });
  } else if (levels.level == RatioLevel::kToken) {
    run([&](int64_t) { return OwnRatio<T>{o}; });
  } else {
    const std::vector<RowRatio<T>> ratios = row_ratios<kSurrogate>(in, rows, chunks, grain, levels);
    if (levels.level != RatioLevel::kGeometric) {
      run([&](int64_t b) { return RatioOfRow<false, T>{levels, ratios[b]}; });
    } else if constexpr (kSurrogate == Surrogate::kClip) {
      run([&](int64_t b) { return RatioOfRow<true, T>{levels, ratios[b]}; });
    }
  }
  PolicySums all;
  for (const PolicySums& part : parts) all.add(part);
  return all;
}

LossResult policy_loss(const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages,
                       const OptTensor& mask, const OptTensor& weights, const OptTensor& ref_logprobs,
                       const OptTensor& row_weight, const OptTensor& normalizer, const OptTensor& cu_seqlens,
                       const OptTensor& kl_coef_tensor, double cliprange_low, double cliprange_high, double dual_clip,
                       double log_ratio_clamp, double kl_coef, int64_t kl_estimator, double kl_log_clamp,
                       double kl_clamp, bool unbiased_kl, int64_t surrogate, int64_t level, double delta,
                       double tau_pos, double tau_neg, bool grad) {
  PPO_COUNT("policy_loss");
  check_policy_codes(kl_estimator, surrogate, level, unbiased_kl);
  const Rows rows(logprobs, cu_seqlens);
  return dispatch_compute(logprobs, [&](auto zero) {
    using T = decltype(zero);
    const auto input = [&](const char* name, const OptTensor& x, bool may_be_per_row = false) {
      return token_input<T>(name, x, logprobs, rows, may_be_per_row);
    };
    const auto options = surrogate_options<T>(surrogate, cliprange_low, cliprange_high, dual_clip, delta,
                                              log_ratio_clamp, tau_pos, tau_neg);
    const auto levels = level_options<T>(surrogate, level, cliprange_low, cliprange_high, options);
    const RowVector<double> coef("kl_coef_tensor", kl_coef_tensor, {});
    const KlPenalty<T> kl{static_cast<T>(coef ? coef[0] : kl_coef), kl_estimator, static_cast<T>(kl_log_clamp),
                          static_cast<T>(kl_clamp), unbiased_kl};
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
    const PolicySums s = dispatch_surrogate(
        surrogate, [&](auto kind) { return policy_sums<kind()>(in, rows, logprobs.numel(), options, levels, kl); });
    const Tensor stats = empty({PolicyStat::kCount}, dtype_of<T>(), logprobs);
    policy_stats<false>(s.sums, s.excess, s.ratio_max, weights.has_value(), data_of<T>(stats));
    return finish_loss<T>(s.sums[PolicySum::kLoss], s.excess.count, normalizer, stats, gradient);
  });
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CPU, m) { PPO_IMPL(m, "policy_loss", ppo::policy_loss); }
