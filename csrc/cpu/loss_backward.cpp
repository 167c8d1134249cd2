// What autograd asks of a loss on CPU tensors: its gradient, scaled.
#include "cpu/loss.h"

namespace ppo {
namespace {

template <class T>
PPO_CLONES void scale_block(const T* grad, int64_t n, T scale, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = grad[i] * scale;
}

Tensor loss_backward(const Tensor& grad, const Tensor& grad_loss, const Tensor& inv_normalizer) {
  PPO_COUNT("loss_backward");
  return dispatch_compute(grad, [&](auto zero) {
    using T = decltype(zero);
    const RowVector<T> from("grad", grad, grad.sizes()), incoming("grad_loss", grad_loss, {}),
        inverse("inv_normalizer", inv_normalizer, {});
    const T scale = incoming[0] * inverse[0];
    const Tensor out = on_huge_pages(new_like(grad));
    T* to = data_of<T>(out);
    const int64_t total = grad.numel();
    for_each((total + kLossChunk - 1) / kLossChunk, 4, [&](int64_t i) {
      const int64_t begin = i * kLossChunk;
      scale_block(from.data() + begin, std::min(kLossChunk, total - begin), scale, to + begin);
    });
    return out;
  });
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CPU, m) { PPO_IMPL(m, "loss_backward", ppo::loss_backward); }
