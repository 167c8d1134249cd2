// What policy_loss and value_loss share on the CPU: rows cut into pieces of fixed length, partial sums folded in order.
#pragma once

#include "cpu/block.h"
#include "cpu/pages.h"

namespace ppo {

constexpr int64_t kPiece = 4096;  // tokens of one row that one partial sum covers

struct Piece {
  int64_t row, begin, length;
};

inline std::vector<Piece> cut_rows(const Rows& rows) {
  std::vector<Piece> pieces;
  for (int64_t b = 0; b < rows.count(); ++b) {
    for (int64_t t = 0; t < rows.length(b); t += kPiece) {
      pieces.push_back({b, t, std::min(kPiece, rows.length(b) - t)});
    }
  }
  return pieces;
}

struct LossOutputs {
  Tensor loss, stats, grad, inv_normalizer;
};

// loss = total / normalizer, 0 where the normalizer is 0.
template <class T>
LossOutputs finish_loss(double total, double count, const OptTensor& normalizer, const std::vector<double>& stats,
                        Tensor grad, const Tensor& like) {
  const Dense<double> given(normalizer, 1, ScalarType::Double);
  const double scale = given ? given[0] : count;
  const double inverse = scale == 0.0 ? 0.0 : 1.0 / scale;
  const auto filled = [&](torch::headeronly::IntHeaderOnlyArrayRef sizes, const double* values, int64_t n) {
    Tensor t = empty(sizes, dtype_of<T>(), like);
    std::transform(values, values + n, static_cast<T*>(t.data_ptr()), [](double x) { return static_cast<T>(x); });
    return t;
  };
  const int64_t size = static_cast<int64_t>(stats.size());
  const double loss = scale == 0.0 ? 0.0 : total * inverse;
  return {filled({}, &loss, 1), filled({size}, stats.data(), size), std::move(grad), filled({}, &inverse, 1)};
}

// The gradient of a token tensor; empty unless asked for.
inline Tensor new_gradient(const Tensor& tokens, const Rows& rows, bool wanted) {
  return wanted ? on_huge_pages(new_tokens(tokens, rows)) : torch::stable::new_empty(tokens, {0});
}

}  // namespace ppo
