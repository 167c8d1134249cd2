// Token log-probabilities and entropy on CPU tensors: one pass over the logits, in blocks that stay in the L1 cache.
#include "math/token_logprobs.h"

#include <array>

#include "cpu/avx512.h"
#include "cpu/block.h"
#include "cpu/pages.h"
#include "math/half.h"
#include "math/labels.h"
#include "token_logprobs.h"

namespace ppo {
namespace {

constexpr int64_t kLogitBlock = 4096;  // logits; a function of nothing, so that a row's bits depend on the row alone

template <class T>
using Scratch = std::array<T, kLogitBlock>;

// A block is summed in float32 lanes of 16 terms each, and the lanes in float64: a bias in the rounding cannot add up
// over a vocabulary. The portable loops have this many lanes.
constexpr int64_t kLanes = 256;
constexpr int64_t kWide = 64;  // lanes that stay in registers

// The maximum of a block, in as many lanes as stay in registers. With kConvert its logits also go to z as T.
template <bool kConvert, class In, class T>
PPO_CLONES T portable_max_block(const In* x, int64_t n, T* z) {
  T lanes[kWide], max = -std::numeric_limits<T>::infinity();
  std::fill(lanes, lanes + kWide, max);
  const int64_t whole = n / kWide * kWide;
  for (int64_t begin = 0; begin < whole; begin += kWide) {
#pragma omp simd
    for (int64_t i = 0; i < kWide; ++i) {
      const T value = to_compute(x[begin + i]);
      if constexpr (kConvert) z[begin + i] = value;
      lanes[i] = value > lanes[i] ? value : lanes[i];
    }
  }
  for (int64_t i = whole; i < n; ++i) {
    const T value = to_compute(x[i]);
    if constexpr (kConvert) z[i] = value;
    max = value > max ? value : max;
  }
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < kWide; ++i) max = lanes[i] > max ? lanes[i] : max;
  return max;
}

template <bool kConvert, class In, class T>
T max_block(const In* x, int64_t n, T* z) {
  if constexpr (avx512::kBuilt && std::is_same_v<T, float>) {
    if (avx512::here()) return avx512::max_block<kConvert>(x, n, z);
  }
  return portable_max_block<kConvert>(x, n, z);
}

template <class T>
PPO_CLONES double sum_lanes(const T* lanes) {
  double total = 0.0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < kLanes; ++i) total += static_cast<double>(lanes[i]);
  return total;
}

// The sums over n logits, a multiple of kLanes, of 2^x with x = (z - max) c and, with kEntropy, of 2^x * x. A few lanes
// at a time, which stay in registers.
template <bool kEntropy, class T>
PPO_CLONES SoftmaxPart portable_sum_block(const T* z, int64_t n, T max, T c) {
  alignas(64) T sums[kLanes], weighted[kLanes];
  for (int64_t lane = 0; lane < kLanes; lane += kWide) {
    T sum[kWide] = {}, sum_weighted[kWide] = {};
    for (int64_t begin = lane; begin < n; begin += kLanes) {
#pragma omp simd
      for (int64_t i = 0; i < kWide; ++i) {
        const T x = least_exponent((z[begin + i] - max) * c), e = exp2_nonpositive(x);
        sum[i] += e;
        if constexpr (kEntropy) sum_weighted[i] += e * x;
      }
    }
    std::copy(sum, sum + kWide, sums + lane);
    if constexpr (kEntropy) std::copy(sum_weighted, sum_weighted + kWide, weighted + lane);
  }
  return {static_cast<double>(max), sum_lanes(sums), kEntropy ? sum_lanes(weighted) : 0.0};
}

// `next` is what will be read after it.
template <bool kEntropy, class In, class T>
SoftmaxPart sum_block(const T* z, int64_t n, T max, T c, const In* next) {
  if constexpr (avx512::kBuilt && std::is_same_v<T, float>) {
    if (avx512::here()) return avx512::sum_block<kEntropy>(z, n, max, c, next);
  }
  return portable_sum_block<kEntropy>(z, n, max, c);
}

