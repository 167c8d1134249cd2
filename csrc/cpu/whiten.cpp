// Moments and whitening on CPU tensors: two passes over blocks in the L1 cache, merged in order.
#include "math/whiten.h"

#include "cpu/block.h"
#include "cpu/pages.h"

namespace ppo {
namespace {

constexpr int64_t kWhitenChunk = 16384;  // elements that one partial result covers

template <class T>
PPO_CLONES Moments block_moments(const T* x, const T* valid, int64_t n) {
  T count = 0;
  double sum = 0.0, m2 = 0.0;
#pragma omp simd reduction(+ : count, sum)
  for (int64_t i = 0; i < n; ++i) {
    const T value = x[i], one = valid[i], kept = one != T(0) ? value : T(0);
    count += one;
    sum += static_cast<double>(kept);
  }
  if (count == T(0)) return {};
  const double mean = sum / static_cast<double>(count);
#pragma omp simd reduction(+ : m2)
  for (int64_t i = 0; i < n; ++i) {
    const double value = x[i], one = valid[i], d = one != 0.0 ? value - mean : 0.0;
    m2 += d * d;
  }
  return {static_cast<double>(count), mean, m2};
}

template <class T>
PPO_CLONES void whiten_block(const T* x, const T* valid, int64_t n, double mean, double scale, double shift, T* y) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T value = x[i], one = valid[i];
    const T white = static_cast<T>((static_cast<double>(value) - mean) * scale + shift);
    y[i] = one != T(0) ? white : T(0);
  }
}

// Calls f(chunk, x, valid, begin, n) for every block of every chunk, with `valid` 1 where the mask is set and 0
// elsewhere.
template <class T, class F>
void for_each_block(const T* x, const uint8_t* mask, int64_t total, const F& f) {
  for_each((total + kWhitenChunk - 1) / kWhitenChunk, 1, [&](int64_t chunk) {
    T valid[kBlock];
    std::fill(valid, valid + kBlock, T(1));
    const int64_t end = std::min(total, (chunk + 1) * kWhitenChunk);
    for (int64_t begin = chunk * kWhitenChunk; begin < end; begin += kBlock) {
      const int64_t n = std::min(kBlock, end - begin);
      if (mask != nullptr) convert_mask(mask + begin, n, valid);
      f(chunk, x + begin, valid, begin, n);
    }
  });
}

template <class T>
Moments all_moments(const Tensor& x, const uint8_t* mask) {
  std::vector<Moments> parts((x.numel() + kWhitenChunk - 1) / kWhitenChunk);
  for_each_block(contiguous_data<T>("x", x, x), mask, x.numel(),
                 [&](int64_t chunk, const T* block, const T* valid, int64_t, int64_t n) {
                   parts[chunk].merge(block_moments(block, valid, n));
                 });
  Moments total;
  for (const Moments& part : parts) total.merge(part);
  return total;
}

std::tuple<Tensor, Tensor, Tensor> moments(const Tensor& x, const OptTensor& mask) {
  PPO_COUNT("moments");
  const Moments found = dispatch_compute(
      x, [&](auto zero) { return all_moments<decltype(zero)>(x, contiguous_data<uint8_t>("mask", mask, x)); });
  const auto scalar = [&](double value) {
    Tensor t = empty({}, ScalarType::Double, x);
    *data_of<double>(t) = value;
    return t;
  };
  return {scalar(found.count), scalar(found.mean), scalar(found.m2)};
}

Tensor whiten(const Tensor& x, const OptTensor& mask, const OptTensor& count, const OptTensor& mean,
              const OptTensor& m2, bool shift_mean, bool unbiased, double eps) {
  PPO_COUNT("whiten");
  return dispatch_compute(x, [&](auto zero) {
    using T = decltype(zero);
    const uint8_t* m = contiguous_data<uint8_t>("mask", mask, x);
    Moments stats;
    check_together(count, mean, m2);
    if (count.has_value()) {
      const auto scalar = [](const char* name, const OptTensor& t) { return RowVector<double>(name, t, {})[0]; };
      stats = {scalar("count", count), scalar("mean", mean), scalar("m2", m2)};
    } else {
      stats = all_moments<T>(x, m);
    }
    const double scale = whiten_scale(stats, unbiased, eps);
    Tensor y = on_huge_pages(empty(x.sizes(), dtype_of<T>(), x));
    auto* out = data_of<T>(y);
    for_each_block(contiguous_data<T>("x", x, x), m, x.numel(),
                   [&](int64_t, const T* block, const T* valid, int64_t begin, int64_t n) {
                     whiten_block(block, valid, n, stats.mean, scale, shift_mean ? 0.0 : stats.mean, out + begin);
                   });
    return y;
  });
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CPU, m) {
  PPO_IMPL(m, "moments", ppo::moments);
  PPO_IMPL(m, "whiten", ppo::whiten);
}
