// The clipped policy loss on CPU tensors: loss, statistics and gradient from one pass.
#include "math/policy_loss.h"

#include <cmath>

#include "cpu/block.h"
#include "cpu/loss.h"
#include "math/moments.h"

namespace ppo {
namespace {

struct PolicySums {
  double loss = 0.0, d = 0.0, d2 = 0.0, k3 = 0.0, ref_kl = 0.0;
  double high = 0.0, low = 0.0, dual = 0.0, clamped = 0.0, ratio_max = 0.0;
  Moments excess;  // of ratio - 1; its count is the number of valid tokens

  void add(const PolicySums& o) {
    loss += o.loss, d += o.d, d2 += o.d2, k3 += o.k3, ref_kl += o.ref_kl;
    high += o.high, low += o.low, dual += o.dual, clamped += o.clamped;
    ratio_max = o.ratio_max > ratio_max || std::isnan(o.ratio_max) ? o.ratio_max : ratio_max;
    excess.merge(o.excess);
  }
};

template <class T>
struct PolicyBlock {
  const T *logp, *old, *adv, *weights, *live;
  int64_t n;
  T row_weight;
};

// Sums over one block, and the gradient of each token's surrogate, 0 where masked.
template <class T>
PPO_CLONES PolicySums policy_block(const PolicyBlock<T>& in, const PolicyOptions<T> o, T* grads) {
  T loss = 0, count = 0, d = 0, d2 = 0, k3 = 0, excess = 0;
  T high = 0, low = 0, dual = 0, clamped = 0, ratio_max = -1;
  const T *logp = in.logp, *old = in.old, *adv = in.adv, *weights = in.weights, *live = in.live;
  const T row_weight = in.row_weight;
  T excesses[kBlock];
#pragma omp simd reduction(+ : loss, count, d, d2, k3, excess, high, low, dual, clamped) reduction(max : ratio_max)
  for (int64_t i = 0; i < in.n; ++i) {
    const T l = logp[i], l_old = old[i], a = adv[i], w = weights[i], one = live[i];
    const bool valid = one != T(0);
    const PolicyTerm<T> term =
        policy_term(valid ? l : T(0), valid ? l_old : T(0), valid ? a : T(0), valid ? w : T(0), o);
    loss += term.loss;
    grads[i] = valid ? term.grad * row_weight : T(0);
    count += one;
    d += term.d;
    d2 += term.d * term.d;
    k3 += term.k3;
    excess += term.ratio_minus_1;
    excesses[i] = term.ratio_minus_1;
    high += term.high;
    low += term.low;
    dual += term.dual;
    clamped += term.clamped;
    const T above = valid ? term.ratio_minus_1 : T(-1);
    ratio_max = above > ratio_max ? above : ratio_max;
  }
  PolicySums sums;
  if (count == T(0)) return sums;
  const double mean = static_cast<double>(excess) / static_cast<double>(count);
  double m2 = 0.0;
#pragma omp simd reduction(+ : m2)
  for (int64_t i = 0; i < in.n; ++i) {
    const double e = static_cast<double>(excesses[i]) - mean;
    m2 += live[i] != T(0) ? e * e : 0.0;
  }
  sums.loss = loss, sums.d = d, sums.d2 = d2, sums.k3 = k3;
  sums.excess = {static_cast<double>(count), mean, m2};
  sums.high = high, sums.low = low, sums.dual = dual, sums.clamped = clamped;
  sums.ratio_max = std::isnan(excess) ? static_cast<double>(excess) : static_cast<double>(ratio_max) + 1.0;
  return sums;
}

template <class T>
struct KlPenalty {
  T coef;
  int64_t estimator;
  T log_clamp, value_clamp;
};

template <class T>
struct PolicyInputs {
  TokenView<T> logp, old, adv, weights, ref;
  TokenView<uint8_t> mask;
  const T* row_weight;
  T* grad;
};

template <class T>
PolicySums policy_piece(const PolicyInputs<T>& in, const Rows& rows, const Piece& piece, const PolicyOptions<T>& o,
                        const KlPenalty<T>& kl) {
  T adv[kBlock], weights[kBlock], live[kBlock], unwanted[kBlock];
  std::fill(live, live + kBlock, T(1));
  PolicySums sums;
  const T row_weight = in.row_weight ? in.row_weight[piece.row] : T(1);
  for (int64_t begin = piece.begin; begin < piece.begin + piece.length; begin += kBlock) {
    const int64_t n = std::min(kBlock, piece.begin + piece.length - begin);
    const auto at = [&](const auto& view, auto absent, auto* scratch) {
      return block_of(view, rows, piece.row, begin, n, absent, scratch);
    };
    const T* logp = in.logp.row(rows, piece.row) + begin;
    T* grads = in.grad != nullptr ? in.grad + rows.start(piece.row) + begin : unwanted;
    live_of(in.mask, rows, piece.row, begin, n, live);
    PolicySums block = policy_block<T>({logp, in.old.row(rows, piece.row) + begin, at(in.adv, T(0), adv),
                                        at(in.weights, T(1), weights), live, n, row_weight},
                                       o, grads);
    if (in.ref.data != nullptr) {
      block.ref_kl = dispatch_estimator(kl.estimator, [&](auto estimator) {
        return kl_block<estimator(), true>(logp, in.ref.row(rows, piece.row) + begin, live, n, kl.log_clamp,
                                           kl.value_clamp, kl.coef * row_weight, grads);
      });
      block.loss += static_cast<double>(kl.coef) * block.ref_kl;
    }
    block.loss = block.excess.count > 0.0 ? block.loss * row_weight : 0.0;
    sums.add(block);
  }
  return sums;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss(const Tensor& logprobs, const Tensor& old_logprobs,
                                                       const Tensor& advantages, const OptTensor& mask,
                                                       const OptTensor& weights, const OptTensor& ref_logprobs,
                                                       const OptTensor& row_weight, const OptTensor& normalizer,
                                                       const OptTensor& cu_seqlens, const OptTensor& kl_coef_tensor,
                                                       double cliprange_low, double cliprange_high, double dual_clip,
                                                       double log_ratio_clamp, double kl_coef, int64_t kl_estimator,
                                                       double kl_log_clamp, double kl_clamp, bool grad) {
  PPO_COUNT("policy_loss");
  check_estimator(kl_estimator);
  const Rows rows(logprobs, cu_seqlens);
  return dispatch_compute(logprobs, [&](auto zero) {
    using T = decltype(zero);
    const auto view = [&](const OptTensor& x, bool per_row = false) {
      return token_view<T>(x, logprobs, rows, per_row);
    };
    const PolicyOptions<T> options{static_cast<T>(1.0 - cliprange_low), static_cast<T>(1.0 + cliprange_high),
                                   static_cast<T>(dual_clip), static_cast<T>(log_ratio_clamp)};
    const Dense<double> coef(kl_coef_tensor, 1, ScalarType::Double);
    const KlPenalty<T> kl{static_cast<T>(coef ? coef[0] : kl_coef), kl_estimator, static_cast<T>(kl_log_clamp),
                          static_cast<T>(kl_clamp)};
    const Dense<T> row_weights(row_weight, rows.count(), dtype_of<T>());
    Tensor gradient = new_gradient(logprobs, rows, grad);
    const PolicyInputs<T> in{view(logprobs),         view(old_logprobs),
                             view(advantages, true), view(weights, true),
                             view(ref_logprobs),     token_view<uint8_t>(mask, logprobs, rows),
                             row_weights.data(),     grad ? static_cast<T*>(gradient.data_ptr()) : nullptr};
    const std::vector<Piece> pieces = cut_rows(rows);
    std::vector<PolicySums> parts(pieces.size());
    const int64_t mean_length = logprobs.numel() / std::max<int64_t>(pieces.size(), 1);
    for_each(pieces.size(), 4096 / std::max<int64_t>(mean_length, 1),
             [&](int64_t i) { parts[i] = policy_piece(in, rows, pieces[i], options, kl); });
    PolicySums s;
    for (const PolicySums& part : parts) s.add(part);

    std::vector<double> stats(12, 0.0);
    const double n = s.excess.count;
    if (n > 0.0) {
      stats = {-s.d / n,   0.5 * s.d2 / n, s.k3 / n,   1.0 + s.excess.mean, s.excess.m2 / n, s.ratio_max,
               s.high / n, s.low / n,      s.dual / n, s.ref_kl / n,        s.clamped / n,   n};
    }
    LossOutputs out = finish_loss<T>(s.loss, n, normalizer, stats, gradient, logprobs);
    return std::make_tuple(out.loss, out.stats, out.grad, out.inv_normalizer);
  });
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CPU, m) { m.impl("policy_loss", TORCH_BOX(&ppo::policy_loss)); }
