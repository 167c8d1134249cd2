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
      : rows(token_rows(tokens, cu_seqlens)), launch_(launch), raw_(rows), bounds_(tokens) {
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
    if (!packed) return;
    const auto floats = [&](size_t i) { return i < outputs.size() ? data_of<float>(outputs.begin()[i]) : nullptr; };
    bounds_ = empty({rows.count + 1}, ScalarType::Long, tokens);
    packed_ = {data_of<int64_t>(bounds_), floats(0), floats(1)};
    rows.cu = packed_.bounds;
  }

  // The op's first kernel; that of a packed batch may begin beside the one that prepares it.
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t of_blocks, const Arguments&... args) const {
    if (!rows.packed()) return launch_(kernel, of_blocks, kRowThreads, args...);
    // One block is enough for the bounds; more of them share what has to be cleared where rows claim little.
    const int64_t clearing = std::clamp<int64_t>(rows.total / (16 * kRowThreads), 1, 64);
    launch_(prepare_packed_kernel, clearing, kRowThreads, raw_, packed_);
    launch_.dependent(kernel, of_blocks, kRowThreads, args...);
  }

  TokenRows rows;
  Blocks kind;
  int64_t blocks = 0, segments = 0;

 private:
  const Launcher& launch_;
  TokenRows raw_;  // with cu_seqlens as given
  Tensor bounds_;
  PackedOutputs packed_{};
};

}  // namespace ppo
