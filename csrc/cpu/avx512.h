// The loops over logits of a row in AVX-512 intrinsics. gcc 12 vectorises the portable ones too, but clamps through
// masks where one maximum does, and has no instruction for float16: these take 13 to 63 % less time, by the same
// formulas. The rows of token_logprobs in the benchmarks have both ("cpu" and "portable loops"), and
// tests/test_avx512.py binds them to the portable loops: maxima and gradients by every bit, sums by 4e-7.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "math/half.h"
#include "math/token_logprobs.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define PPO_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define PPO_TARGET_INLINE PPO_TARGET __attribute__((always_inline)) inline

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // of gcc's own header
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace ppo::avx512 {

constexpr bool kBuilt = true;
inline bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

constexpr int kFloats = 16;  // in a register
constexpr int kUnroll = 4;   // registers with a sum each
constexpr int64_t kStep = kUnroll * kFloats;
constexpr int64_t kTerms = 16;  // that a float32 lane adds up before it goes to float64

PPO_TARGET_INLINE __m512 load(const float* p) { return _mm512_loadu_ps(p); }
PPO_TARGET_INLINE __m512 load(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
PPO_TARGET_INLINE __m512 load(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Two registers of logits, in whichever order is cheapest: the even and the odd ones of bfloat16.
struct Pair {
  __m512 a, b;
};

template <class In>
PPO_TARGET_INLINE Pair load_pair(const In* p) {
  return {load(p), load(p + kFloats)};
}
template <>
PPO_TARGET_INLINE Pair load_pair(const BFloat16* p) {
  const __m512i bits = _mm512_loadu_si512(p), high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)), _mm512_castsi512_ps(_mm512_and_si512(bits, high))};
}

PPO_TARGET_INLINE void store_pair(Pair x, float* p) {
  _mm512_storeu_ps(p, x.a);
  _mm512_storeu_ps(p + kFloats, x.b);
}
PPO_TARGET_INLINE void store_pair(Pair x, Float16* p) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.a, kNearest));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + kFloats), _mm512_cvtps_ph(x.b, kNearest));
}

// Rounded to nearest even in the high half. No NaN becomes a number as long as its low half is 0.
PPO_TARGET_INLINE __m512i rounded_bfloat16(__m512 x) {
  const __m512i u = _mm512_castps_si512(x), one = _mm512_set1_epi32(1), half = _mm512_set1_epi32(0x7fff);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), one);
  return _mm512_add_epi32(_mm512_add_epi32(u, half), odd);
}
PPO_TARGET_INLINE void store_pair(Pair x, BFloat16* p) {
  constexpr __mmask32 kOdd = 0xaaaaaaaau;
  const __m512i even = _mm512_srli_epi32(rounded_bfloat16(x.a), 16);
  _mm512_storeu_si512(p, _mm512_mask_mov_epi16(even, kOdd, rounded_bfloat16(x.b)));
}

// exp2_nonpositive of math/exp.h: 2^x is the product.
PPO_TARGET_INLINE Pair exp2_factors(__m512 x) {
  const __m512 bias = _mm512_set1_ps(kRoundToInt + 127.0f), n = _mm512_add_ps(x, bias);
  const __m512 f = _mm512_sub_ps(x, _mm512_sub_ps(n, bias));
  __m512 p = _mm512_set1_ps(kExp2Short[0]);
  for (int i = 1; i < 6; ++i) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2Short[i]));
  return {p, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(n), 23))};
}

PPO_TARGET_INLINE __m512 exponent(__m512 z, __m512 max, __m512 c) { return _mm512_mul_ps(_mm512_sub_ps(z, max), c); }

// The maximum of n logits, NaN left out. With kConvert they also go to z as floats, and -inf behind them up to a
// multiple of kStep.
template <bool kConvert, class In>
PPO_TARGET float max_block(const In* x, int64_t n, float* z) {
  const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 max[kUnroll] = {lowest, lowest, lowest, lowest};
  alignas(64) In tail[kStep];
  for (int64_t begin = 0; begin < n; begin += kStep) {
    const In* from = x + begin;
    if (n - begin < kStep) {
      for (In& logit : tail) from_compute(-std::numeric_limits<float>::infinity(), logit);
      std::copy(from, x + n, tail);
      from = tail;
    }
    for (int k = 0; k < kUnroll; ++k) {
      const __m512 value = load(from + k * kFloats);
      if constexpr (kConvert) _mm512_storeu_ps(z + begin + k * kFloats, value);
      max[k] = _mm512_max_ps(value, max[k]);  // the second where one is NaN
    }
  }
  return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(max[0], max[1]), _mm512_max_ps(max[2], max[3])));
}

