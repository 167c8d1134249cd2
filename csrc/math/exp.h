// Exponentials that vectorise, and keep -inf, NaN and overflow right without any branch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "macros.h"

namespace ppo {

template <class To, class From>
PPO_INLINE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(To));
  return y;
}

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

constexpr float kRoundToInt = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits

// 2^f * 2^n for |f| <= 1/2, with n given as n + kRoundToInt, -125 <= n <= 128. 2^f is the relative minimax polynomial
// of degree 6 that is 1 at 0; its error in float32 is 1e-7.
PPO_INLINE float exp2_parts(float f, float rounded_n) {
  float p = 0x1.41fbbcp-13f;
  p = p * f + 0x1.5f3e54p-10f;
  p = p * f + 0x1.3b2d4cp-7f;
  p = p * f + 0x1.c6aee8p-5f;
  p = p * f + 0x1.ebfbdcp-3f;
  p = p * f + 0x1.62e430p-1f;
  p = p * f + 1.0f;
  // 2^128 is no float, so that the scale is 2^(n-1) and one doubling.
  const int32_t n = bits_as<int32_t>(rounded_n) - bits_as<int32_t>(kRoundToInt);
  return p * bits_as<float>((n + 126) << 23) * 2.0f;
}

// The same of degree 5, for sums that are judged as a whole: its error is 1e-7 before and 2e-7 after rounding.
constexpr float kExp2Short[] = {0x1.5bba12p-10f, 0x1.3cea88p-7f, 0x1.c6b752p-5f, 0x1.ebf9bcp-3f, 0x1.62e42ap-1f, 1.0f};

// 2^x for -125 <= x <= 0, or NaN. The exponent's bias is in the rounding constant, so that a shift makes the scale.
PPO_INLINE float exp2_nonpositive(float x) {
  constexpr float kRoundAndBias = kRoundToInt + 127.0f;
  const float n = x + kRoundAndBias;
  const float f = x - (n - kRoundAndBias);
  float p = kExp2Short[0];
  p = p * f + kExp2Short[1];
  p = p * f + kExp2Short[2];
  p = p * f + kExp2Short[3];
  p = p * f + kExp2Short[4];
  return (p * f + kExp2Short[5]) * bits_as<float>(bits_as<uint32_t>(n) << 23);
}

// 2^x; 0 below -125 (where a float would be subnormal or close to it), infinite from 128 on, NaN for NaN.
PPO_INLINE float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // one instruction, 2 units in the last place
  return y;
#else
  const float bounded = x < -125.0f ? -125.0f : (x > 128.0f ? 128.0f : x);
  const float n = bounded + kRoundToInt;
  const float y = exp2_parts(bounded - (n - kRoundToInt), n);
  return x < -125.0f ? 0.0f : y;
#endif
}

PPO_INLINE double exp2_nonpositive(double x) { return std::exp2(x); }

// e^x; 0 below -86.6, infinite above 88.7, NaN for NaN. ln 2 in two parts keeps the reduced argument exact.
PPO_INLINE float exp_fast(float x) {
#ifdef __CUDA_ARCH__
  return ::expf(x);
#else
  constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.42860677e-06f;
  const float bounded = x < -86.6f ? -86.6f : (x > 89.0f ? 89.0f : x);
  const float rounded = bounded * static_cast<float>(kLog2E) + kRoundToInt;
  const float n = rounded - kRoundToInt;
  const float r = (bounded - n * kLn2High) - n * kLn2Low;
  const float y = exp2_parts(r * static_cast<float>(kLog2E), rounded);
  return x < -86.6f ? 0.0f : y;
#endif
}

PPO_INLINE double exp_fast(double x) { return std::exp(x); }

// The natural logarithm to a few units in the last place of the larger of 1 and itself; NaN below 0.
PPO_INLINE float log_fast(float x) {
#ifdef __CUDA_ARCH__
  return ::logf(x);
#else
  // x = m 2^n with m in [2/3, 4/3); log m = 2 atanh((m - 1) / (m + 1)).
  constexpr int32_t kTwoThirds = 0x3f2aaaab;
  const int32_t n = (bits_as<int32_t>(x) - kTwoThirds) >> 23;
  const float m = bits_as<float>(bits_as<int32_t>(x) - static_cast<int32_t>(static_cast<uint32_t>(n) << 23));
  const float f = (m - 1.0f) / (m + 1.0f), g = f * f;
  const float p = 2.0f * f * (1.0f + g * (1.0f / 3.0f + g * (1.0f / 5.0f + g * (1.0f / 7.0f + g * (1.0f / 9.0f)))));
  const float y = p + static_cast<float>(n) * static_cast<float>(kLn2);
  const float limit = x == 0.0f ? -std::numeric_limits<float>::infinity() : x + std::numeric_limits<float>::quiet_NaN();
  return x > 0.0f ? (x < std::numeric_limits<float>::infinity() ? y : x) : limit;
#endif
}

PPO_INLINE double log_fast(double x) { return std::log(x); }

// e^x - 1 - x without cancellation: 1 % of k3 is lost at x = 1e-3 when the three terms are added in float32.
PPO_INLINE float expm1_minus(float x, float exp_x) {
  float p = 1.0f / 40320.0f;
  p = p * x + 1.0f / 5040.0f;
  p = p * x + 1.0f / 720.0f;
  p = p * x + 1.0f / 120.0f;
  p = p * x + 1.0f / 24.0f;
  p = p * x + 1.0f / 6.0f;
  p = p * x + 0.5f;
  const float near = p * x * x, far = exp_x - 1.0f - x;
  return x > -0.5f && x < 0.5f ? near : far;
}

PPO_INLINE double expm1_minus(double x, double) { return std::expm1(x) - x; }

}  // namespace ppo
