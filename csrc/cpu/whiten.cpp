// Moments and whitening on CPU tensors: two passes over fixed chunks, merged in order.
#include <cmath>

#include "checks.h"
#include "math/moments.h"

namespace ppo {
namespace {

constexpr int64_t kChunk = 16384;  // elements; small enough that the second pass of a chunk reads the cache

template <class T>
PPO_CLONES Moments chunk_moments(const T* x, const uint8_t* mask, int64_t n) {
  double count = 0.0, sum = 0.0, m2 = 0.0;
#pragma omp simd reduction(+ : count, sum)
  for (int64_t i = 0; i < n; ++i) {
    const bool valid = mask == nullptr || mask[i] != 0;
    count += valid ? 1.0 : 0.0;
    sum += valid ? static_cast<double>(x[i]) : 0.0;
  }
  if (count == 0.0) return {};
  const double mean = sum / count;
#pragma omp simd reduction(+ : m2)
  for (int64_t i = 0; i < n; ++i) {
    const double d = mask == nullptr || mask[i] != 0 ? static_cast<double>(x[i]) - mean : 0.0;
    m2 += d * d;
  }
  return {count, mean, m2};
}

template <class T>
PPO_CLONES void whiten_chunk(const T* x, const uint8_t* mask, int64_t n, double mean, double scale, double shift,
                             T* y) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const bool valid = mask == nullptr || mask[i] != 0;
    y[i] = valid ? static_cast<T>((static_cast<double>(x[i]) - mean) * scale + shift) : T(0);
  }
}

const uint8_t* mask_data(const Tensor& x, const OptTensor& mask) {
  STD_TORCH_CHECK(x.is_contiguous(), "expected a contiguous tensor");
  if (!mask.has_value()) return nullptr;
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool || mask->scalar_type() == ScalarType::Byte,
                  "masks are bytes");
  STD_TORCH_CHECK(mask->is_contiguous(), "expected a contiguous mask");
  check_same_shape(*mask, x);
  return static_cast<const uint8_t*>(mask->data_ptr());
}

template <class F>
void for_each_chunk(int64_t total, const F& f) {
  for_each((total + kChunk - 1) / kChunk, 1, [&](int64_t i) {
    const int64_t begin = i * kChunk;
    f(i, begin, std::min(kChunk, total - begin));
  });
}

template <class T>
Moments all_moments(const Tensor& x, const uint8_t* mask) {
  const auto* data = static_cast<const T*>(x.data_ptr());
  std::vector<Moments> parts((x.numel() + kChunk - 1) / kChunk);
  for_each_chunk(x.numel(), [&](int64_t i, int64_t begin, int64_t n) {
    parts[i] = chunk_moments(data + begin, mask ? mask + begin : nullptr, n);
  });
  Moments total;
  for (const Moments& part : parts) total.merge(part);
  return total;
}

std::tuple<Tensor, Tensor, Tensor> moments(const Tensor& x, const OptTensor& mask) {
  PPO_COUNT("moments");
  const Moments found =
      dispatch_compute(x, [&](auto zero) { return all_moments<decltype(zero)>(x, mask_data(x, mask)); });
  const auto scalar = [&](double value) {
    Tensor t = empty({}, ScalarType::Double, x);
    *static_cast<double*>(t.data_ptr()) = value;
    return t;
  };
  return {scalar(found.count), scalar(found.mean), scalar(found.m2)};
}

Tensor whiten(const Tensor& x, const OptTensor& mask, const OptTensor& count, const OptTensor& mean,
              const OptTensor& m2, bool shift_mean, bool unbiased, double eps) {
  PPO_COUNT("whiten");
  return dispatch_compute(x, [&](auto zero) {
    using T = decltype(zero);
    const uint8_t* m = mask_data(x, mask);
    Moments stats;
    if (count.has_value()) {
      STD_TORCH_CHECK(mean.has_value() && m2.has_value(), "count, mean and m2 come together");
      const auto scalar = [](const OptTensor& t) { return Dense<double>(t, 1, ScalarType::Double)[0]; };
      stats = {scalar(count), scalar(mean), scalar(m2)};
    } else {
      stats = all_moments<T>(x, m);
    }
    const double spread = stats.variance(unbiased) + eps;
    const double scale = spread == 0.0 ? 0.0 : 1.0 / std::sqrt(spread);
    Tensor y = empty(x.sizes(), dtype_of<T>(), x);
    const auto* in = static_cast<const T*>(x.data_ptr());
    auto* out = static_cast<T*>(y.data_ptr());
    for_each_chunk(x.numel(), [&](int64_t, int64_t begin, int64_t n) {
      whiten_chunk(in + begin, m ? m + begin : nullptr, n, stats.mean, scale, shift_mean ? 0.0 : stats.mean,
                   out + begin);
    });
    return y;
  });
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CPU, m) {
  m.impl("moments", TORCH_BOX(&ppo::moments));
  m.impl("whiten", TORCH_BOX(&ppo::whiten));
}