// sum + lanes, in float64.
PPO_TARGET_INLINE __m512d plus(__m512d sum, const __m512* lanes) {
  for (int k = 0; k < kUnroll; ++k) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(lanes[k]));
    sum = _mm512_add_pd(sum, _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_extractf32x8_ps(lanes[k], 1))));
  }
  return sum;
}

// The sums over n logits, a multiple of kStep, of 2^x with x = (z - max) c and, with kEntropy, of 2^x * x.
template <bool kEntropy, class In>
PPO_TARGET SoftmaxPart sum_block(const float* z, int64_t n, float max, float c, const In* next) {
  const __m512 base = _mm512_set1_ps(max), scale = _mm512_set1_ps(c), least = _mm512_set1_ps(least_exponent(-1e9f));
  __m512d total = _mm512_setzero_pd(), total_weighted = total;
  for (int64_t first = 0; first < n; first += kTerms * kStep) {
    __m512 sum[kUnroll] = {}, weighted[kUnroll] = {};
    const int64_t end = std::min(first + kTerms * kStep, n);
    for (int64_t begin = first; begin < end; begin += kStep) {
      for (int64_t i = 0; i < kStep; i += 64 / sizeof(In)) _mm_prefetch(next + begin + i, _MM_HINT_T0);
      for (int k = 0; k < kUnroll; ++k) {
        const __m512 x = _mm512_max_ps(least, exponent(load(z + begin + k * kFloats), base, scale));  // NaN stays
        const Pair factors = exp2_factors(x);
        const __m512 e = _mm512_mul_ps(factors.a, factors.b);
        sum[k] = _mm512_add_ps(sum[k], e);
        if constexpr (kEntropy) weighted[k] = _mm512_fmadd_ps(e, x, weighted[k]);
      }
    }
    total = plus(total, sum);
    if constexpr (kEntropy) total_weighted = plus(total_weighted, weighted);
  }
  return {static_cast<double>(max), _mm512_reduce_add_pd(total), _mm512_reduce_add_pd(total_weighted)};
}

// A NaN with bits in its low half would become a number when it is rounded to bfloat16.
PPO_TARGET_INLINE __m512 everywhere(float x) {
  return _mm512_set1_ps(x == x ? x : std::numeric_limits<float>::quiet_NaN());
}

// logit_gradient or logp_gradient of every logit.
template <bool kEntropy, class In>
PPO_TARGET void gradient_block(const In* in, int64_t n, float max, float c, float a, float b, float k, In* out) {
  const __m512 base = everywhere(max), scale = everywhere(c), least = everywhere(least_exponent(-1e9f));
  const __m512 va = everywhere(a), vb = everywhere(b), vk = everywhere(k);
  alignas(64) In tail[2 * kFloats] = {};
  for (int64_t begin = 0; begin < n; begin += 2 * kFloats) {
    const int64_t left = n - begin;
    const In* from = in + begin;
    if (left < 2 * kFloats) from = std::copy(from, in + n, tail) - left;
    Pair z = load_pair(from);
    for (__m512* y : {&z.a, &z.b}) {
      __m512 x = exponent(*y, base, scale);
      const __mmask16 live = _mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ);
      if constexpr (kEntropy) x = _mm512_max_ps(least, x);
      const Pair factors = exp2_factors(x);
      const __m512 power = _mm512_maskz_mul_ps(live, factors.a, factors.b);
      *y = _mm512_mul_ps(power, kEntropy ? _mm512_fmadd_ps(vb, _mm512_add_ps(x, vk), va) : va);
    }
    if (left < 2 * kFloats) {
      store_pair(z, tail);
      std::copy(tail, tail + left, out + begin);
    } else {
      store_pair(z, out + begin);
    }
  }
}

}  // namespace ppo::avx512

#pragma GCC diagnostic pop

#else

namespace ppo::avx512 {

constexpr bool kBuilt = false;
inline bool supported() { return false; }

template <bool, class In>
float max_block(const In*, int64_t, float*);
template <bool, class In>
SoftmaxPart sum_block(const float*, int64_t, float, float, const In*);
template <bool, class In>
void gradient_block(const In*, int64_t, float, float, float, float, float, In*);

}  // namespace ppo::avx512

#endif

namespace ppo::avx512 {

// Whether these loops run; PPO_KERNELS_AVX512=0 begins with the portable ones.
inline std::atomic<bool>& chosen() {
  static std::atomic<bool> yes = [] {
    const char* wish = std::getenv("PPO_KERNELS_AVX512");
    return supported() && (wish == nullptr || wish[0] != '0');
  }();
  return yes;
}

inline bool here() { return chosen().load(std::memory_order_relaxed); }
inline void choose(bool wanted) { chosen() = wanted && supported(); }

}  // namespace ppo::avx512
