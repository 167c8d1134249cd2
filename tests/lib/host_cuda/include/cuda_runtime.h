// Test only: just enough of CUDA to compile the kernels and launchers with a C++ compiler and run them on the host.
// What it does not show is in README.md beside it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

// How many blocks run at the same time. All threads of a block are fibers of one OS thread.
#ifndef HOST_CUDA_BLOCKS
#define HOST_CUDA_BLOCKS 1
#endif
#if HOST_CUDA_BLOCKS > 1
#define __shared__ static thread_local
#else
#define __shared__ static  // ASan puts red zones around it
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

namespace host_cuda {

struct Thread {
  unsigned index, block;
};
extern thread_local Thread* current;
extern unsigned block_size, grid_size;

using Kernel = std::function<void()>;
// `dependent`: the kernel could begin beside the one before it. It is run behind it; that both say what such a pair has
// to say is checked.
void run(unsigned blocks, unsigned threads, bool dependent, std::shared_ptr<const Kernel> kernel);
void allow_dependent();
void wait_for_primary();
// Notes a launch or a memset (of no kernel) where launches are recorded; false: it shall not be carried out.
bool note(const void* kernel, unsigned blocks, unsigned threads);

void sync_block();
void sync_warp(unsigned mask);
// `value` of the lane `source`. It orders no memory, as in CUDA.
uint64_t exchange(unsigned mask, uint64_t value, unsigned source);

template <class T>
T shuffle(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned lane() { return current->index % 32; }

}  // namespace host_cuda

struct HostThreadIdx {
  struct {
    operator unsigned() const { return host_cuda::current->index; }
  } x;
};
struct HostBlockIdx {
  struct {
    operator unsigned() const { return host_cuda::current->block; }
  } x;
};
struct HostBlockDim {
  struct {
    operator unsigned() const { return host_cuda::block_size; }
  } x;
};
struct HostGridDim {
  struct {
    operator unsigned() const { return host_cuda::grid_size; }
  } x;
};
inline constexpr HostThreadIdx threadIdx{};
inline constexpr HostBlockIdx blockIdx{};
inline constexpr HostBlockDim blockDim{};
inline constexpr HostGridDim gridDim{};

inline void cudaTriggerProgrammaticLaunchCompletion() { host_cuda::allow_dependent(); }
inline void cudaGridDependencySynchronize() { host_cuda::wait_for_primary(); }
inline void __syncthreads() { host_cuda::sync_block(); }
inline void __syncwarp(unsigned mask = ~0u) { host_cuda::sync_warp(mask); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return host_cuda::shuffle(mask, value, static_cast<unsigned>(source) % 32);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return host_cuda::shuffle(mask, value, host_cuda::lane() ^ static_cast<unsigned>(lanes));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const unsigned source = host_cuda::lane() + delta;
  return host_cuda::shuffle(mask, value, source < 32 ? source : host_cuda::lane());
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  const unsigned lane = host_cuda::lane();
  return host_cuda::shuffle(mask, value, lane >= delta ? lane - delta : lane);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  unsigned votes = (predicate ? 1u : 0u) << host_cuda::lane();
  for (int lanes = 1; lanes < 32; lanes *= 2) votes |= __shfl_xor_sync(mask, votes, lanes);
  return votes;
}

inline int __reduce_max_sync(unsigned mask, int value) {
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int other = __shfl_xor_sync(mask, value, lanes);
    value = other > value ? other : value;
  }
  return value;
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  for (int lanes = 1; lanes < 32; lanes *= 2) value += __shfl_xor_sync(mask, value, lanes);
  return value;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
union cudaLaunchAttributeValue {
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... args) {
  const unsigned blocks = config->gridDim.x, threads = config->blockDim.x;
  bool dependent = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id != cudaLaunchAttributeProgrammaticStreamSerialization) continue;
    dependent = config->attrs[i].val.programmaticStreamSerializationAllowed != 0;
  }
  if (host_cuda::note(reinterpret_cast<const void*>(kernel), blocks, threads)) {
    const auto call = [kernel, ... own = static_cast<Parameters>(args)] { kernel(own...); };
    host_cuda::run(blocks, threads, dependent, std::make_shared<const host_cuda::Kernel>(call));
  }
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  if (host_cuda::note(nullptr, 0, 0)) std::memset(address, value, bytes);
  return cudaSuccess;
}
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
  return cudaSuccess;
}
#define __CUDA_ARCH_LIST__ 900
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
