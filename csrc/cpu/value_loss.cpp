// The clipped value loss on CPU tensors: loss, statistics and gradient from one pass.
#include "math/value_loss.h"

#include "cpu/block.h"
#include "cpu/loss.h"
#include "math/moments.h"

namespace ppo {
namespace {

struct ValueSums {
  double loss = 0.0, clipped = 0.0;
  Moments error, target;

  void add(const ValueSums& o) {
    loss += o.loss, clipped += o.clipped;
    error.merge(o.error), target.merge(o.target);
  }
};

template <class T>
struct ValueBlock {
  const T *values, *old, *returns, *live;
  T* grads;
  int64_t n;
  T row_weight;
};

template <class T>
PPO_CLONES ValueSums value_block(const ValueBlock<T>& in, T clip) {
  T loss = 0, clipped = 0;
  double count = 0.0, error_sum = 0.0, target_sum = 0.0, error_m2 = 0.0, target_m2 = 0.0;
  const T *values = in.values, *old = in.old, *returns = in.returns, *live = in.live;
  const T row_weight = in.row_weight;
  T* grads = in.grads;
#pragma omp simd reduction(+ : loss, clipped, count, error_sum, target_sum)
  for (int64_t i = 0; i < in.n; ++i) {
    const T v = values[i], v_old = old[i], r = returns[i], one = live[i];
    const bool valid = one != T(0);
    const T value = valid ? v : T(0), target = valid ? r : T(0);
    const ValueTerm<T> term = value_term(value, valid ? v_old : T(0), target, clip);
    loss += term.loss;
    grads[i] = valid ? term.grad * row_weight : T(0);
    clipped += term.clipped;
    count += one;
    error_sum += static_cast<double>(value) - static_cast<double>(target);
    target_sum += static_cast<double>(target);
  }
  if (count == 0.0) return {};
  const double error_mean = error_sum / count, target_mean = target_sum / count;
#pragma omp simd reduction(+ : error_m2, target_m2)
  for (int64_t i = 0; i < in.n; ++i) {
    const double v = values[i], r = returns[i], one = live[i];
    const double error = one != 0.0 ? v - r - error_mean : 0.0, target = one != 0.0 ? r - target_mean : 0.0;
    error_m2 += error * error;
    target_m2 += target * target;
  }
  ValueSums sums;
  sums.loss = static_cast<double>(loss) * in.row_weight;
  sums.clipped = clipped;
  sums.error = {count, error_mean, error_m2};
  sums.target = {count, target_mean, target_m2};
  return sums;
}

template <class T>
struct ValueInputs {
  TokenView<T> values, old, returns;
  TokenView<uint8_t> mask;
  const T* row_weight;
  T* grad;
};

template <class T>
ValueSums value_piece(const ValueInputs<T>& in, const Rows& rows, const Piece& piece, T clip) {
  T live[kBlock], unwanted[kBlock];
  std::fill(live, live + kBlock, T(1));
  ValueSums sums;
  const T row_weight = in.row_weight ? in.row_weight[piece.row] : T(1);
  for (int64_t begin = piece.begin; begin < piece.begin + piece.length; begin += kBlock) {
    const int64_t n = std::min(kBlock, piece.begin + piece.length - begin);
    sums.add(value_block<T>({in.values.row(rows, piece.row) + begin, in.old.row(rows, piece.row) + begin,
                             in.returns.row(rows, piece.row) + begin, live_of(in.mask, rows, piece.row, begin, n, live),
                             in.grad ? in.grad + rows.start(piece.row) + begin : unwanted, n, row_weight},
                            clip));
  }
  return sums;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> value_loss(const Tensor& values, const Tensor& old_values,
                                                      const Tensor& returns, const OptTensor& mask,
                                                      const OptTensor& row_weight, const OptTensor& normalizer,
                                                      const OptTensor& cu_seqlens, double cliprange_value, bool grad) {
  PPO_COUNT("value_loss");
  const Rows rows(values, cu_seqlens);
  return dispatch_compute(values, [&](auto zero) {
    using T = decltype(zero);
    const Dense<T> row_weights(row_weight, rows.count(), dtype_of<T>());
    Tensor gradient = new_gradient(values, rows, grad);
    const ValueInputs<T> in{token_view<T>(values, values, rows),
                            token_view<T>(old_values, values, rows),
                            token_view<T>(returns, values, rows),
                            token_view<uint8_t>(mask, values, rows),
                            row_weights.data(),
                            grad ? static_cast<T*>(gradient.data_ptr()) : nullptr};
    const std::vector<Piece> pieces = cut_rows(rows);
    std::vector<ValueSums> parts(pieces.size());
    const int64_t mean_length = values.numel() / std::max<int64_t>(pieces.size(), 1);
    for_each(pieces.size(), 4096 / std::max<int64_t>(mean_length, 1),
             [&](int64_t i) { parts[i] = value_piece(in, rows, pieces[i], static_cast<T>(cliprange_value)); });
    ValueSums s;
    for (const ValueSums& part : parts) s.add(part);

    const double n = s.error.count;
    const double explained = s.target.m2 > 0.0 ? 1.0 - s.error.m2 / s.target.m2 : 0.0;
    const std::vector<double> stats = {n > 0.0 ? s.clipped / n : 0.0, s.error.mean, n > 0.0 ? explained : 0.0, n};
    LossOutputs out = finish_loss<T>(s.loss, n, normalizer, stats, gradient, values);
    return std::make_tuple(out.loss, out.stats, out.grad, out.inv_normalizer);
  });
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CPU, m) { m.impl("value_loss", TORCH_BOX(&ppo::value_loss)); }
