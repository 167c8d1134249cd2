// Token tensors on the device: flat tokens and their rows, and loads of a few consecutive tokens per thread.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "math/macros.h"

namespace ppo {

// Padded [B, T] (cu is null), or packed [N] with cu_seqlens [B+1], whatever values those hold.
struct TokenRows {
  const int64_t* cu;
  int64_t rows, length, total;
  double inverse_length;  // an integer division of 64 bits is a function call with spilled registers

  PPO_INLINE int64_t bound(int64_t b) const {
    const int64_t at = cu[b];
    return at < 0 ? 0 : (at > total ? total : at);
  }
  PPO_INLINE int64_t start(int64_t b) const { return cu != nullptr ? bound(b) : b * length; }
  PPO_INLINE int64_t size(int64_t b) const {
    if (cu == nullptr) return length;
    const int64_t n = bound(b + 1) - bound(b);
    return n > 0 ? n : 0;
  }
  // Flat tokens that some row claims.
  PPO_INLINE int64_t first() const { return cu != nullptr ? bound(0) : 0; }
  PPO_INLINE int64_t end() const { return cu != nullptr ? bound(rows) : total; }
  // The row of a claimed flat token: the last one that starts at or before it.
  PPO_INLINE int64_t row_of(int64_t i) const {
    if (cu == nullptr) {
      const auto row = static_cast<int64_t>(static_cast<double>(i) * inverse_length);  // right, or off by one
      const int64_t column = i - row * length;
      return column < 0 ? row - 1 : (column >= length ? row + 1 : row);
    }
    int64_t low = 0, high = rows - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (bound(middle) <= i) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

enum class TokenKind { kAbsent, kFlat, kStrided, kPerRow };

template <class T>
struct TokenInput {
  const T* data = nullptr;
  int64_t row_stride = 0;
  TokenKind kind = TokenKind::kAbsent;

  PPO_INLINE bool needs_row() const { return kind == TokenKind::kStrided || kind == TokenKind::kPerRow; }
  // The first token of row b, null for an absent input.
  PPO_INLINE const T* row(const TokenRows& rows, int64_t b) const {
    return data == nullptr ? nullptr : data + (rows.cu != nullptr ? rows.start(b) : b * row_stride);
  }
};

// kTokens consecutive flat tokens from `first` on, those that a row claims.
constexpr int kTokens = 4;

struct TokenGroup {
  int64_t first;
  int64_t row[kTokens], column[kTokens];  // only where an input needs them
  bool claimed[kTokens];

  __device__ TokenGroup(const TokenRows& rows, int64_t at, bool needs_row) : first(at) {
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
      const bool next = k > 0 && claimed[k - 1] && rows.cu == nullptr;  // one division per group
      row[k] = next ? row[k - 1] : rows.row_of(at + k);
      column[k] = next ? column[k - 1] + 1 : at + k - rows.start(row[k]);
      if (next && column[k] == rows.length) ++row[k], column[k] = 0;
    }
  }
};

// The group's values of an input; `absent` where there is none.
template <class T>
__device__ void load_tokens(const TokenInput<T>& x, const TokenGroup& group, T absent, T (&values)[kTokens]) {
  struct alignas(kTokens * sizeof(T)) Vector {
    T at[kTokens];
  };
#pragma unroll
  for (int k = 0; k < kTokens; ++k) values[k] = absent;
  if (x.kind == TokenKind::kAbsent) return;
  if (x.kind == TokenKind::kFlat) {
    const T* from = x.data + group.first;
    if (group.claimed[0] && group.claimed[kTokens - 1] && reinterpret_cast<uintptr_t>(from) % sizeof(Vector) == 0) {
      const Vector vector = *reinterpret_cast<const Vector*>(from);
#pragma unroll
      for (int k = 0; k < kTokens; ++k) values[k] = vector.at[k];
      return;
    }
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      if (group.claimed[k]) values[k] = from[k];
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kTokens; ++k) {
    const int64_t column = x.kind == TokenKind::kStrided ? group.column[k] : 0;
    if (group.claimed[k]) values[k] = x.data[group.row[k] * x.row_stride + column];
  }
}

// Every token of the tensor is written; those that no row claims get what `values` holds for them.
__device__ inline void store_tokens(float* out, const TokenGroup& group, int64_t total,
                                    const float (&values)[kTokens]) {
  float* to = out + group.first;
  if (group.first + kTokens <= total && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
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
    if (group.first + k < total) to[k] = values[k];
  }
}

}  // namespace ppo
