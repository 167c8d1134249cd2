// bfloat16 and float16 as bits, and their conversion to and from the type that ops compute in. The CPU converts by
// integer arithmetic that vectorises on every instruction set, a GPU by its own instructions.
#pragma once

#include "exp.h"

namespace ppo {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

PPO_INLINE float to_compute(BFloat16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }

PPO_INLINE float to_compute(Float16 x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  const float scaled = bits_as<float>(magnitude) * 0x1p112f;  // subnormals come out right, inf and NaN do not
  const uint32_t special = magnitude | 0x7f800000u;
  return bits_as<float>(((x.bits & 0x7c00u) == 0x7c00u ? special : bits_as<uint32_t>(scaled)) | sign);
#endif
}

PPO_INLINE float to_compute(float x) { return x; }
PPO_INLINE double to_compute(double x) { return x; }

// Round to nearest even.
PPO_INLINE void from_compute(float x, BFloat16& y) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  const uint32_t u = bits_as<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  y.bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
#endif
}

PPO_INLINE void from_compute(float x, Float16& y) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  const uint32_t u = bits_as<uint32_t>(x), magnitude = u & 0x7fffffffu, sign = (u >> 16) & 0x8000u;
  // Adding 2^(e) with e chosen so that the last float16 bit is the last float32 bit rounds subnormals right.
  const uint32_t small = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? small : normal;
  y.bits = static_cast<uint16_t>((magnitude >= 0x477ff000u ? large : finite) | sign);
#endif
}

PPO_INLINE void from_compute(float x, float& y) { y = x; }
PPO_INLINE void from_compute(double x, double& y) { y = x; }

}  // namespace ppo
