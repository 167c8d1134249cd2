// Loads and stores of a few consecutive tokens per thread.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "math/tokens.h"

namespace ppo {

// kTokens consecutive flat tokens from `first` on, those that a row claims.
constexpr int kTokens = 4;

struct TokenVector {
  int64_t first;
  int64_t row[kTokens], column[kTokens];  // only where an input needs them
  bool claimed[kTokens];

  __device__ TokenVector(const TokenRows& rows, int64_t at, bool needs_row) : first(at) {
    const int64_t begin = rows.first(), end = rows.end();
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      claimed[k] = at + k >= begin && at + k < end;
      row[k] = column[k] = 0;
    }
    if (!needs_row) return;
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      if (!claimed[k]) continue;
      const bool next = k > 0 && claimed[k - 1] && !rows.packed();  // one division for all
      row[k] = next ? row[k - 1] : rows.row_of(at + k);
      column[k] = next ? column[k - 1] + 1 : at + k - rows.start(row[k]);
      if (next && column[k] == rows.length) ++row[k], column[k] = 0;
    }
  }
};

// Their values of an input; `absent` where there is none.
template <class T>
__device__ void load_tokens(const TokenInput<T>& x, const TokenVector& tokens, T absent, T (&values)[kTokens]) {
  struct alignas(kTokens * sizeof(T)) Vector {
    T at[kTokens];
  };
#pragma unroll
  for (int k = 0; k < kTokens; ++k) values[k] = absent;
  if (x.kind == TokenKind::kAbsent) return;
  if (x.kind == TokenKind::kFlat) {
    const T* from = x.data + tokens.first;
    if (tokens.claimed[0] && tokens.claimed[kTokens - 1] && reinterpret_cast<uintptr_t>(from) % sizeof(Vector) == 0) {
      const Vector vector = *reinterpret_cast<const Vector*>(from);
#pragma unroll
      for (int k = 0; k < kTokens; ++k) values[k] = vector.at[k];
      return;
    }
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      if (tokens.claimed[k]) values[k] = from[k];
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kTokens; ++k) {
    const int64_t column = x.kind == TokenKind::kStrided ? tokens.column[k] : 0;
    if (tokens.claimed[k]) values[k] = x.data[tokens.row[k] * x.row_stride + column];
  }
}

// Every token of the tensor is written; those that no row claims get what `values` holds for them.
__device__ inline void store_tokens(float* out, const TokenVector& tokens, int64_t total,
                                    const float (&values)[kTokens]) {
  float* to = out + tokens.first;
  if (tokens.first + kTokens <= total && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    struct alignas(16) Vector {
      float at[kTokens];
    } vector;
#pragma unroll
    for (int k = 0; k < kTokens; ++k) vector.at[k] = values[k];
    *reinterpret_cast<Vector*>(to) = vector;
    return;
  }
#pragma unroll
  for (int k = 0; k < kTokens; ++k) {
    if (tokens.first + k < total) to[k] = values[k];
  }
}

}  // namespace ppo
