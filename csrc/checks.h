// What every launcher needs of torch, for the CPU and for CUDA: checks, dtypes, rows of tokens. The public functions
// have already checked their arguments with messages for people; these checks only keep a raw torch.ops call from
// reading out of bounds.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "counters.h"
#include "math/kl.h"
#include "math/tokens.h"

namespace ppo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
using LossResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // loss, stats, grad, inv_normalizer

template <class T>
constexpr ScalarType dtype_of() {
  if (std::is_same_v<T, double>) return ScalarType::Double;
  return std::is_same_v<T, int64_t> ? ScalarType::Long : ScalarType::Float;
}

// Masks are bytes, true where one is not 0.
template <class T>
void check_dtype(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  if constexpr (std::is_same_v<T, uint8_t>) {
    STD_TORCH_CHECK(dtype == ScalarType::Bool || dtype == ScalarType::Byte, "masks are bytes");
  } else {
    STD_TORCH_CHECK(dtype == dtype_of<T>(), "an input has another dtype than the op computes in");
  }
}

inline void check_same_shape(const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.dim() == like.dim(), "expected ", like.dim(), " dimensions, got ", x.dim());
  for (int64_t d = 0; d < x.dim(); ++d) {
    STD_TORCH_CHECK(x.size(d) == like.size(d), "size ", x.size(d), " of dimension ", d, " should be ", like.size(d));
  }
}

inline void check_unit_stride(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  STD_TORCH_CHECK(last < 0 || x.size(last) <= 1 || x.stride(last) == 1, "the last dimension must be contiguous");
}

// Before any loop: an exception that crosses parallel_for loses its text.
inline void check_estimator(int64_t estimator) {
  STD_TORCH_CHECK(estimator >= 0 && estimator <= static_cast<int64_t>(KlEstimator::kK3), "unknown KL estimator ",
                  estimator);
}

// A value for each row of logits.
inline void check_leading_shape(const Tensor& x, const Tensor& logits) {
  STD_TORCH_CHECK(x.dim() == logits.dim() - 1, "expected ", logits.dim() - 1, " dimensions, got ", x.dim());
  for (int64_t d = 0; d < x.dim(); ++d) {
    STD_TORCH_CHECK(x.size(d) == logits.size(d), "size ", x.size(d), " of dimension ", d, " should be ",
                    logits.size(d));
  }
}

inline void check_logits(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() >= 1 && logits.size(logits.dim() - 1) >= 1, "expected logits [..., V]");
  check_unit_stride(logits);
}

template <class T>
T* data_of(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// A contiguous tensor on the device of `like`. torch::stable::new_empty would look its op up by name, in every call.
inline Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) strides[d] = stride;
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type, device_index, &made));
  return Tensor(made);
}

inline Tensor new_like(const Tensor& x) { return empty(x.sizes(), x.scalar_type(), x); }

// The values of a tensor of the shape of `like`, null for an absent one.
template <class T>
const T* contiguous_data(const OptTensor& x, const Tensor& like) {
  if (!x.has_value()) return nullptr;
  check_dtype<T>(*x);
  check_same_shape(*x, like);
  STD_TORCH_CHECK(x->is_contiguous(), "expected a contiguous tensor");
  return data_of<const T>(*x);
}

// A [B] vector, a [...] row value or a 0-d tensor, read through a plain pointer; a strided one is copied. Keeps the
// memory alive, and is false for an absent tensor.
template <class T>
class RowVector {
 public:
  RowVector(const OptTensor& x, int64_t count) {
    if (!x.has_value()) return;
    check_dtype<T>(*x);
    STD_TORCH_CHECK(x->numel() == count, "expected ", count, " elements, got ", x->numel());
    held_ = x->is_contiguous() ? *x : torch::stable::contiguous(*x);
    data_ = data_of<const T>(*held_);
  }
  explicit operator bool() const { return held_.has_value(); }
  const T& operator[](int64_t i) const { return data_[i]; }
  const T* data() const { return data_; }

 private:
  OptTensor held_;
  const T* data_ = nullptr;
};

// The rows of a token tensor. cu_seqlens are where the tensor has them, unchecked.
inline TokenRows token_rows(const Tensor& tokens, const OptTensor& cu_seqlens) {
  if (!cu_seqlens.has_value()) {
    STD_TORCH_CHECK(tokens.dim() == 2, "expected [B, T]");
    return {nullptr, tokens.size(0), tokens.size(1), tokens.numel(), 1.0 / static_cast<double>(tokens.size(1))};
  }
  STD_TORCH_CHECK(tokens.dim() == 1 && cu_seqlens->dim() == 1, "expected [N] and cu_seqlens [B+1]");
  check_dtype<int64_t>(*cu_seqlens);
  STD_TORCH_CHECK(cu_seqlens->numel() >= 1 && cu_seqlens->is_contiguous(), "expected contiguous cu_seqlens [B+1]");
  return {data_of<const int64_t>(*cu_seqlens), cu_seqlens->numel() - 1, 0, tokens.numel(), 0.0};
}

// A token tensor, or where it may be so a row-level [B, 1] one.
template <class T>
TokenInput<T> token_input(const OptTensor& x, const Tensor& tokens, const TokenRows& rows,
                          bool may_be_per_row = false) {
  if (!x.has_value()) return {};
  check_dtype<T>(*x);
  const T* data = data_of<const T>(*x);
  if (may_be_per_row && x->dim() == 2 && x->size(1) == 1 && (rows.packed() || tokens.size(1) != 1)) {
    STD_TORCH_CHECK(x->size(0) == rows.count, "expected one value per row");
    return {data, x->stride(0), TokenKind::kPerRow};
  }
  check_same_shape(*x, tokens);
  check_unit_stride(*x);
  if (rows.packed()) return {data, 0, TokenKind::kFlat};
  const bool flat = x->stride(0) == x->size(1) || x->size(0) <= 1;
  return {data, x->stride(0), flat ? TokenKind::kFlat : TokenKind::kStrided};
}

// Calls f with the estimator as a compile-time constant.
template <class F>
auto dispatch_estimator(int64_t estimator, F&& f) {
  switch (static_cast<KlEstimator>(estimator)) {
    case KlEstimator::kK1:
      return f(std::integral_constant<KlEstimator, KlEstimator::kK1>{});
    case KlEstimator::kAbs:
      return f(std::integral_constant<KlEstimator, KlEstimator::kAbs>{});
    case KlEstimator::kK2:
      return f(std::integral_constant<KlEstimator, KlEstimator::kK2>{});
    default:
      return f(std::integral_constant<KlEstimator, KlEstimator::kK3>{});
  }
}

}  // namespace ppo
