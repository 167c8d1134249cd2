// What every launcher needs of torch, for the CPU and for CUDA: checks, dtypes, rows of tokens.
//
// The public functions have already checked their arguments, but compiled graphs and C++ callers come without them. So
// the device of every tensor is checked where an op is registered (PPO_IMPL), and dtype and shape where a kernel gets
// at the data: nothing else here gives a pointer to an input. No check reads a value, which on a GPU would wait for it;
// kernels clamp whatever they take for an address.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "counters.h"
#include "math/kl.h"
#include "math/tokens.h"

namespace ppo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
using OptTensor = std::optional<Tensor>;
using LossResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // loss, stats, grad, inv_normalizer

template <class T>
constexpr ScalarType dtype_of() {
  if (std::is_same_v<T, double>) return ScalarType::Double;
  return std::is_same_v<T, int64_t> ? ScalarType::Long : ScalarType::Float;
}

// One sentence: what was given, what is allowed, what to do. torch's own check would put a C++ file before it.
template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  ((text << parts), ...);
  throw std::runtime_error(text.str());
}

#define PPO_CHECK(condition, ...)  \
  do {                             \
    if (!(condition)) [[unlikely]] \
      ::ppo::refuse(__VA_ARGS__);  \
  } while (0)

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

inline std::string shape_text(Sizes sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

// Masks are bytes, true where one is not 0.
template <class T>
void check_dtype(const char* name, const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  if constexpr (std::is_same_v<T, uint8_t>) {
    PPO_CHECK(dtype == ScalarType::Bool || dtype == ScalarType::Byte, name, " must be bool or uint8, got ",
              dtype_name(dtype));
  } else {
    PPO_CHECK(dtype == dtype_of<T>(), name, " must be ", dtype_name(dtype_of<T>()), ", got ", dtype_name(dtype));
  }
}

inline void check_shape(const char* name, const Tensor& x, Sizes wanted) {
  const Sizes sizes = x.sizes();
  PPO_CHECK(sizes.size() == wanted.size() && std::equal(sizes.begin(), sizes.end(), wanted.begin()), name,
            " must have the shape ", shape_text(wanted), ", got ", shape_text(sizes));
}

inline void check_unit_stride(const char* name, const Tensor& x) {
  const int64_t last = x.dim() - 1;
  PPO_CHECK(last < 0 || x.size(last) <= 1 || x.stride(last) == 1, name, " must have a last stride of 1, got ",
            x.stride(last), "; pass ", name, ".contiguous()");
}

// A choice among `count`. Before any loop: an exception that crosses parallel_for loses its text.
inline void check_code(const char* name, int64_t code, int64_t count) {
  PPO_CHECK(code >= 0 && code < count, name, " must be from 0 to ", count - 1, ", got ", code);
}

constexpr int64_t kEstimators = static_cast<int64_t>(KlEstimator::kCount);

inline void check_logits(const Tensor& logits) {
  PPO_CHECK(logits.dim() >= 1 && logits.size(logits.dim() - 1) >= 1, "logits must be [..., V] with V >= 1, got ",
            shape_text(logits.sizes()));
  check_unit_stride("logits", logits);
}

// The shape of what there is one of for each row of logits.
inline Sizes leading_sizes(const Tensor& logits) {
  const Sizes sizes = logits.sizes();
  return {sizes.data(), sizes.size() - 1};
}

// Each dimension steps over all that those with smaller strides reach, or there is nothing to write. A few legal views
// are refused too, but none whose elements share memory is let through.
inline void check_no_overlap(const char* name, const Tensor& x) {
  if (x.numel() == 0) return;
  const Sizes sizes = x.sizes(), strides = x.strides();
  std::vector<std::pair<int64_t, int64_t>> steps;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1) steps.emplace_back(strides[d], sizes[d]);
  }
  std::sort(steps.begin(), steps.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : steps) {
    PPO_CHECK(stride > reach, name, " is overwritten and must not overlap itself, got the shape ", shape_text(sizes),
              " with strides ", shape_text(strides), "; pass ", name, ".contiguous()");
    reach += (size - 1) * stride;
  }
}

// No other tensor of a call shares memory with the one that is overwritten: it would be read while it changes. Tensors
// that lie between each other's elements are refused too.
class ApartFrom {
 public:
  template <class... Others>
  ApartFrom(const char* name, const Tensor& overwritten, const Others&... others) : name_(name) {
    std::tie(begin_, end_) = memory_of(overwritten);
    (check(others), ...);
  }

 private:
  static std::pair<uintptr_t, uintptr_t> memory_of(const Tensor& x) {
    const auto begin = reinterpret_cast<uintptr_t>(x.data_ptr());
    if (x.numel() == 0) return {begin, begin};
    const Sizes sizes = x.sizes(), strides = x.strides();
    int64_t reach = 1;
    for (size_t d = 0; d < sizes.size(); ++d) reach += (sizes[d] - 1) * strides[d];
    return {begin, begin + static_cast<uintptr_t>(reach) * x.element_size()};
  }
  void check(const Tensor& x) {
    ++position_;
    const auto [begin, end] = memory_of(x);
    PPO_CHECK(begin == end || begin_ == end_ || end <= begin_ || end_ <= begin, "argument ", position_,
              " shares memory with ", name_, ", which is overwritten; pass a copy (.clone()) of it");
  }
  void check(const OptTensor& x) {
    if (x.has_value()) return check(*x);
    ++position_;
  }
  template <class Number>
  void check(const Number&) {
    ++position_;
  }

  const char* name_;
  int position_ = 1;
  uintptr_t begin_, end_;
};

