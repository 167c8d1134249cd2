// Relaxed accesses of a word that other blocks read or write.
#pragma once

namespace ppo {

__device__ inline unsigned load_relaxed(const unsigned* p) {
  unsigned x;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}

__device__ inline void store_relaxed(unsigned* p, unsigned x) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" : : "l"(p), "r"(x) : "memory");
}

}  // namespace ppo
