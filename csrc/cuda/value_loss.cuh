// The clipped value loss on the device: loss, statistics and gradient from one launch.
#pragma once

#include "cuda/loss.cuh"
#include "math/value_loss.h"

namespace ppo {

struct ValueInputs {
  TokenRows rows;
  TokenInput<float> values, old_values, returns, row_weight;
  TokenInput<uint8_t> mask;
  float clip;
  bool needs_row;
};

struct ValueSum {
  enum { kLoss, kClipped, kTokens, kError, kTarget, kPadded = 8 };
};
struct ValuePartial {
  enum { kLoss, kClipped, kTokens, kErrorMean, kErrorM2, kTargetMean, kTargetM2, kCount };
};

static __global__ void __launch_bounds__(kLossThreads) value_loss_kernel(ValueInputs in, LossOutputs out) {
  float errors[kLossVectors][kTokens], targets[kLossVectors][kTokens];
  bool valid[kLossVectors][kTokens];
  double sums[ValueSum::kPadded] = {};
#pragma unroll
  for (int g = 0; g < kLossVectors; ++g) {
    const TokenVector tokens(in.rows, first_token(g), in.needs_row);
    float value[kTokens], old[kTokens], target[kTokens], weight[kTokens], grad[kTokens];
    uint8_t mask[kTokens];
    load_tokens(in.values, tokens, 0.0f, value);
    load_tokens(in.old_values, tokens, 0.0f, old);
    load_tokens(in.returns, tokens, 0.0f, target);
    load_tokens(in.row_weight, tokens, 1.0f, weight);
    load_tokens(in.mask, tokens, uint8_t{1}, mask);
    float loss = 0.0f;
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      valid[g][k] = tokens.claimed[k] && mask[k] != 0;
      errors[g][k] = valid[g][k] ? value[k] - target[k] : 0.0f;
      targets[g][k] = valid[g][k] ? target[k] : 0.0f;
      grad[k] = 0.0f;
      if (!valid[g][k]) continue;
      const ValueTerm<float> term = value_term(value[k], old[k], target[k], in.clip);
      loss += term.loss * weight[k];
      grad[k] = term.grad * weight[k];
      sums[ValueSum::kClipped] += term.clipped;
      sums[ValueSum::kTokens] += 1.0;
      sums[ValueSum::kError] += errors[g][k];
      sums[ValueSum::kTarget] += targets[g][k];
    }
    sums[ValueSum::kLoss] += loss;
    if (out.grad != nullptr) store_tokens(out.grad, tokens, in.rows.total, grad);
  }
  const double* block = block_sums<ValueSum::kPadded, kLossThreads>(sums);
  const double loss = block[ValueSum::kLoss], clipped = block[ValueSum::kClipped], count = block[ValueSum::kTokens];
  const double error_mean = mean_of(block[ValueSum::kError], count),
               target_mean = mean_of(block[ValueSum::kTarget], count);
  double squares[2] = {};
#pragma unroll
  for (int g = 0; g < kLossVectors; ++g) {
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      if (!valid[g][k]) continue;
      const double error = errors[g][k] - error_mean, target = targets[g][k] - target_mean;
      squares[0] += error * error;
      squares[1] += target * target;
    }
  }
  const double* m2 = block_sums<2, kLossThreads>(squares);
  const unsigned blocks = gridDim.x;
  if (threadIdx.x == 0) {
    const double part[ValuePartial::kCount] = {loss, clipped, count, error_mean, m2[0], target_mean, m2[1]};
    for (int i = 0; i < ValuePartial::kCount; ++i)
      out.partials[i * static_cast<int64_t>(blocks) + blockIdx.x] = part[i];
  }
  if (!is_last_block(out.ticket, blocks)) return;

  const auto part = [&](int i) { return partials_of(out, i, blocks); };
  double totals[2] = {fold_sum(part(ValuePartial::kLoss), blocks), fold_sum(part(ValuePartial::kClipped), blocks)};
  const double* total = block_sums<2, kLossThreads>(totals);
  const Moments error =
      fold_moments(part(ValuePartial::kTokens), part(ValuePartial::kErrorMean), part(ValuePartial::kErrorM2), blocks);
  const Moments target =
      fold_moments(part(ValuePartial::kTokens), part(ValuePartial::kTargetMean), part(ValuePartial::kTargetM2), blocks);
  if (threadIdx.x != 0) return;
  finish_loss(out, total[0], error.count);
  value_stats(total[1], error, target, out.stats);
}

}  // namespace ppo
