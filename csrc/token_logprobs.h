// What the launchers of token_logprobs share, for the CPU and for CUDA: labels per row, and the two registered forms of
// the backward.
#pragma once

#include "checks.h"

namespace ppo {

// K of labels [..., K], and 1 of labels [...].
inline int64_t labels_per_row(const Tensor& labels, const Tensor& logits) {
  const int64_t rows = logits.dim() - 1, many = labels.dim() == logits.dim() ? labels.size(rows) : 1;
  const Sizes sizes = labels.sizes(), leading = leading_sizes(logits);
  PPO_CHECK((labels.dim() == rows || labels.dim() == rows + 1) && many >= 1 &&
                std::equal(leading.begin(), leading.end(), sizes.begin()),
            "labels must have the shape ", shape_text(leading), ", or that and K >= 1, got ", shape_text(sizes));
  return many;
}

// The maximum and the logarithm of the sum of each row, and its entropy where it is asked for.
inline std::vector<int64_t> stats_shape(Sizes rows, bool entropy) {
  std::vector<int64_t> shape{entropy ? 3 : 2};
  shape.insert(shape.end(), rows.begin(), rows.end());
  return shape;
}

// Of given ones, which may have an entropy that is not needed.
inline std::vector<int64_t> stats_shape(const Tensor& given, Sizes rows, bool entropy) {
  return stats_shape(rows, entropy || (given.dim() > 0 && given.size(0) == 3));
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
    check_no_overlap("logits", logits);
    ApartFrom("logits", logits, rest...);
    kInto(logits, logits, rest...);
  }
};

}  // namespace ppo
