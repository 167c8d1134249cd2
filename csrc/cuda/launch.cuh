// What a launcher needs of torch and CUDA: the tensors' device, its current stream, one way to launch, workspaces, and
// the outputs of a loss.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "checks.h"
#include "cuda/loss.cuh"

namespace ppo {

// Kernels that the compiler fits to their blocks without a spill for sm_80 and sm_90 need more registers from sm_100
// on.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kFewerBlocks = 1;
#else
constexpr int kFewerBlocks = 0;
#endif

// Makes the tensor's device current for its lifetime, and knows the stream to use.
class Launcher {
 public:
  explicit Launcher(const Tensor& x) : device_(x.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, Arguments&&... args) const {
    launch(false, kernel, blocks, threads, std::forward<Arguments>(args)...);
  }
  // The same for a kernel that may begin beside the one launched before it: see dependent_launch.cuh.
  template <class... Parameters, class... Arguments>
  void dependent(void (*kernel)(Parameters...), int64_t blocks, int threads, Arguments&&... args) const {
    int major = 0, minor = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_));
    launch(has_dependent_launch(major, minor), kernel, blocks, threads, std::forward<Arguments>(args)...);
  }

  void clear(void* memory, size_t bytes) const {
    if (bytes > 0) STD_CUDA_CHECK(cudaMemsetAsync(memory, 0, bytes, stream_));  // an empty tensor has no memory
  }

 private:
  template <class... Parameters, class... Arguments>
  void launch(bool dependent, void (*kernel)(Parameters...), int64_t blocks, int threads, Arguments&&... args) const {
    if (blocks == 0) return;
    PPO_CHECK(blocks < (int64_t{1} << 31), "too many tokens for one launch: ", blocks, " blocks");
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream_;
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &overlap;
    config.numAttrs = dependent ? 1 : 0;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(args)...));
  }

  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// The outputs of a loss and what its two launches share.
struct LossTensors {
  Tensor loss, stats, grad, inv_normalizer, partials;
  RowVector<double> normalizer;

  LossTensors(const Tensor& like, int64_t blocks, int64_t columns, int64_t n_stats, const OptTensor& given_normalizer,
              bool wants_grad)
      : loss(empty({}, ScalarType::Float, like)),
        stats(empty({n_stats}, ScalarType::Float, like)),
        grad(wants_grad ? new_like(like) : empty({0}, ScalarType::Float, like)),
        inv_normalizer(empty({}, ScalarType::Float, like)),
        partials(empty({columns * blocks}, ScalarType::Double, like)),
        normalizer("normalizer", given_normalizer, {}) {}

  LossOutputs outputs() const {
    return {data_of<float>(loss),           data_of<float>(stats), grad.numel() > 0 ? data_of<float>(grad) : nullptr,
            data_of<float>(inv_normalizer), normalizer.data(),     data_of<double>(partials)};
  }
  // Launches the kernel that writes the partials, and the one that folds them.
  template <class Loss, class Inputs>
  LossResult run(const Launcher& launch, void (*kernel)(Inputs, LossOutputs), int64_t blocks, const Inputs& in) const {
    launch(kernel, blocks, kLossThreads, in, outputs());
    launch.dependent(loss_fold_kernel<Loss>, 1, kFoldThreads, outputs(), blocks);
    return {loss, stats, grad, inv_normalizer};
  }
};

// Whether the tokens of every input are in flat vectors that begin on their boundaries.
template <class... Inputs>
bool flat_and_aligned(const TokenRows& rows, const Inputs&... inputs) {
  return !rows.packed() && ((inputs.flat() && aligned_tokens(inputs.data)) && ...);
}

template <class... Inputs>
bool any_needs_row(const Inputs&... inputs) {
  return (!inputs.flat() || ...);
}

inline int64_t loss_blocks(int64_t tokens) { return std::max<int64_t>(1, (tokens + kLossTokens - 1) / kLossTokens); }

}  // namespace ppo
