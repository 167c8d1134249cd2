// What the launchers of token_logprobs share, for the CPU and for CUDA: labels per row, and the two registered forms of
// the backward.
#pragma once

#include <vector>

#include "checks.h"

namespace ppo {

// The sizes of a value per row of logits [..., V].
inline std::vector<int64_t> row_sizes(const Tensor& logits) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < logits.dim() - 1; ++d) sizes.push_back(logits.size(d));
  return sizes;
}

// K of labels [..., K], and 1 of labels [...].
inline int64_t labels_per_row(const Tensor& labels, const Tensor& logits) {
  const int64_t rows = logits.dim() - 1, many = labels.dim() == logits.dim() ? labels.size(rows) : 1;
  STD_TORCH_CHECK((labels.dim() == rows || labels.dim() == rows + 1) && many >= 1,
                  "expected labels [...] or [..., K], K >= 1, for logits [..., V]");
  for (int64_t d = 0; d < rows; ++d) {
    STD_TORCH_CHECK(labels.size(d) == logits.size(d), "size ", labels.size(d), " of dimension ", d,
                    " of the labels should be ", logits.size(d));
  }
  return many;
}

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
    kInto(logits, logits, rest...);
  }
};

}  // namespace ppo
