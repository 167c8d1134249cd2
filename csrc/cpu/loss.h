// What the losses share on the CPU: rows cut into chunks of fixed length, partial sums folded in order, outputs.
#pragma once

#include "cpu/block.h"
#include "cpu/pages.h"
#include "math/loss.h"

namespace ppo {

constexpr int64_t kLossChunk = 4096;  // tokens of one row that one partial sum covers

struct Chunk {
  int64_t row, begin, end;
};

inline std::vector<Chunk> cut_rows(const Rows& rows) {
  std::vector<Chunk> chunks;
  for (int64_t b = 0; b < rows.count; ++b) {
    const int64_t length = rows.size(b);
    for (int64_t t = 0; t < length; t += kLossChunk) chunks.push_back({b, t, std::min(t + kLossChunk, length)});
  }
  return chunks;
}

// Calls f(begin, n) for every block of a chunk.
template <class F>
void for_blocks(const Chunk& chunk, const F& f) {
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += kBlock) f(begin, std::min(kBlock, chunk.end - begin));
}

// A block that is not full vectors is padded: a token's place in a sum must not depend on the padding of its row.
inline int64_t padded_to_vectors(int64_t n) { return (n + 63) / 64 * 64; }

// The block itself, or a copy in `scratch` with zeros behind it.
template <class T>
const T* padded_block(const T* x, int64_t n, T* scratch) {
  if (n == padded_to_vectors(n)) return x;
  std::fill(std::copy(x, x + n, scratch), scratch + padded_to_vectors(n), T(0));
  return scratch;
}

// The gradient of a token tensor; empty unless asked for.
inline Tensor new_gradient(const Tensor& tokens, const Rows& rows, bool wanted) {
  return wanted ? on_huge_pages(new_tokens(tokens, rows)) : torch::stable::new_empty(tokens, {0});
}

// `count` takes the place of a normalizer that is not given.
template <class T>
LossResult finish_loss(double total, double count, const OptTensor& normalizer, Tensor stats, Tensor grad) {
  const RowVector<double> given("normalizer", normalizer, {});
  const NormalizedLoss result = normalize_loss(total, given ? given[0] : count);
  const auto scalar = [&](double value) {
    Tensor x = empty({}, dtype_of<T>(), stats);
    *data_of<T>(x) = static_cast<T>(value);
    return x;
  };
  return {scalar(result.loss), std::move(stats), std::move(grad), scalar(result.inv_normalizer)};
}

}  // namespace ppo
