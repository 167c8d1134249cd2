// Blocks of tokens: plain arrays, short enough to stay in the L1 cache and to be summed in float32.
//
// The loops over them load unconditionally, choose with selects, and see no type but the one they compute in: a byte
// mask among floats makes the compiler fall back to vectors of two. So a block's mask is widened first, to 1 or 0; the
// selects still come before any arithmetic.
#pragma once

#include "checks.h"
#include "math/kl.h"

namespace ppo {

constexpr int64_t kBlock = 512;  // tokens that a float32 sum covers before it goes to float64

// A block of a token tensor as a plain array: in place, or a row-level or absent value spread over `scratch`.
template <class T>
const T* block_of(const TokenView<T>& view, const Rows& rows, int64_t row, int64_t begin, int64_t n, T absent,
                  T* scratch) {
  if (view.data != nullptr && !view.per_row) return view.row(rows, row) + begin;
  std::fill(scratch, scratch + n, view.data ? *view.row(rows, row) : absent);
  return scratch;
}

template <class T>
PPO_CLONES void widen_mask(const uint8_t* mask, int64_t n, T* live) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) live[i] = mask[i] != 0 ? T(1) : T(0);
}

// 1 for the valid tokens of a block, else 0; `scratch` without a mask holds ones already.
template <class T>
const T* live_of(const TokenView<uint8_t>& mask, const Rows& rows, int64_t row, int64_t begin, int64_t n, T* scratch) {
  if (mask.data != nullptr) widen_mask(mask.row(rows, row) + begin, n, scratch);
  return scratch;
}

// Returns the sum of the estimates k of a block. Without kGradient out = scale * k, with it out += scale * dk/dlogp;
// masked tokens count as 0.
template <KlEstimator kEstimator, bool kGradient, class T>
PPO_CLONES double kl_block(const T* logp, const T* ref, const T* live, int64_t n, T log_clamp, T value_clamp, T scale,
                           T* out) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const T l = logp[i], l_ref = ref[i], before = kGradient ? out[i] : T(0);  // never -0
    const bool valid = live[i] != T(0);
    const KlTerm<T> term = kl_term<kEstimator>(valid ? l : T(0), valid ? l_ref : T(0), log_clamp, value_clamp);
    sum += term.value;
    const T change = scale * (kGradient ? term.grad : term.value);
    out[i] = before + (valid ? change : T(0));
  }
  return static_cast<double>(sum);
}

// Before any loop: an exception that crosses parallel_for loses its text.
inline void check_estimator(int64_t estimator) {
  STD_TORCH_CHECK(estimator >= kK1 && estimator <= kK3, "unknown KL estimator ", estimator);
}

// Calls f with the estimator as a compile-time constant.
template <class F>
auto dispatch_estimator(int64_t estimator, F&& f) {
  switch (estimator) {
    case kK1:
      return f(std::integral_constant<KlEstimator, kK1>{});
    case kAbs:
      return f(std::integral_constant<KlEstimator, kAbs>{});
    case kK2:
      return f(std::integral_constant<KlEstimator, kK2>{});
    default:
      return f(std::integral_constant<KlEstimator, kK3>{});
  }
}

}  // namespace ppo
