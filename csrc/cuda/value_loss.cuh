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

constexpr int kValuePartials = 7;

static __global__ void __launch_bounds__(kLossThreads) value_loss_kernel(ValueInputs in, LossOutputs out) {
  float errors[kLossGroups][kTokens], targets[kLossGroups][kTokens];
  bool valid[kLossGroups][kTokens];
  double sums[8] = {};  // loss, clipped, count, errors, targets
#pragma unroll
  for (int g = 0; g < kLossGroups; ++g) {
    const int64_t first = blockIdx.x * kLossTokens + (int64_t{g} * kLossThreads + threadIdx.x) * kTokens;
    const TokenGroup group(in.rows, first, in.needs_row);
    float value[kTokens], old[kTokens], target[kTokens], weight[kTokens], grad[kTokens];
    uint8_t mask[kTokens];
    load_tokens(in.values, group, 0.0f, value);
    load_tokens(in.old_values, group, 0.0f, old);
    load_tokens(in.returns, group, 0.0f, target);
    load_tokens(in.row_weight, group, 1.0f, weight);
    load_tokens(in.mask, group, uint8_t{1}, mask);
    float loss = 0.0f;
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      valid[g][k] = group.claimed[k] && mask[k] != 0;
      errors[g][k] = valid[g][k] ? value[k] - target[k] : 0.0f;
      targets[g][k] = valid[g][k] ? target[k] : 0.0f;
      grad[k] = 0.0f;
      if (!valid[g][k]) continue;
      const ValueTerm<float> term = value_term(value[k], old[k], target[k], in.clip);
      loss += term.loss * weight[k];
      grad[k] = term.grad * weight[k];
      sums[1] += term.clipped;
      sums[2] += 1.0;
      sums[3] += errors[g][k];
      sums[4] += targets[g][k];
    }
    sums[0] += loss;
    if (out.grad != nullptr) store_tokens(out.grad, group, in.rows.total, grad);
  }
  const double* block = block_sums<8, kLossThreads>(sums);
  const double loss = block[0], clipped = block[1], count = block[2];
  const double error_mean = count > 0.0 ? block[3] / count : 0.0, target_mean = count > 0.0 ? block[4] / count : 0.0;
  double squares[2] = {};
#pragma unroll
  for (int g = 0; g < kLossGroups; ++g) {
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
    const double part[kValuePartials] = {loss, clipped, count, error_mean, m2[0], target_mean, m2[1]};
    for (int i = 0; i < kValuePartials; ++i) out.partials[i * static_cast<int64_t>(blocks) + blockIdx.x] = part[i];
  }
  if (!is_last_block(out.ticket, blocks)) return;

  const auto part = [&](int i) { return out.partials + i * static_cast<int64_t>(blocks); };
  double totals[2] = {fold_sum(part(0), blocks), fold_sum(part(1), blocks)};
  const double* total = block_sums<2, kLossThreads>(totals);
  const Moments error = fold_moments(part(2), part(3), part(4), blocks);
  const Moments target = fold_moments(part(2), part(5), part(6), blocks);
  if (threadIdx.x != 0) return;
  const double n = error.count;
  finish_loss(out, total[0], n);
  out.stats[0] = static_cast<float>(n > 0.0 ? total[1] / n : 0.0);
  out.stats[1] = static_cast<float>(error.mean);
  out.stats[2] = static_cast<float>(n > 0.0 && target.m2 > 0.0 ? 1.0 - error.m2 / target.m2 : 0.0);
  out.stats[3] = static_cast<float>(n);
}

}  // namespace ppo
