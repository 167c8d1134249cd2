#include "cuda/launch.cuh"
#include "cuda/value_loss.cuh"

namespace ppo {
namespace {

LossResult value_loss(const Tensor& values, const Tensor& old_values, const Tensor& returns, const OptTensor& mask,
                      const OptTensor& row_weight, const OptTensor& normalizer, const OptTensor& cu_seqlens,
                      double cliprange_value, bool grad) {
  PPO_COUNT("value_loss");
  const Launcher launch(values);
  const TokenRows rows = token_rows(values, cu_seqlens);
  const RowVector<float> row_weights("row_weight", row_weight, {rows.count});
  ValueInputs in{rows,
                 token_input<float>("values", values, values, rows),
                 token_input<float>("old_values", old_values, values, rows),
                 token_input<float>("returns", returns, values, rows),
                 per_row(row_weights.data()),
                 token_input<uint8_t>("mask", mask, values, rows),
                 static_cast<float>(cliprange_value),
                 false};
  in.needs_row = any_needs_row(in.values, in.old_values, in.returns, in.row_weight, in.mask);
  const bool flat = flat_and_aligned(rows, in.values, in.old_values, in.returns, in.row_weight, in.mask);
  const int64_t blocks = loss_blocks(values.numel());
  const LossTensors out(values, blocks, ValueLoss::Partials::kCount, ValueStat::kCount, normalizer, grad);
  return out.run<ValueLoss>(launch, flat ? value_loss_kernel<true> : value_loss_kernel<false>, blocks, in);
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CUDA, m) { PPO_IMPL(m, "value_loss", ppo::value_loss); }