// The statistics of all logits but the target, whose value goes to *target.
template <class In, class T>
SoftmaxPart scan_row(const In* x, int64_t vocab, int64_t label, double c, bool entropy, T* target) {
  alignas(64) Scratch<T> scratch;
  SoftmaxPart others = empty_softmax();
  for (int64_t begin = 0; begin < vocab; begin += kLogitBlock) {
    const int64_t n = std::min(kLogitBlock, vocab - begin);
    const bool has_target = label >= begin && label < begin + n;
    const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
    const bool in_place = std::is_same_v<In, T> && !has_target && n == padded;
    T max = in_place ? max_block<false>(x + begin, n, scratch.data()) : max_block<true>(x + begin, n, scratch.data());
    const T* z = scratch.data();
    if constexpr (std::is_same_v<In, T>) z = in_place ? x + begin : z;
    std::fill(scratch.data() + n, scratch.data() + padded, -std::numeric_limits<T>::infinity());
    if (has_target) {
      T& taken = scratch[label - begin];
      *target = taken;
      taken = -std::numeric_limits<T>::infinity();
      if (*target == max) max = max_block<false>(scratch.data(), n, scratch.data());
    }
    // A block of -inf alone has no maximum to subtract, and no sum; a NaN in it still shows.
    const T base = max == -std::numeric_limits<T>::infinity() ? T(0) : max;
    SoftmaxPart part = entropy ? sum_block<true>(z, padded, base, static_cast<T>(c), x + begin + n)
                               : sum_block<false>(z, padded, base, static_cast<T>(c), x + begin + n);
    part.max = max;
    if (max == -std::numeric_limits<T>::infinity()) part.sum *= 0.0, part.weighted *= 0.0;
    others = merge(others, part, c);
  }
  return others;
}

template <bool kEntropy, class In, class T>
PPO_CLONES void portable_gradient_block(const In* in, int64_t n, T max, T c, T a, T b, T k, In* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T z = to_compute(in[i]);
    from_compute(kEntropy ? logit_gradient(z, max, c, a, b, k) : logp_gradient(z, max, c, a), out[i]);
  }
}

template <bool kEntropy, class In, class T>
void gradient_block(const In* in, int64_t n, T max, T c, T a, T b, T k, In* out) {
  if constexpr (avx512::kBuilt && std::is_same_v<T, float>) {
    if (avx512::here()) return avx512::gradient_block<kEntropy>(in, n, max, c, a, b, k, out);
  }
  portable_gradient_block<kEntropy>(in, n, max, c, a, b, k, out);
}

// The offset of row i of a [..., V] tensor with any leading strides.
class RowOffsets {
 public:
  explicit RowOffsets(const Tensor& x) : contiguous_(x.is_contiguous()), vocab_(x.size(x.dim() - 1)) {
    if (contiguous_) return;
    for (int64_t d = 0; d < x.dim() - 1; ++d) {
      sizes_.push_back(x.size(d));
      strides_.push_back(x.stride(d));
    }
  }
  int64_t operator()(int64_t row) const {
    if (contiguous_) return row * vocab_;
    int64_t offset = 0;
    for (int64_t d = static_cast<int64_t>(sizes_.size()) - 1; d >= 0; --d) {
      offset += row % sizes_[d] * strides_[d];
      row /= sizes_[d];
    }
    return offset;
  }

 private:
  bool contiguous_;
  int64_t vocab_;
  std::vector<int64_t> sizes_, strides_;
};

template <class F>
auto dispatch_logits(const Tensor& logits, F&& f) {
  switch (logits.scalar_type()) {
    case ScalarType::BFloat16:
      return f(BFloat16{}, float{});
    case ScalarType::Half:
      return f(Float16{}, float{});
    case ScalarType::Float:
      return f(float{}, float{});
    default:
      PPO_CHECK(logits.scalar_type() == ScalarType::Double, "logits must be floating, got ",
                dtype_name(logits.scalar_type()));
  }
  return f(double{}, double{});
}

int64_t row_grain(int64_t vocab) { return std::max<int64_t>(1, 16384 / vocab); }

// The likeliest label of a row.
template <class In>
Anchor anchor_of(const RowLabels& labels, const In* x) {
  Anchor anchor;
  const auto logit_of = [x](int64_t label) { return static_cast<double>(to_compute(x[label])); };
  for (int64_t k = 0; k < labels.count; ++k) anchor.merge(labels, k, logit_of);
  return anchor;
}

