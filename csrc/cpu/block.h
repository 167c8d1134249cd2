// What the CPU launchers share: threads, the rows of a batch, blocks of tokens.
//
// Blocks are plain arrays, short enough to stay in the L1 cache and to be summed in float32. The loops over them load
// unconditionally, choose with selects, and see no type but the one they compute in: a byte mask among floats makes the
// compiler fall back to vectors of two. So a block's mask is converted first, to 1 or 0; the selects still come before
// any arithmetic.
#pragma once

#include <vector>

#include "checks.h"

#ifdef PPO_TARGET_CLONES
#define PPO_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define PPO_CLONES
#endif

namespace ppo {

constexpr int64_t kBlock = 512;  // tokens that a float32 sum covers before it goes to float64

// Runs f(i) for every i in [0, count), on torch's threads. What f(i) does must not depend on who runs it.
template <class F>
void for_each(int64_t count, int64_t grain, const F& f) {
  torch::stable::parallel_for(0, count, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// How many of `count` equal parts of `total` tokens make a thread's share of at least `tokens`.
inline int64_t grain_of(int64_t tokens, int64_t total, int64_t count) {
  return tokens / std::max<int64_t>(total / std::max<int64_t>(count, 1), 1);
}

// Calls f with a value of the type that the op computes in.
template <class F>
auto dispatch_compute(const Tensor& x, F&& f) {
  if (x.scalar_type() == ScalarType::Double) return f(double{});
  PPO_CHECK(x.scalar_type() == ScalarType::Float, "the first tensor must be float32 or float64, got ",
            dtype_name(x.scalar_type()));
  return f(float{});
}

// Packed rows are forced into order and into [0, N], so that no value of cu_seqlens can make two rows overlap or leave
// the tensor.
struct Rows : TokenRows {
  Rows(const Tensor& tokens, const OptTensor& cu_seqlens) : TokenRows(token_rows(tokens, cu_seqlens)) {
    if (!packed()) return;
    bounds_.resize(count + 1);
    int64_t reached = 0;
    for (int64_t b = 0; b <= count; ++b) {
      reached = std::max(reached, bound(b));
      bounds_[b] = reached;
    }
    cu = bounds_.data();
  }
  Rows(const Rows&) = delete;  // cu would point into another one

 private:
  std::vector<int64_t> bounds_;
};

// A token tensor to write. Padded rows cover it; packed ones may leave tokens that no row claims, and those are 0.
inline Tensor new_tokens(const Tensor& like, const Rows& rows) {
  return rows.packed() ? torch::stable::new_zeros(like, like.sizes()) : new_like(like);
}

// A block of a token tensor as a plain array: in place, or a row-level or absent value spread over `scratch`.
template <class T>
const T* block_of(const TokenInput<T>& x, const Rows& rows, int64_t row, int64_t begin, int64_t n, T absent,
                  T* scratch) {
  if (x.data != nullptr && !x.per_row) return x.row(rows, row) + begin;
  std::fill(scratch, scratch + n, x.data != nullptr ? x.at(begin, row) : absent);
  return scratch;
}

template <class T>
PPO_CLONES void convert_mask(const uint8_t* mask, int64_t n, T* valid) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) valid[i] = mask[i] != 0 ? T(1) : T(0);
}

// 1 for the valid tokens of a block, else 0; `scratch` without a mask holds ones already.
template <class T>
const T* valid_block(const TokenInput<uint8_t>& mask, const Rows& rows, int64_t row, int64_t begin, int64_t n,
                     T* scratch) {
  if (mask.data != nullptr) convert_mask(mask.row(rows, row) + begin, n, scratch);
  return scratch;
}

// Returns the sum of the estimates k of a block. Without kGradient out = scale * k, with it out += scale * dk/dlogp;
// masked tokens count as 0.
template <KlEstimator kEstimator, bool kGradient, class T>
PPO_CLONES double kl_block(const T* logp, const T* ref, const T* valid, int64_t n, T log_clamp, T value_clamp, T scale,
                           T* out) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const T l = logp[i], l_ref = ref[i], before = kGradient ? out[i] : T(0);  // never -0
    const bool is_valid = valid[i] != T(0);
    const KlTerm<T> term = kl_term<kEstimator>(is_valid ? l : T(0), is_valid ? l_ref : T(0), log_clamp, value_clamp);
    sum += term.value;
    // Sum and product side by side, so that they are one rounding or two in vectors and in what is left of them alike.
    const T after = before + (kGradient ? scale * term.grad : scaled_or_off(scale, term.value));
    out[i] = is_valid ? after : before;
  }
  return static_cast<double>(sum);
}

}  // namespace ppo
