// Loads and stores of a few consecutive tokens per thread.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "math/tokens.h"

namespace ppo {

// kTokens consecutive flat tokens from `first` on, those that a row claims.
constexpr int kTokens = 4;

template <class T>
struct alignas(kTokens * sizeof(T)) TokensOf {
  T at[kTokens];
};

template <class T>
PPO_INLINE bool aligned_tokens(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(TokensOf<T>) == 0;
}

struct TokenVector {
  int64_t first;
  int64_t row[kTokens] = {};  // only where an input needs them
  bool claimed[kTokens];

  __device__ TokenVector(const TokenRows& rows, int64_t at, bool needs_row) : first(at) {
    const int64_t begin = rows.first(), end = rows.end();
#pragma unroll
    for (int k = 0; k < kTokens; ++k) claimed[k] = at + k >= begin && at + k < end;
    if (!needs_row) return;
    int64_t next = 0;  // where the row after the last one looked up begins
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      if (!claimed[k]) continue;
      const bool same = k > 0 && claimed[k - 1] && at + k < next;
      row[k] = same ? row[k - 1] : rows.row_of(at + k);
      next = rows.start(row[k] + 1);
    }
  }
};

// Their values of an input; `absent` where there is none. kWhole: the input is flat, aligned and has all of them.
template <bool kWhole, class T>
__device__ void load_tokens(const TokenInput<T>& x, const TokenVector& tokens, T absent, T (&values)[kTokens]) {
#pragma unroll
  for (int k = 0; k < kTokens; ++k) values[k] = absent;
  if (x.data == nullptr) return;
  const T* from = x.data + tokens.first;
  if (kWhole || (tokens.claimed[0] && tokens.claimed[kTokens - 1] && x.flat() && aligned_tokens(from))) {
    const auto vector = *reinterpret_cast<const TokensOf<T>*>(from);
#pragma unroll
    for (int k = 0; k < kTokens; ++k) values[k] = vector.at[k];
  } else {
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      if (tokens.claimed[k]) values[k] = x.at(tokens.first + k, tokens.row[k]);
    }
  }
}

// Their mask as the bytes of a word: 0 where a token is not valid or no row claims it.
template <bool kWhole>
__device__ uint32_t load_mask(const TokenInput<uint8_t>& mask, const TokenVector& tokens) {
  if constexpr (kWhole) {
    return mask.data == nullptr ? ~0u : *reinterpret_cast<const uint32_t*>(mask.data + tokens.first);
  } else {
    uint8_t bytes[kTokens];
    load_tokens<false>(mask, tokens, uint8_t{1}, bytes);
    uint32_t word = 0;
#pragma unroll
    for (int k = 0; k < kTokens; ++k) word |= tokens.claimed[k] ? uint32_t{bytes[k]} << 8 * k : 0u;
    return word;
  }
}

__device__ inline bool is_valid(uint32_t mask, int k) { return (mask >> 8 * k & 0xffu) != 0; }

// Every token of the tensor is written; those that no row claims get what `values` holds for them.
__device__ inline void store_tokens(float* out, int64_t first, int64_t total, const float (&values)[kTokens]) {
  float* to = out + first;
  if (first + kTokens <= total && aligned_tokens(to)) {
    *reinterpret_cast<TokensOf<float>*>(to) = {values[0], values[1], values[2], values[3]};
    return;
  }
#pragma unroll
  for (int k = 0; k < kTokens; ++k) {
    if (first + k < total) to[k] = values[k];
  }
}

}  // namespace ppo