// Writes the labels' log-probabilities and returns the rest of the row.
template <class In, class T>
SoftmaxRow forward_row(const In* x, const RowLabels& labels, double c, bool entropy, T* logp) {
  std::fill(logp, logp + labels.count, T(0));
  const Anchor anchor = anchor_of(labels, x);
  if (!anchor.counts) return row_not_read();
  SoftmaxRow row = row_of(std::numeric_limits<double>::quiet_NaN());
  if (anchor.label >= 0) {
    T target = T(0);
    const SoftmaxPart others = scan_row(x, labels.vocab, anchor.label, c, entropy, &target);
    row = finish_row(others, static_cast<double>(target), c);
  }
  for (int64_t k = 0; k < labels.count; ++k) {
    if (!labels.counts(k)) continue;
    const T z = labels.inside(k) ? to_compute(x[labels.data[k]]) : std::numeric_limits<T>::quiet_NaN();
    logp[k] = static_cast<T>(row.logp(static_cast<double>(z), c));
  }
  if (anchor.outside) row.entropy = std::numeric_limits<double>::quiet_NaN();
  return row;
}

std::tuple<Tensor, Tensor> token_logprobs(const Tensor& logits, const Tensor& labels, const OptTensor& mask,
                                          const OptTensor& temperature_rows, double temperature, int64_t ignore_index,
                                          bool entropy) {
  PPO_COUNT("token_logprobs");
  check_logits(logits);
  const RowOffsets offsets(logits);
  const int64_t vocab = logits.size(logits.dim() - 1), rows = logits.numel() / vocab;
  const int64_t many = labels_per_row(labels, logits);
  return dispatch_logits(logits, [&](auto in_zero, auto zero) {
    using In = decltype(in_zero);
    using T = decltype(zero);
    const Sizes shape = leading_sizes(logits);
    const RowVector<int64_t> label("labels", labels, labels.sizes());
    const RowVector<double> tau("temperature_rows", temperature_rows, shape);
    const RowVector<uint8_t> valid("mask", mask, shape);
    Tensor logp_out = empty(labels.sizes(), dtype_of<T>(), logits);
    Tensor stats_out = empty(stats_shape(shape, entropy), dtype_of<T>(), logits);
    auto* logp = data_of<T>(logp_out);
    auto* row_max = data_of<T>(stats_out);
    auto* log_sum = row_max + rows;
    auto* h = log_sum + rows;
    const auto* data = data_of<const In>(logits);
    for_each(rows, row_grain(vocab), [&](int64_t i) {
      SoftmaxRow row = row_not_read();
      if (!valid || valid[i] != 0) {
        const RowLabels of_row{label.data() + i * many, many, vocab, ignore_index};
        const double c = kLog2E / usable_temperature<T>(tau ? tau[i] : temperature);
        row = forward_row(data + offsets(i), of_row, c, entropy, logp + i * many);
      } else {
        std::fill(logp + i * many, logp + (i + 1) * many, T(0));
      }
      row_max[i] = static_cast<T>(row.max);
      log_sum[i] = static_cast<T>(row.log_sum);
      if (entropy) h[i] = static_cast<T>(row.entropy);
    });
    return std::make_tuple(logp_out, stats_out);
  });
}

// The incoming gradients of a row and what the forward left of it; `g_logp` is null for zeros.
template <class T>
struct GradientInputs {
  const T *g_logp, *logp;
  double g_entropy, entropy, max, log_sum, tau;
};

// The gradient of each label, over what the loop over all logits left there. A row may have a label several times.
template <class In, class T>
void write_labels(const RowLabels& labels, const GradientInputs<T>& in, const SoftmaxGradient& row, double all,
                  In* out) {
  const auto gradient = [&](int64_t k) { return in.g_logp != nullptr ? static_cast<double>(in.g_logp[k]) : 0.0; };
  const auto write = [&](int64_t k, double own, double others) {
    from_compute(static_cast<T>(row.label(static_cast<double>(in.logp[k]), own, others)), out[labels.data[k]]);
  };
  if (labels.count == 1) {
    if (labels.inside(0)) write(0, gradient(0), 0.0);
    return;
  }
  std::vector<int64_t> order;
  for (int64_t k = 0; k < labels.count; ++k) {
    if (labels.counts(k) && labels.inside(k)) order.push_back(k);
  }
  const int64_t* y = labels.data;
  std::sort(order.begin(), order.end(), [y](int64_t a, int64_t b) { return y[a] != y[b] ? y[a] < y[b] : a < b; });
  for (size_t i = 0; i < order.size();) {
    const int64_t k = order[i];
    double own = 0.0;
    for (; i < order.size() && y[order[i]] == y[k]; ++i) own += gradient(order[i]);
    write(k, own, all - own);
  }
}

