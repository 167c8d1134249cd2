// The pairwise policy loss on CPU tensors: sums over rows, then pairs, then the gradient, the same for every token of a
// row.
#include <array>

#include "cpu/block.h"
#include "cpu/loss.h"
#include "math/pairwise.h"

namespace ppo {
namespace {

struct RowSums {
  double margin = 0.0, shift = 0.0, count = 0.0;

  void add(const RowSums& o) { margin += o.margin, shift += o.shift, count += o.count; }
};

template <class T>
PPO_CLONES RowSums sum_block(const T* logp, const T* old, const T* ref, const T* live, int64_t n) {
  double margin = 0.0, shift = 0.0, count = 0.0;
#pragma omp simd reduction(+ : margin, shift, count)
  for (int64_t i = 0; i < n; ++i) {
    const T one = live[i], l = logp[i], l_old = old[i], l_ref = ref[i];
    const bool valid = one != T(0);
    const double now = valid ? l : T(0), before = valid ? l_old : T(0), frozen = valid ? l_ref : T(0);
    shift += now - before;
    margin += now - frozen;
    count += static_cast<double>(one);
  }
  return {margin, shift, count};
}

template <class T>
PPO_CLONES void spread_block(const T* live, int64_t n, T value, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = live[i] != T(0) ? value : T(0);
}

template <class T>
struct P3OInputs {
  TokenView<T> logp, old, ref;
  TokenView<uint8_t> mask;
};

// A block that is not full vectors is padded: a token's place in the sum must not depend on the padding of its row.
template <class T>
RowSums sum_piece(const P3OInputs<T>& in, const Rows& rows, const Piece& piece) {
  constexpr int64_t kVectors = 64;
  T live[kBlock], copies[3][kBlock];
  std::fill(live, live + kBlock, T(1));
  RowSums sums;
  for (int64_t begin = piece.begin; begin < piece.begin + piece.length; begin += kBlock) {
    const int64_t n = std::min(kBlock, piece.begin + piece.length - begin);
    const int64_t padded = (n + kVectors - 1) / kVectors * kVectors;
    const T* tokens[3] = {in.logp.row(rows, piece.row) + begin, in.old.row(rows, piece.row) + begin,
                          in.ref.row(rows, piece.row) + begin};
    live_of(in.mask, rows, piece.row, begin, n, live);
    if (n < padded) {
      std::fill(live + n, live + padded, T(0));
      for (int k = 0; k < 3; ++k) {
        std::copy(tokens[k], tokens[k] + n, copies[k]);
        std::fill(copies[k] + n, copies[k] + padded, T(0));
        tokens[k] = copies[k];
      }
    }
    sums.add(sum_block(tokens[0], tokens[1], tokens[2], live, padded));
  }
  return sums;
}

template <class T>
void spread_piece(const P3OInputs<T>& in, const Rows& rows, const Piece& piece, T value, T* grad) {
  T live[kBlock];
  std::fill(live, live + kBlock, T(1));
  for (int64_t begin = piece.begin; begin < piece.begin + piece.length; begin += kBlock) {
    const int64_t n = std::min(kBlock, piece.begin + piece.length - begin);
    spread_block(live_of(in.mask, rows, piece.row, begin, n, live), n, value, grad + rows.start(piece.row) + begin);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> p3o_loss(const Tensor& logprobs, const Tensor& old_logprobs,
                                                    const Tensor& ref_logprobs, const Tensor& scores,
                                                    const OptTensor& mask, const OptTensor& normalizer,
                                                    const OptTensor& cu_seqlens, const OptTensor& kl_coef_tensor,
                                                    int64_t variant, int64_t group_size, double kl_coef,
                                                    double cliprange, double weight_clip, double log_ratio_clamp,
                                                    bool grad) {
  PPO_COUNT("p3o_loss");
  const Rows rows(logprobs, cu_seqlens);
  STD_TORCH_CHECK(group_size >= 1 && rows.count() % group_size == 0, "expected rows in groups of ", group_size);
  return dispatch_compute(logprobs, [&](auto zero) {
    using T = decltype(zero);
    const P3OInputs<T> in{token_view<T>(logprobs, logprobs, rows), token_view<T>(old_logprobs, logprobs, rows),
                          token_view<T>(ref_logprobs, logprobs, rows), token_view<uint8_t>(mask, logprobs, rows)};
    const Dense<T> score(scores, rows.count(), dtype_of<T>());
    const Dense<double> coef(kl_coef_tensor, 1, ScalarType::Double);
    const PairOptions options =
        pair_options(variant, coef ? coef[0] : kl_coef, cliprange, weight_clip, log_ratio_clamp);

    const std::vector<Piece> pieces = cut_rows(rows);
    const int64_t mean_length = logprobs.numel() / std::max<int64_t>(pieces.size(), 1);
    const int64_t grain = 4096 / std::max<int64_t>(mean_length, 1);
    std::vector<RowSums> parts(pieces.size()), by_row(rows.count());
    for_each(pieces.size(), grain, [&](int64_t i) { parts[i] = sum_piece(in, rows, pieces[i]); });
    for (size_t i = 0; i < pieces.size(); ++i) by_row[pieces[i].row].add(parts[i]);

    std::vector<Response> responses(rows.count());
    std::vector<std::array<double, kPairSums>> terms(rows.count());
    std::vector<T> slopes(rows.count());
    double ratio_max = 0.0;
    for (int64_t b = 0; b < rows.count(); ++b) {
      const RowSums& sums = by_row[b];
      responses[b] = response(sums.count > 0.0, score[b], sums.margin, sums.shift, options);
      if (responses[b].alive) ratio_max = larger_ratio(ratio_max, responses[b].ratio);
    }
    for_each(rows.count(), 1024 / group_size, [&](int64_t b) {
      terms[b] = {};
      const int64_t first = b / group_size * group_size;
      slopes[b] = static_cast<T>(response_terms(&responses[first], group_size, b - first, options, terms[b].data()));
    });
    double total[kPairSums] = {};
    for (const auto& term : terms) {
      for (int i = 0; i < kPairSums; ++i) total[i] += term[i];
    }

    Tensor gradient = new_gradient(logprobs, rows, grad);
    if (grad) {
      T* out = static_cast<T*>(gradient.data_ptr());
      for_each(pieces.size(), grain, [&](int64_t i) { spread_piece(in, rows, pieces[i], slopes[pieces[i].row], out); });
    }
    std::vector<double> stats(kP3OStats);
    p3o_stats(total, ratio_max, stats.data());
    LossOutputs out = finish_loss<T>(total[kPairLoss], 0.5 * total[kPairs], normalizer, stats, gradient, logprobs);
    return std::make_tuple(out.loss, out.stats, out.grad, out.inv_normalizer);
  });
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CPU, m) { m.impl("p3o_loss", TORCH_BOX(&ppo::p3o_loss)); }
