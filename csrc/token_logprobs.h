// The two registered forms of the backward of token_logprobs, for the CPU and for CUDA.
#pragma once

#include "checks.h"

namespace ppo {

// kInto(gradient, logits, ...) writes the gradient, kEmptyLike(logits) is memory for it.
template <class Into, Into* kInto, auto kEmptyLike>
struct TokenLogprobsBackward;

template <class... Rest, void (*kInto)(const Tensor&, const Tensor&, Rest...), auto kEmptyLike>
struct TokenLogprobsBackward<void(const Tensor&, const Tensor&, Rest...), kInto, kEmptyLike> {
  static Tensor returned(const Tensor& logits, Rest... rest) {
    PPO_COUNT("token_logprobs_backward");
    Tensor gradient = kEmptyLike(logits);
    kInto(gradient, logits, rest...);
    return gradient;
  }
  static void in_place(const Tensor& logits, Rest... rest) {
    PPO_COUNT("token_logprobs_backward_");
    check_no_overlap("logits", logits);
    kInto(logits, logits, rest...);
  }
};

}  // namespace ppo
