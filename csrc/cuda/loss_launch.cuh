// The launcher's half of loss.cuh: outputs and workspace of one loss.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/loss.cuh"

namespace ppo {

struct LossTensors {
  Tensor loss, stats, grad, inv_normalizer, partials, ticket;

  LossTensors(const Launcher& launch, const Tensor& like, int64_t blocks, int64_t partials_per_block, int64_t n_stats,
              bool wants_grad)
      : loss(empty({}, ScalarType::Float, like)),
        stats(empty({n_stats}, ScalarType::Float, like)),
        grad(wants_grad ? torch::stable::new_empty(like, like.sizes()) : torch::stable::new_empty(like, {0})),
        inv_normalizer(empty({}, ScalarType::Float, like)),
        partials(empty({partials_per_block * blocks}, ScalarType::Double, like)),
        ticket(launch.tickets(1, like)) {}

  LossOutputs outputs(const OptTensor& normalizer) const {
    const auto floats = [](const Tensor& t) { return static_cast<float*>(t.data_ptr()); };
    return {floats(loss),
            floats(stats),
            grad.dim() == 1 && grad.size(0) == 0 ? nullptr : floats(grad),
            floats(inv_normalizer),
            data_or_null<double>(normalizer, 1, ScalarType::Double),
            static_cast<double*>(partials.data_ptr()),
            static_cast<unsigned*>(ticket.data_ptr())};
  }
};

inline int64_t loss_blocks(int64_t tokens) { return std::max<int64_t>(1, (tokens + kLossTokens - 1) / kLossTokens); }

}  // namespace ppo
