// Proves that this toolchain builds a CUDA op: a kernel, a launch on torch's current stream, and the CUDA
// half of the stable headers. It registers nothing.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/Exception.h>

namespace {

__global__ void fill_kernel(float* out, int64_t n, float value) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) out[i] = value;
}

}  // namespace

__attribute__((visibility("default"))) void ppo_kernels_build_check(float* out, int64_t n, int32_t device) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  constexpr int kThreads = 256;
  fill_kernel<<<(n + kThreads - 1) / kThreads, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(out, n, 1.0f);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}