// Every tensor of a call is on the device of the first: a pointer into the memory of another would be a wild one.
class SameDevice {
 public:
  template <class... Arguments>
  explicit SameDevice(const Arguments&... arguments) {
    (check(arguments), ...);
  }

 private:
  void check(const Tensor& x) {
    ++position_;
    int32_t type = 0, index = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &index));
    if (position_ == 1) type_ = type, index_ = index;
    PPO_CHECK(type == type_ && index == index_, "argument ", position_,
              " is on another device than the first; move it there");
  }
  void check(const OptTensor& x) {
    if (x.has_value()) return check(*x);
    ++position_;
  }
  template <class Number>
  void check(const Number&) {
    ++position_;
  }

  int position_ = 0;
  int32_t type_ = 0, index_ = 0;
};

// An op as it is registered: its calls are checked for what its signature tells, and what it refuses begins with its
// name.
template <class Op, auto kOp, class Function = decltype(kOp)>
struct Registered;

template <class Op, auto kOp, class Result, class... Arguments>
struct Registered<Op, kOp, Result (*)(Arguments...)> {
  static Result call(Arguments... arguments) {
    try {
      SameDevice{arguments...};
      return kOp(arguments...);
    } catch (const std::exception& error) {
      throw std::runtime_error(std::string(Op::name()) + ": " + error.what());
    }
  }
};

// In a STABLE_TORCH_LIBRARY_IMPL: the function after the op's name is that op.
#define PPO_IMPL(library, op, ...)                                             \
  do {                                                                         \
    struct Op {                                                                \
      static const char* name() { return op; }                                 \
    };                                                                         \
    library.impl(op, TORCH_BOX((&::ppo::Registered<Op, &__VA_ARGS__>::call))); \
  } while (0)

template <class T>
T* data_of(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// A contiguous tensor on the device of `like`. torch::stable::new_empty would look its op up by name, in every call.
inline Tensor empty(Sizes sizes, ScalarType dtype, const Tensor& like) {
  std::array<int64_t, 8> few;
  std::vector<int64_t> many(sizes.size() > few.size() ? sizes.size() : 0);
  int64_t *strides = many.empty() ? few.data() : many.data(), stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) strides[d] = stride;
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type, device_index, &made));
  return Tensor(made);
}

inline Tensor new_like(const Tensor& x) { return empty(x.sizes(), x.scalar_type(), x); }

// The values of a tensor of the shape of `like`, null for an absent one.
template <class T>
const T* contiguous_data(const char* name, const OptTensor& x, const Tensor& like) {
  if (!x.has_value()) return nullptr;
  check_dtype<T>(name, *x);
  check_shape(name, *x, like.sizes());
  PPO_CHECK(x->is_contiguous(), name, " must be contiguous; pass ", name, ".contiguous()");
  return data_of<const T>(*x);
}

// A [B] vector, a [...] row value or a 0-d tensor, read through a plain pointer; a strided one is copied. Keeps the
// memory alive, and is false for an absent tensor.
template <class T>
class RowVector {
 public:
  RowVector(const char* name, const OptTensor& x, Sizes shape) {
    if (!x.has_value()) return;
    check_dtype<T>(name, *x);
    check_shape(name, *x, shape);
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

// Statistics that whiten is given.
inline void check_together(const OptTensor& count, const OptTensor& mean, const OptTensor& m2) {
  PPO_CHECK(count.has_value() == mean.has_value() && count.has_value() == m2.has_value(),
            "count, mean and m2 come together; pass all or none");
}

// The rows of a token tensor. cu_seqlens are where the tensor has them, unchecked.
inline TokenRows token_rows(const Tensor& tokens, const OptTensor& cu_seqlens) {
  if (!cu_seqlens.has_value()) {
    PPO_CHECK(tokens.dim() == 2, "the tokens must be [B, T], or [N] with cu_seqlens; got the shape ",
              shape_text(tokens.sizes()));
    return {nullptr, tokens.size(0), tokens.size(1), tokens.numel(), 1.0 / static_cast<double>(tokens.size(1))};
  }
  PPO_CHECK(tokens.dim() == 1 && cu_seqlens->dim() == 1 && cu_seqlens->numel() >= 1,
            "with cu_seqlens [B+1] the tokens must be [N]; got the shapes ", shape_text(cu_seqlens->sizes()), " and ",
            shape_text(tokens.sizes()));
  check_dtype<int64_t>("cu_seqlens", *cu_seqlens);
  PPO_CHECK(cu_seqlens->is_contiguous(), "cu_seqlens must be contiguous; pass cu_seqlens.contiguous()");
  return {data_of<const int64_t>(*cu_seqlens), cu_seqlens->numel() - 1, 0, tokens.numel(), 0.0};
}

// A token tensor, or where it may be so a row-level [B, 1] one.
template <class T>
TokenInput<T> token_input(const char* name, const OptTensor& x, const Tensor& tokens, const TokenRows& rows,
                          bool may_be_per_row = false) {
  if (!x.has_value()) return {};
  check_dtype<T>(name, *x);
  const T* data = data_of<const T>(*x);
  if (may_be_per_row && x->dim() == 2 && x->size(1) == 1 && (rows.packed() || tokens.size(1) != 1)) {
    check_shape(name, *x, {rows.count, 1});
    return {data, x->stride(0), true};
  }
  check_shape(name, *x, tokens.sizes());
  check_unit_stride(name, *x);
  return {data, rows.packed() || x->size(0) <= 1 ? 0 : x->stride(0) - x->size(1), false};
}

}  // namespace ppo
