// The launcher's half of rows.cuh: which blocks work on which rows, and what they need beside the tensors.
#pragma once

#include <initializer_list>

#include "cuda/launch.cuh"
#include "cuda/rows.cuh"

namespace ppo {

inline bool vector_aligned(const Tensor& x) {
  const bool rows = x.dim() != 2 || x.size(0) <= 1 || x.stride(0) % 4 == 0;
  return rows && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
}

class RowWork {
 public:
  enum Blocks { kShortTeams, kWarps, kOneSegment, kSegments };

  // `outputs`: token tensors of which a packed launch clears the tokens that no row claims.
  RowWork(const Launcher& launch, const Tensor& tokens, const OptTensor& cu_seqlens,
          std::initializer_list<Tensor> outputs)
      : rows(token_rows(tokens, cu_seqlens)), bounds_(tokens) {
    const bool packed = rows.packed();
    // A packed batch's longest row is on the device; its mean length is here.
    const int64_t typical = packed ? rows.total / std::max<int64_t>(rows.count, 1) : rows.length;
    const int64_t per_row = std::max<int64_t>(1, (rows.length + kSegment - 1) / kSegment);
    segments = rows.count == 0 ? 0 : packed ? rows.total / kSegment + rows.count : rows.count * per_row;
    const int64_t per_block = typical <= kShortTeam * kRun && !packed ? kRowThreads / kShortTeam : kTiles;
    if (typical <= kTile) {
      kind = per_block == kTiles ? kWarps : kShortTeams;
      blocks = (rows.count + per_block - 1) / per_block;
    } else {
      kind = packed || per_row > 1 ? kSegments : kOneSegment;
      blocks = segments;
    }
    if (packed) prepare_packed(launch, outputs);
  }

  TokenRows rows;
  Blocks kind;
  int64_t blocks = 0, segments = 0;

 private:
  void prepare_packed(const Launcher& launch, std::initializer_list<Tensor> outputs) {
    const Tensor like = bounds_;
    bounds_ = empty({rows.count + 1}, ScalarType::Long, like);
    const auto floats = [&](size_t i) { return i < outputs.size() ? data_of<float>(outputs.begin()[i]) : nullptr; };
    auto* bounds = data_of<int64_t>(bounds_);
    launch(prepare_packed_kernel, 1, kRowThreads, rows, PackedOutputs{bounds, floats(0), floats(1)});
    rows.cu = bounds;
  }

  Tensor bounds_;
};

}  // namespace ppo
