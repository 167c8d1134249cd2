// What every launcher needs of torch: guards, dtypes, rows of tokens. The public functions have already checked their
// arguments with messages for people; these checks only keep a raw torch.ops call from reading out of bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "counters.h"

#ifdef PPO_TARGET_CLONES
#define PPO_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define PPO_CLONES
#endif

namespace ppo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

inline void check_same_shape(const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.dim() == like.dim(), "expected ", like.dim(), " dimensions, got ", x.dim());
  for (int64_t d = 0; d < x.dim(); ++d) {
    STD_TORCH_CHECK(x.size(d) == like.size(d), "size ", x.size(d), " of dimension ", d, " should be ", like.size(d));
  }
}

inline void check_dtype(const Tensor& x, ScalarType dtype) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, "an input has another dtype than the op computes in");
}

inline void check_unit_stride(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  STD_TORCH_CHECK(last < 0 || x.size(last) <= 1 || x.stride(last) == 1, "the last dimension must be contiguous");
}

// A [B] vector, a [...] row value or a 0-d tensor, read through a plain pointer; a strided one is copied. Keeps the
// memory alive, and is false for an absent tensor.
template <class T>
class Dense {
 public:
  Dense(const OptTensor& x, int64_t count, ScalarType dtype) {
    if (!x.has_value()) return;
    check_dtype(*x, dtype);
    STD_TORCH_CHECK(x->numel() == count, "expected ", count, " elements, got ", x->numel());
    held_ = x->is_contiguous() ? *x : torch::stable::contiguous(*x);
    data_ = static_cast<const T*>(held_->data_ptr());
  }
  explicit operator bool() const { return held_.has_value(); }
  const T& operator[](int64_t i) const { return data_[i]; }
  const T* data() const { return data_; }

 private:
  OptTensor held_;
  const T* data_ = nullptr;
};

inline Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype, const Tensor& like) {
  return torch::stable::new_empty(like, sizes, dtype);
}

template <class T>
constexpr ScalarType dtype_of() {
  return std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
}

// Calls f with a value of the type that the op computes in.
template <class F>
auto dispatch_compute(const Tensor& x, F&& f) {
  if (x.scalar_type() == ScalarType::Double) return f(double{});
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "expected float32 or float64");
  return f(float{});
}

// The rows of a token tensor. Padded: row b is [b, 0..T). Packed: tokens cu_seqlens[b] to cu_seqlens[b + 1], forced
// into order and into [0, N), so that no value of cu_seqlens can make two rows overlap or leave the tensor.
class Rows {
 public:
  Rows(const Tensor& tokens, const OptTensor& cu_seqlens) : packed_(cu_seqlens.has_value()) {
    if (!packed_) {
      STD_TORCH_CHECK(tokens.dim() == 2, "expected [B, T]");
      count_ = tokens.size(0);
      length_ = tokens.size(1);
      return;
    }
    STD_TORCH_CHECK(tokens.dim() == 1 && cu_seqlens->dim() == 1, "expected [N] and cu_seqlens [B+1]");
    check_dtype(*cu_seqlens, ScalarType::Long);
    STD_TORCH_CHECK(cu_seqlens->numel() >= 1 && cu_seqlens->is_contiguous(), "expected contiguous cu_seqlens [B+1]");
    count_ = cu_seqlens->numel() - 1;
    const auto* cu = static_cast<const int64_t*>(cu_seqlens->data_ptr());
    starts_.resize(count_ + 1);
    int64_t reached = 0;
    for (int64_t b = 0; b <= count_; ++b) {
      reached = std::max(reached, std::min(cu[b], tokens.numel()));
      starts_[b] = reached;
    }
  }

  int64_t count() const { return count_; }
  bool packed() const { return packed_; }
  int64_t start(int64_t b) const { return packed_ ? starts_[b] : b * length_; }  // in a contiguous tensor
  int64_t length(int64_t b) const { return packed_ ? starts_[b + 1] - starts_[b] : length_; }

 private:
  bool packed_;
  int64_t count_ = 0, length_ = 0;
  std::vector<int64_t> starts_;
};

// A token tensor to write. Padded rows cover it; packed ones may leave tokens that no row claims, and those are 0.
inline Tensor new_tokens(const Tensor& like, const Rows& rows) {
  return rows.packed() ? torch::stable::new_zeros(like, like.sizes()) : torch::stable::new_empty(like, like.sizes());
}

// Where a row of a token tensor begins. A row-level [B, 1] tensor has one value for the whole row.
template <class T>
struct TokenView {
  const T* data = nullptr;
  int64_t row_stride = 0;
  bool packed = false, per_row = false;

  const T* row(const Rows& rows, int64_t b) const { return data + (packed ? rows.start(b) : b * row_stride); }
};

template <class T>
TokenView<T> token_view(const OptTensor& x, const Tensor& tokens, const Rows& rows, bool may_be_per_row = false) {
  if (!x.has_value()) return {};
  if constexpr (std::is_same_v<T, uint8_t>) {
    STD_TORCH_CHECK(x->scalar_type() == ScalarType::Bool || x->scalar_type() == ScalarType::Byte, "masks are bytes");
  } else {
    check_dtype(*x, dtype_of<T>());
  }
  const auto* data = static_cast<const T*>(x->data_ptr());
  if (may_be_per_row && x->dim() == 2 && x->size(1) == 1 && (rows.packed() || tokens.size(1) != 1)) {
    STD_TORCH_CHECK(x->size(0) == rows.count(), "expected one value per row");
    return {data, x->stride(0), false, true};
  }
  check_same_shape(*x, tokens);
  check_unit_stride(*x);
  return {data, rows.packed() ? 0 : x->stride(0), rows.packed(), false};
}

// Runs f(i) for every i in [0, count), on torch's threads. What f(i) does must not depend on who runs it.
template <class F>
void for_each(int64_t count, int64_t grain, const F& f) {
  torch::stable::parallel_for(0, count, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

}  // namespace ppo
