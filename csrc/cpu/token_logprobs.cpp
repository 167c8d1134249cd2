// Token log-probabilities and entropy on CPU tensors: one pass over the logits, in blocks that stay in the L1 cache.
#include "math/token_logprobs.h"

#include <array>

#include "cpu/avx512.h"
#include "cpu/block.h"
#include "cpu/pages.h"
#include "math/half.h"
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
  explicit RowOffsets(const Tensor& x) {
    const int64_t dims = x.dim() - 1;
    for (int64_t d = 0; d < dims; ++d) {
      sizes_.push_back(x.size(d));
      strides_.push_back(x.stride(d));
    }
    if (x.is_contiguous()) sizes_ = {x.numel() / x.size(dims)}, strides_ = {x.size(dims)};
  }
  int64_t operator()(int64_t row) const {
    int64_t offset = 0;
    for (int64_t d = static_cast<int64_t>(sizes_.size()) - 1; d >= 0; --d) {
      offset += row % sizes_[d] * strides_[d];
      row /= sizes_[d];
    }
    return offset;
  }

 private:
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

std::tuple<Tensor, Tensor, Tensor, Tensor> token_logprobs(const Tensor& logits, const Tensor& labels,
                                                          const OptTensor& mask, const OptTensor& temperature_rows,
                                                          double temperature, int64_t ignore_index, bool entropy) {
  PPO_COUNT("token_logprobs");
  check_logits(logits);
  const RowOffsets offsets(logits);
  const int64_t vocab = logits.size(logits.dim() - 1), rows = logits.numel() / vocab;
  return dispatch_logits(logits, [&](auto in_zero, auto zero) {
    using In = decltype(in_zero);
    using T = decltype(zero);
    const Sizes shape = leading_sizes(logits);
    const RowVector<int64_t> label("labels", labels, shape);
    const RowVector<double> tau("temperature_rows", temperature_rows, shape);
    const RowVector<uint8_t> valid("mask", mask, shape);
    const auto row_value = [&] { return empty(labels.sizes(), dtype_of<T>(), logits); };
    Tensor logp_out = row_value(), max_out = row_value(), sum_out = row_value();
    Tensor entropy_out = entropy ? row_value() : empty({0}, dtype_of<T>(), logits);
    auto* logp = data_of<T>(logp_out);
    auto* row_max = data_of<T>(max_out);
    auto* log_sum = data_of<T>(sum_out);
    auto* h = data_of<T>(entropy_out);
    const auto* data = data_of<const In>(logits);
    for_each(rows, row_grain(vocab), [&](int64_t i) {
      SoftmaxRow row{0.0, 0.0, 0.0, kNotRead};
      if (label[i] != ignore_index && (!valid || valid[i] != 0)) {
        T target = std::numeric_limits<T>::quiet_NaN();  // stays so for a label outside the row
        const double c = kLog2E / usable_temperature<T>(tau ? tau[i] : temperature);
        SoftmaxPart others = empty_softmax();
        if (label[i] >= 0 && label[i] < vocab) {
          others = scan_row(data + offsets(i), vocab, label[i], c, entropy, &target);
        }
        row = finish_row(others, static_cast<double>(target), c);
      }
      logp[i] = static_cast<T>(row.logp);
      row_max[i] = static_cast<T>(row.max);
      log_sum[i] = static_cast<T>(row.log_sum);
      if (entropy) h[i] = static_cast<T>(row.entropy);
    });
    return std::make_tuple(logp_out, entropy_out, max_out, sum_out);
  });
}

struct GradOutput {
  double logp, entropy;
};

template <class In, class T>
void backward_row(const In* in, int64_t vocab, int64_t label, GradOutput g, double tau, double logp, double h,
                  double row_max, double log_sum, In* out) {
  if (log_sum == kNotRead || (g.logp == 0.0 && g.entropy == 0.0)) {
    std::fill(out, out + vocab, In{});
    return;
  }
  const SoftmaxGradient row(g.logp, g.entropy, tau, logp, h, log_sum);
  const auto block = row.b == 0.0 ? gradient_block<false, In, T> : gradient_block<true, In, T>;
  for (int64_t begin = 0; begin < vocab; begin += kLogitBlock) {
    block(in + begin, std::min(kLogitBlock, vocab - begin), static_cast<T>(row_max), static_cast<T>(kLog2E / tau),
          static_cast<T>(row.a), static_cast<T>(row.b), static_cast<T>(row.k), out + begin);
  }
  if (label >= 0 && label < vocab) from_compute(static_cast<T>(row.target), out[label]);  // else the row is NaN already
}

void backward_into(const Tensor& out, const Tensor& logits, const Tensor& labels, const OptTensor& temperature_rows,
                   const OptTensor& grad_logprobs, const OptTensor& grad_entropy, const Tensor& logprobs,
                   const Tensor& entropy, const Tensor& row_max, const Tensor& log_sum, double temperature) {
  check_logits(logits);
  const RowOffsets offsets(logits), out_offsets(out);
  const int64_t vocab = logits.size(logits.dim() - 1), rows = logits.numel() / vocab;
  dispatch_logits(logits, [&](auto in_zero, auto zero) {
    using In = decltype(in_zero);
    using T = decltype(zero);
    const auto row_data = [&](const char* name, const OptTensor& x) {
      return RowVector<T>(name, x, leading_sizes(logits));
    };
    const Sizes shape = leading_sizes(logits);
    const RowVector<int64_t> label("labels", labels, shape);
    const RowVector<double> tau("temperature_rows", temperature_rows, shape);
    const RowVector<T> g_logp = row_data("grad_logprobs", grad_logprobs), g_h = row_data("grad_entropy", grad_entropy);
    const RowVector<T> logp = row_data("logprobs", logprobs), max = row_data("row_max", row_max),
                       sum = row_data("log_sum", log_sum);
    const RowVector<T> h = row_data("entropy", grad_entropy.has_value() ? OptTensor(entropy) : std::nullopt);
    const auto* data = data_of<const In>(logits);
    auto* gradient = data_of<In>(out);
    for_each(rows, row_grain(vocab), [&](int64_t i) {
      const GradOutput g{g_logp ? static_cast<double>(g_logp[i]) : 0.0, g_h ? static_cast<double>(g_h[i]) : 0.0};
      backward_row<In, T>(data + offsets(i), vocab, label[i], g, usable_temperature<T>(tau ? tau[i] : temperature),
                          logp[i], h ? h[i] : T(0), max[i], sum[i], gradient + out_offsets(i));
    });
    return 0;
  });
}

Tensor empty_like(const Tensor& x) { return on_huge_pages(torch::stable::new_empty(x, x.sizes())); }

using Backward = TokenLogprobsBackward<decltype(backward_into), &backward_into, &empty_like>;

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CPU, m) {
  PPO_IMPL(m, "token_logprobs", ppo::token_logprobs);
  PPO_IMPL(m, "token_logprobs_backward", ppo::Backward::returned);
  PPO_IMPL(m, "token_logprobs_backward_", ppo::Backward::in_place);
}
