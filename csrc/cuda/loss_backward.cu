// What autograd asks of a loss on the device: its gradient, scaled, by a launch that reads the scale there.
#include "cuda/launch.cuh"

namespace ppo {

struct LossBackwardInputs {
  TokenInput<float> grad;
  const float *grad_loss, *inv_normalizer;
  int64_t total;
};

static __global__ void __launch_bounds__(kLossThreads) loss_backward_kernel(LossBackwardInputs in, float* out) {
  const TokenRows all{nullptr, 1, in.total, in.total, 0.0};
  float grad[kLossVectors][kTokens];
#pragma unroll
  for (int g = 0; g < kLossVectors; ++g) {
    load_tokens<false>(in.grad, TokenVector(all, first_token(g), false), 0.0f, grad[g]);
  }
  const float scale = *in.grad_loss * *in.inv_normalizer;
#pragma unroll
  for (int g = 0; g < kLossVectors; ++g) {
#pragma unroll
    for (int k = 0; k < kTokens; ++k) grad[g][k] *= scale;
    store_tokens(out, first_token(g), in.total, grad[g]);
  }
}

namespace {

Tensor loss_backward(const Tensor& grad, const Tensor& grad_loss, const Tensor& inv_normalizer) {
  PPO_COUNT("loss_backward");
  const Launcher launch(grad);
  const Tensor out = new_like(grad);
  const RowVector<float> from("grad", grad, grad.sizes()), incoming("grad_loss", grad_loss, {}),
      inverse("inv_normalizer", inv_normalizer, {});
  const LossBackwardInputs in{{from.data()}, incoming.data(), inverse.data(), grad.numel()};
  launch(loss_backward_kernel, grad.numel() == 0 ? 0 : loss_blocks(grad.numel()), kLossThreads, in,
         data_of<float>(out));
  return out;
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CUDA, m) { PPO_IMPL(m, "loss_backward", ppo::loss_backward); }
