// Logits in memory: the rows of a [..., V] tensor and their 16-byte vectors, loaded and stored as a stream, the values
// packed in their words, vectors at a row's ends.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "math/half.h"

namespace ppo {

// Rows of a [..., V] tensor; neighbouring leading dimensions are one where their strides allow it.
constexpr int kLeadingDims = 4;

struct LogitRows {
  int64_t vocab = 0;
  int64_t size[kLeadingDims] = {1, 1, 1, 1}, stride[kLeadingDims] = {};  // the last one runs fastest
  int dims = 1;

  PPO_INLINE int64_t offset(int64_t row) const {
    int64_t at = 0;
#pragma unroll
    for (int d = kLeadingDims - 1; d > 0; --d) {  // constant indices: they keep the arrays out of local memory
      if (d >= dims) continue;
      at += row % size[d] * stride[d];
      row /= size[d];
    }
    return at + row * stride[0];
  }
};

constexpr int kWords = 4;

struct alignas(16) Vector {
  uint32_t word[kWords];
};

template <class T>
constexpr int kPerWord = sizeof(uint32_t) / sizeof(T);
template <class T>
constexpr int kPerVector = kWords * kPerWord<T>;

// How many elements lie between a 16-byte boundary and p.
template <class T>
__device__ int elements_past_boundary(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(T) % kPerVector<T>);
}

__device__ inline Vector load_streaming(const void* p) {
  const uint4 v = __ldcs(static_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}

__device__ inline void store_streaming(void* p, const Vector& v) {
  __stcs(static_cast<uint4*>(p), uint4{v.word[0], v.word[1], v.word[2], v.word[3]});
}

template <class T>
PPO_INLINE uint32_t element_bits(T x) {
  if constexpr (sizeof(T) == 4) {
    return bits_as<uint32_t>(x);
  } else {
    return x.bits;
  }
}

template <class T>
PPO_INLINE T element_of(uint32_t bits) {
  if constexpr (sizeof(T) == 4) {
    return bits_as<T>(bits);
  } else {
    return T{static_cast<uint16_t>(bits)};
  }
}

template <class T>
PPO_INLINE T minus_infinity() {
  T x;
  from_compute(-std::numeric_limits<float>::infinity(), x);
  return x;
}

template <class T>
PPO_INLINE void word_to_floats(uint32_t word, float (&z)[kPerWord<T>]) {
  z[0] = to_compute(element_of<T>(word));
  if constexpr (kPerWord<T> == 2) z[1] = to_compute(element_of<T>(word >> 16));
}

template <class T>
PPO_INLINE uint32_t floats_to_word(const float (&z)[kPerWord<T>]) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(z[1]), "f"(z[0]));
    return word;
  } else if constexpr (std::is_same_v<T, Float16>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(z[1]), "f"(z[0]));
    return word;
  }
#endif
  T x;
  from_compute(z[0], x);
  if constexpr (kPerWord<T> == 1) {
    return element_bits(x);
  } else {
    T y;
    from_compute(z[1], y);
    return element_bits(x) | element_bits(y) << 16;
  }
}

// The larger of each pair of elements; of a NaN and a number the number.
template <class T>
PPO_INLINE uint32_t max_word(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint32_t c;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("max.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
  } else if constexpr (std::is_same_v<T, Float16>) {
    asm("max.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
  }
#endif
  float x[kPerWord<T>], y[kPerWord<T>];
  word_to_floats<T>(a, x);
  word_to_floats<T>(b, y);
#pragma unroll
  for (int i = 0; i < kPerWord<T>; ++i) x[i] = fmaxf(x[i], y[i]);
  return floats_to_word<T>(x);
}

template <class T>
PPO_INLINE float max_of_word(uint32_t word) {
  float z[kPerWord<T>];
  word_to_floats<T>(word, z);
  return kPerWord<T> == 2 ? fmaxf(z[0], z[kPerWord<T> - 1]) : z[0];
}

// The bits of a word that its first `elements` elements hold (all of them, or none if it is negative).
template <class T>
PPO_INLINE uint32_t low_elements(int elements) {
  const uint32_t one = elements == 1 ? 0xffffu : 0u;
  return elements >= kPerWord<T> ? ~0u : one;
}

// Element `at` of a vector, with `at` known only when the kernel runs.
template <class T>
PPO_INLINE void set_element(Vector& v, int at, T x) {
  const uint32_t bits = element_bits(x) << at % kPerWord<T> * 16;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const uint32_t here = low_elements<T>(at + 1 - w * kPerWord<T>) & ~low_elements<T>(at - w * kPerWord<T>);
    v.word[w] = (v.word[w] & ~here) | (bits & here);
  }
}

// The vector whose first element is `column` of a row, loaded element by element: it need not be aligned, and columns
// that the row does not have are not read.
template <class T>
__device__ Vector gather_vector(const T* row, int64_t column, int64_t size, T absent) {
  Vector v{};
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
#pragma unroll
    for (int i = 0; i < kPerWord<T>; ++i) {
      const int64_t at = column + w * kPerWord<T> + i;
      const T x = at >= 0 && at < size ? row[at] : absent;
      v.word[w] |= element_bits(x) << i * 16;
    }
  }
  return v;
}

template <class T>
__device__ void scatter_vector(T* row, int64_t column, int64_t size, const Vector& v) {
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
#pragma unroll
    for (int i = 0; i < kPerWord<T>; ++i) {
      const int64_t at = column + w * kPerWord<T> + i;
      if (at >= 0 && at < size) row[at] = element_of<T>(v.word[w] >> i * 16);
    }
  }
}

// Whether the row has all columns of the vector that begins at `column`.
template <class T>
PPO_INLINE bool has_vector(int64_t column, int64_t size) {
  return column >= 0 && column + kPerVector<T> <= size;
}

}  // namespace ppo
