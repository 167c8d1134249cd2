// Token tensors, padded [B, T] or packed [N], and their rows: the same on the host and on the device.
#pragma once

#include <cstdint>

#include "macros.h"

namespace ppo {

// Padded (cu is null), or packed with cu_seqlens [B+1], whatever values those hold.
struct TokenRows {
  const int64_t* cu = nullptr;
  int64_t count = 0, length = 0, total = 0;
  double inverse_length = 0.0;  // an integer division of 64 bits is a function call with spilled registers

  PPO_INLINE bool packed() const { return cu != nullptr; }
  PPO_INLINE int64_t bound(int64_t b) const {
    const int64_t at = cu[b];
    return at < 0 ? 0 : (at > total ? total : at);
  }
  PPO_INLINE int64_t start(int64_t b) const { return packed() ? bound(b) : b * length; }  // in a contiguous tensor
  PPO_INLINE int64_t size(int64_t b) const {
    if (!packed()) return length;
    const int64_t n = bound(b + 1) - bound(b);
    return n > 0 ? n : 0;
  }
  // Flat tokens that some row claims.
  PPO_INLINE int64_t first() const { return packed() ? bound(0) : 0; }
  PPO_INLINE int64_t end() const { return packed() ? bound(count) : total; }
  // The row of a claimed flat token: the last one that starts at or before it.
  PPO_INLINE int64_t row_of(int64_t i) const {
    if (!packed()) {
      const auto row = static_cast<int64_t>(static_cast<double>(i) * inverse_length);  // right, or off by one
      const int64_t column = i - row * length;
      return column < 0 ? row - 1 : (column >= length ? row + 1 : row);
    }
    int64_t low = 0, high = count - 1;
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

// The values of a token tensor: one for each token, or one for each row; none without data.
template <class T>
struct TokenInput {
  const T* data = nullptr;
  int64_t row_step = 0;  // what a row adds to an offset beside its tokens: 0 if the tokens lie in their flat order
  bool per_row = false;

  PPO_INLINE bool flat() const { return row_step == 0 && !per_row; }
  PPO_INLINE const T& at(int64_t token, int64_t row) const { return data[(per_row ? 0 : token) + row * row_step]; }
  // The first token of row b, null for an absent input; not for one value per row.
  PPO_INLINE const T* row(const TokenRows& rows, int64_t b) const {
    return data == nullptr ? nullptr : data + rows.start(b) + b * row_step;
  }
};

// One value for each row, or none.
template <class T>
TokenInput<T> per_row(const T* data) {
  return data == nullptr ? TokenInput<T>{} : TokenInput<T>{data, 1, true};
}

}  // namespace ppo
