// Programmatic dependent launch: the second kernel of a call may begin while the first one runs, so that what a launch
// costs, and the inputs that the second one reads, are had beside it.
//
// The first kernel (the primary) is launched as any other and says early that the second one may begin. Each thread of
// the second one (the dependent) waits before it reads what the first has written, before it writes, and before it
// ends. A dependent may be the primary of a third kernel: when that one's wait returns, both have ended. What is read
// before a wait was there before the first of all began. From sm_90 on; elsewhere a kernel begins when the one before
// it has ended, as ever.
#pragma once

#include <cuda_runtime.h>

namespace ppo {

// By the primary: when all of its blocks have said so or ended, the blocks of the dependent may begin.
__device__ inline void allow_dependent_launch() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// By every thread of the dependent: returns when the primary has ended and its writes are seen.
__device__ inline void wait_for_primary() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Whether the code that this binary has for a device contains that wait. Code compiled for the same major version is
// what runs there; a device for which there is only PTX of an older one gets no overlap.
constexpr bool has_dependent_launch(int major, int minor) {
  for (const int compiled : {__CUDA_ARCH_LIST__}) {
    if (compiled >= 900 && compiled / 100 == major && compiled <= 100 * major + 10 * minor) return true;
  }
  return false;
}

}  // namespace ppo
