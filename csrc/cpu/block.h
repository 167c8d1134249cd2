// Blocks of tokens: plain arrays, short enough to stay in the L1 cache and to be summed in float32.
//
// The loops over them load unconditionally and choose with selects (`valid` from a floating 1 or 0), because that is
// what the compiler turns into vector code; the selects still come before any arithmetic.
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
PPO_INLINE bool is_valid(uint8_t mask) {
  return (mask != 0 ? T(1) : T(0)) != T(0);
}

// values = scale * k and grads = scale * dk/dlogp for the tokens of a block; returns the sum of k. 0 where masked.
template <KlEstimator kEstimator, class T>
PPO_CLONES double kl_block(const T* logp, const T* ref, const uint8_t* mask, int64_t n, T log_clamp, T value_clamp,
                           T scale, T* values, T* grads) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const T l = logp[i], l_ref = ref[i];
    const bool valid = is_valid<T>(mask[i]);
    const KlTerm<T> term = kl_term<kEstimator>(valid ? l : T(0), valid ? l_ref : T(0), log_clamp, value_clamp);
    sum += term.value;
    values[i] = T(0) + scale * term.value;  // never -0
    grads[i] = valid ? scale * term.grad : T(0);
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
