// What the formulas need to compile as C++ for the CPU and as CUDA.
#pragma once

#ifdef __CUDACC__
#define PPO_INLINE __host__ __device__ __forceinline__
#else
#define PPO_INLINE inline __attribute__((always_inline))  // so that they take on the caller's instruction set
#endif
