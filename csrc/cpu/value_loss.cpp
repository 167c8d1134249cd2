// The clipped value loss on CPU tensors: loss, statistics and gradient from one pass.
#include "math/value_loss.h"

#include "cpu/loss.h"

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
  const T *values, *old, *returns, *valid;
  T* grads;
  int64_t n;
  T row_weight;
};

template <class T>
PPO_CLONES ValueSums value_block(const ValueBlock<T>& in, T clip) {
  T loss = 0, clipped = 0;
  double count = 0.0, error_sum = 0.0, target_sum = 0.0, error_m2 = 0.0, target_m2 = 0.0;
  const T *values = in.values, *old = in.old, *returns = in.returns, *valid = in.valid;
  const T row_weight = in.row_weight;
  T* grads = in.grads;
#pragma omp simd reduction(+ : loss, clipped, count, error_sum, target_sum)
  for (int64_t i = 0; i < in.n; ++i) {
    const T v = values[i], v_old = old[i], r = returns[i], one = valid[i];
    const bool is_valid = one != T(0);
    const T value = is_valid ? v : T(0), target = is_valid ? r : T(0);
    const ValueTerm<T> term = value_term(value, is_valid ? v_old : T(0), target, clip);
    loss += term.loss;
    grads[i] = is_valid ? term.grad * row_weight : T(0);
    clipped += term.clipped;
    count += one;
    error_sum += static_cast<double>(value) - static_cast<double>(target);
    target_sum += static_cast<double>(target);
  }
  if (count == 0.0) return {};
  const double error_mean = error_sum / count, target_mean = target_sum / count;
#pragma omp simd reduction(+ : error_m2, target_m2)
  for (int64_t i = 0; i < in.n; ++i) {
    const double v = values[i], r = returns[i], one = valid[i];
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
  TokenInput<T> values, old, returns;
  TokenInput<uint8_t> mask;
  const T* row_weight;
  T* grad;
};

template <class T>
ValueSums value_chunk(const ValueInputs<T>& in, const Rows& rows, const Chunk& chunk, T clip) {
  T valid[kBlock], unwanted[kBlock];
  std::fill(valid, valid + kBlock, T(1));
  ValueSums sums;
  const T row_weight = in.row_weight ? in.row_weight[chunk.row] : T(1);
  for_blocks(chunk, [&](int64_t begin, int64_t n) {
    sums.add(
        value_block<T>({in.values.row(rows, chunk.row) + begin, in.old.row(rows, chunk.row) + begin,
                        in.returns.row(rows, chunk.row) + begin, valid_block(in.mask, rows, chunk.row, begin, n, valid),
                        in.grad ? in.grad + rows.start(chunk.row) + begin : unwanted, n, row_weight},
                       clip));
  });
  return sums;
}

LossResult value_loss(const Tensor& values, const Tensor& old_values, const Tensor& returns, const OptTensor& mask,
                      const OptTensor& row_weight, const OptTensor& normalizer, const OptTensor& cu_seqlens,
                      double cliprange_value, bool grad) {
  PPO_COUNT("value_loss");
  const Rows rows(values, cu_seqlens);
  return dispatch_compute(values, [&](auto zero) {
    using T = decltype(zero);
    const auto input = [&](const char* name, const OptTensor& x) { return token_input<T>(name, x, values, rows); };
    const RowVector<T> row_weights("row_weight", row_weight, {rows.count});
    const Tensor gradient = new_gradient(values, rows, grad);
    const ValueInputs<T> in{input("values", values),   input("old_values", old_values),
                            input("returns", returns), token_input<uint8_t>("mask", mask, values, rows),
                            row_weights.data(),        grad ? data_of<T>(gradient) : nullptr};
    const std::vector<Chunk> chunks = cut_rows(rows);
    std::vector<ValueSums> parts(chunks.size());
    for_each(chunks.size(), grain_of(4096, values.numel(), chunks.size()),
             [&](int64_t i) { parts[i] = value_chunk(in, rows, chunks[i], static_cast<T>(cliprange_value)); });
    ValueSums s;
    for (const ValueSums& part : parts) s.add(part);
    const Tensor stats = empty({ValueStat::kCount}, dtype_of<T>(), values);
    value_stats(s.clipped, s.error, s.target, data_of<T>(stats));
    return finish_loss<T>(s.loss, s.error.count, normalizer, stats, gradient);
  });
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CPU, m) { PPO_IMPL(m, "value_loss", ppo::value_loss); }
