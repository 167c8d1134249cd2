// Soft clipping on CPU tensors: one pass, a chunk per thread at a time.
#include "math/soft_clip.h"

#include "cpu/block.h"

namespace ppo {
namespace {

constexpr int64_t kChunk = 16384;

template <class T>
PPO_CLONES void soft_clip_chunk(const T* x, const uint8_t* mask, int64_t n, T cap, T* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = mask == nullptr || mask[i] != 0 ? soft_clip(x[i], cap) : T(0);
}

Tensor soft_clip_cpu(const Tensor& x, const OptTensor& mask, double cap) {
  PPO_COUNT("soft_clip");
  return dispatch_compute(x, [&](auto zero) {
    using T = decltype(zero);
    const T* values = contiguous_data<T>("x", x, x);
    const uint8_t* valid = contiguous_data<uint8_t>("mask", mask, x);
    const Tensor y = new_like(x);
    T* out = data_of<T>(y);
    for_each((x.numel() + kChunk - 1) / kChunk, 1, [&](int64_t chunk) {
      const int64_t begin = chunk * kChunk, n = std::min(kChunk, x.numel() - begin);
      soft_clip_chunk(values + begin, valid == nullptr ? nullptr : valid + begin, n, static_cast<T>(cap), out + begin);
    });
    return y;
  });
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CPU, m) { PPO_IMPL(m, "soft_clip", ppo::soft_clip_cpu); }
