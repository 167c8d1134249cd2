// What a launcher needs of torch and CUDA: the tensors' device, its current stream, one way to launch, workspaces.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "checks.h"
#include "cuda/tokens.cuh"

// The host tests compile the launchers too; there tensors are CPU tensors and the ops have a namespace of their own.
#ifdef PPO_HOST_CUDA
#define PPO_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(ppo_kernels_host_cuda, CPU, m)
#define PPO_CUDA_CHECK(call) static_cast<void>(call)
#else
#define PPO_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CUDA, m)
#define PPO_CUDA_CHECK(call) STD_CUDA_CHECK(call)
#endif

namespace ppo {

// Makes the tensor's device current for its lifetime, and knows the stream to use.
class Launcher {
 public:
#ifdef PPO_HOST_CUDA
  explicit Launcher(const Tensor&) {}
#else
  explicit Launcher(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
#endif

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, Arguments&&... args) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "too many tokens for one launch: ", blocks, " blocks");
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream_;
    PPO_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(args)...));
  }

  // Zeroed counters by which the blocks of one launch find out which of them is the last.
  Tensor tickets(int64_t count, const Tensor& like) const {
    Tensor t = empty({count}, ScalarType::Int, like);
    PPO_CUDA_CHECK(cudaMemsetAsync(t.data_ptr(), 0, count * sizeof(unsigned), stream_));
    return t;
  }

 private:
  cudaStream_t stream_ = nullptr;
#ifndef PPO_HOST_CUDA
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

template <class T>
const T* data_or_null(const OptTensor& x, int64_t count, ScalarType dtype) {
  if (!x.has_value()) return nullptr;
  check_dtype(*x, dtype);
  STD_TORCH_CHECK(x->numel() == count && x->is_contiguous(), "expected ", count, " contiguous elements");
  return static_cast<const T*>(x->data_ptr());
}

inline TokenRows token_rows(const Tensor& tokens, const OptTensor& cu_seqlens) {
  if (!cu_seqlens.has_value()) {
    STD_TORCH_CHECK(tokens.dim() == 2, "expected [B, T]");
    return {nullptr, tokens.size(0), tokens.size(1), tokens.numel(), 1.0 / static_cast<double>(tokens.size(1))};
  }
  STD_TORCH_CHECK(tokens.dim() == 1 && cu_seqlens->dim() == 1, "expected [N] and cu_seqlens [B+1]");
  STD_TORCH_CHECK(cu_seqlens->numel() >= 1, "expected cu_seqlens [B+1]");
  const auto* cu = data_or_null<int64_t>(cu_seqlens, cu_seqlens->numel(), ScalarType::Long);
  return {cu, cu_seqlens->numel() - 1, 0, tokens.numel(), 0.0};
}

inline TokenInput<float> row_input(const OptTensor& x, const TokenRows& rows) {
  const auto* data = data_or_null<float>(x, rows.rows, ScalarType::Float);
  return {data, 1, data == nullptr ? TokenKind::kAbsent : TokenKind::kPerRow};
}

template <class T>
TokenInput<T> token_input(const OptTensor& x, const Tensor& tokens, const TokenRows& rows,
                          bool may_be_per_row = false) {
  if (!x.has_value()) return {};
  if constexpr (std::is_same_v<T, uint8_t>) {
    STD_TORCH_CHECK(x->scalar_type() == ScalarType::Bool || x->scalar_type() == ScalarType::Byte, "masks are bytes");
  } else {
    check_dtype(*x, dtype_of<T>());
  }
  const auto* data = static_cast<const T*>(x->data_ptr());
  const bool packed = rows.cu != nullptr;
  if (may_be_per_row && x->dim() == 2 && x->size(1) == 1 && (packed || tokens.size(1) != 1)) {
    STD_TORCH_CHECK(x->size(0) == rows.rows, "expected one value per row");
    return {data, x->stride(0), TokenKind::kPerRow};
  }
  check_same_shape(*x, tokens);
  check_unit_stride(*x);
  if (packed) return {data, 0, TokenKind::kFlat};
  const bool flat = x->stride(0) == x->size(1) || x->size(0) <= 1;
  return {data, x->stride(0), flat ? TokenKind::kFlat : TokenKind::kStrided};
}

}  // namespace ppo
