// The clipped value loss on the device: the gradient and partial sums from one launch, the loss and its
// statistics from a second one.
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

// The loss; counts of the clipped tokens and of all; the moments of the errors and of the returns.
struct ValueLoss {
  using Partials = Columns<1, 2, 2, false>;
  static constexpr int kTotal = 0;

  __device__ static double count(const double* totals) { return totals[Partials::kTokens]; }
  __device__ static void stats(const double* totals, float* out) {
    value_stats(totals[Partials::kSums], Partials::moments(totals, 0), Partials::moments(totals, 1), out);
  }
};

// A vector of tokens: what is loaded of it.
struct ValueTokens {
  float value[kTokens], old[kTokens], target[kTokens], row_weight[kTokens];
  uint32_t mask;

  template <bool kWhole, bool kFlat>
  __device__ void load(const ValueInputs& in, int g) {
    const TokenVector tokens(in.rows, first_token(g), !kFlat && in.needs_row);
    mask = load_mask<kWhole>(in.mask, tokens);
    load_tokens<kWhole>(in.values, tokens, 0.0f, value);
    load_tokens<kWhole>(in.old_values, tokens, 0.0f, old);
    load_tokens<kWhole>(in.returns, tokens, 0.0f, target);
    load_tokens<kWhole>(kFlat ? TokenInput<float>{} : in.row_weight, tokens, 1.0f, row_weight);
  }
};

// kFlat: every input has its tokens in flat, aligned vectors, and none is one for each row.
template <bool kFlat>
__global__ void __launch_bounds__(kLossThreads, kFlat ? 4 : 3) value_loss_kernel(ValueInputs in, LossOutputs out) {
  ValueTokens tokens[kLossVectors];
  load_block<kFlat>(in.rows, [&](auto whole) {
#pragma unroll
    for (int g = 0; g < kLossVectors; ++g) tokens[g].template load<whole(), kFlat>(in, g);
  });
  double sums[4] = {};  // of the loss, the errors and the returns
  WarpCounts<2> counts;
#pragma unroll
  for (int g = 0; g < kLossVectors; ++g) {
    ValueTokens& t = tokens[g];
    float grad[kTokens] = {}, loss = 0.0f;
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      if (!is_valid(t.mask, k)) continue;
      const ValueTerm<float> term = value_term(t.value[k], t.old[k], t.target[k], in.clip);
      loss += term.loss * t.row_weight[k];
      grad[k] = term.grad * t.row_weight[k];
      t.value[k] -= t.target[k];  // the error from here on
      counts.add(0, term.clipped != 0.0f);
      counts.add(1, true);
      sums[1] += t.value[k];
      sums[2] += t.target[k];
    }
    sums[0] += loss;
    if (out.grad != nullptr) store_tokens(out.grad, first_token(g), in.rows.total, grad);
  }
  write_partials<ValueLoss::Partials, kLossThreads>(sums, counts, 0.0, out.partials, [&](int i, double mean) {
    double squares = 0.0;
#pragma unroll
    for (int g = 0; g < kLossVectors; ++g) {
#pragma unroll
      for (int k = 0; k < kTokens; ++k) {
        if (!is_valid(tokens[g].mask, k)) continue;
        const double deviation = (i == 0 ? tokens[g].value[k] : tokens[g].target[k]) - mean;
        squares += deviation * deviation;
      }
    }
    return squares;
  });
}

}  // namespace ppo