template <class In, class T>
void backward_row(const In* in, const RowLabels& labels, const GradientInputs<T>& given, In* out) {
  LabelGradients g;
  for (int64_t k = 0; k < labels.count; ++k) {
    g.add(labels, k, given.g_logp != nullptr ? static_cast<double>(given.g_logp[k]) : 0.0);
  }
  const int64_t vocab = labels.vocab;
  if (given.log_sum == kNotRead || (!g.any && given.g_entropy == 0.0)) {
    std::fill(out, out + vocab, In{});
    return;
  }
  const SoftmaxGradient row(g.sum, given.g_entropy, given.tau, given.entropy, given.log_sum);
  const auto block = row.b == 0.0 ? gradient_block<false, In, T> : gradient_block<true, In, T>;
  for (int64_t begin = 0; begin < vocab; begin += kLogitBlock) {
    block(in + begin, std::min(kLogitBlock, vocab - begin), static_cast<T>(given.max),
          static_cast<T>(kLog2E / given.tau), static_cast<T>(row.a), static_cast<T>(row.b), static_cast<T>(row.k),
          out + begin);
  }
  write_labels(labels, given, row, g.sum, out);
}

void backward_into(const Tensor& out, const Tensor& logits, const Tensor& labels, const OptTensor& temperature_rows,
                   const OptTensor& grad_logprobs, const OptTensor& grad_entropy, const Tensor& logprobs,
                   const Tensor& softmax_stats, double temperature, int64_t ignore_index) {
  check_logits(logits);
  const RowOffsets offsets(logits), out_offsets(out);
  const int64_t vocab = logits.size(logits.dim() - 1), rows = logits.numel() / vocab;
  const int64_t many = labels_per_row(labels, logits);
  dispatch_logits(logits, [&](auto in_zero, auto zero) {
    using In = decltype(in_zero);
    using T = decltype(zero);
    const Sizes shape = leading_sizes(logits), of_labels = labels.sizes();
    const RowVector<int64_t> label("labels", labels, of_labels);
    const RowVector<double> tau("temperature_rows", temperature_rows, shape);
    const RowVector<T> g_logp("grad_logprobs", grad_logprobs, of_labels), logp("logprobs", logprobs, of_labels);
    const RowVector<T> g_h("grad_entropy", grad_entropy, shape),
        stats("softmax_stats", softmax_stats, stats_shape(softmax_stats, shape, grad_entropy.has_value()));
    const auto* data = data_of<const In>(logits);
    auto* gradient = data_of<In>(out);
    for_each(rows, row_grain(vocab), [&](int64_t i) {
      const GradientInputs<T> given{g_logp ? g_logp.data() + i * many : nullptr,
                                    logp.data() + i * many,
                                    g_h ? static_cast<double>(g_h[i]) : 0.0,
                                    g_h ? static_cast<double>(stats[2 * rows + i]) : 0.0,
                                    static_cast<double>(stats[i]),
                                    static_cast<double>(stats[rows + i]),
                                    usable_temperature<T>(tau ? tau[i] : temperature)};
      backward_row(data + offsets(i), RowLabels{label.data() + i * many, many, vocab, ignore_index}, given,
                   gradient + out_offsets(i));
    });
    return 0;
  });
}

Tensor huge_like(const Tensor& logits) { return on_huge_pages(new_like(logits)); }

using Backward = TokenLogprobsBackward<decltype(backward_into), &backward_into, &huge_like>;

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CPU, m) {
  PPO_IMPL(m, "token_logprobs", ppo::token_logprobs);
  PPO_IMPL(m, "token_logprobs_backward", ppo::Backward::returned);
  PPO_IMPL(m, "token_logprobs_backward_", ppo::Backward::in_place);
}
