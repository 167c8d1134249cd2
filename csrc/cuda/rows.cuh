// Rows for the ops that look along time: who works on which part of a row, and loads of 8 consecutive tokens per lane
// wherever a row begins.
//
// A row is cut into segments of 2048 tokens and those into tiles of 256, both counted from its start. A tile is a
// warp's, in short rows that of a smaller team. Either a warp walks its row tile by tile, or each segment has a block.
// What a row's tiles hold is folded in the same order both ways, to the last bit, so that the choice is free.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/tokens.cuh"

namespace ppo {

constexpr int kRowThreads = 256;
constexpr int kRun = 8;  // consecutive tokens of a lane
constexpr int kTile = kWarp * kRun;
constexpr int kTiles = kRowThreads / kWarp;  // of a segment
constexpr int kSegment = kTile * kTiles;
constexpr int kShortTeam = 8;  // lanes for a row of up to 64 tokens
constexpr int kStage = kRowThreads * (kRun + 1);

// Where a row's tokens are. Beyond the last row it has none.
struct RowSpan {
  int64_t row, start, length;

  __device__ RowSpan(const TokenRows& rows, int64_t b)
      : row(b < rows.count ? b : 0),
        start(b < rows.count ? rows.start(b) : 0),
        length(b < rows.count ? rows.size(b) : 0) {}
  // Whether vectors of 4 floats may be used, given that they may at the start of the tensors and of padded rows.
  __device__ bool aligned(const TokenRows& rows, bool tensors) const {
    return tensors && (!rows.packed() || start % 4 == 0);
  }
};

// The row that a team of kLanes lanes walks.
template <int kLanes>
__device__ int64_t team_row() {
  return blockIdx.x * int64_t{kRowThreads / kLanes} + threadIdx.x / kLanes;
}

// A smaller team has one tile, even for no tokens at all: its warp's other teams wait for it.
template <int kLanes>
__device__ int64_t team_tiles(int64_t length) {
  return kLanes < kWarp ? 1 : (length + kTile - 1) / kTile;
}

// The segment that a block works on. Segments have numbers, `first` that of a row's first one; a packed row's is known
// from where the row starts, at the price of numbers that no segment has.
struct RowSegment {
  int64_t row = -1;  // none
  int64_t first = 0;
  unsigned count = 0;

  __device__ static int64_t first_of(const TokenRows& rows, int64_t b) {
    return rows.packed() ? rows.start(b) / kSegment + b : b * ((rows.length + kSegment - 1) / kSegment);
  }

  __device__ RowSegment(const TokenRows& rows, int64_t number) {
    if (!rows.packed()) {
      count = static_cast<unsigned>((rows.length + kSegment - 1) / kSegment);
      row = number / count;
      first = first_of(rows, row);
      return;
    }
    // The last row with first <= number, by 32 probes at a time.
    int64_t low = 0, high = rows.count;
    if (first_of(rows, 0) > number) return;
    while (high - low > 1) {
      const int64_t step = (high - low + kWarp - 1) / kWarp,
                    probe = low + static_cast<int64_t>(threadIdx.x % kWarp) * step;
      const unsigned votes = __ballot_sync(kAllLanes, probe < high && first_of(rows, probe) <= number);
      low += (__popc(votes) - 1) * step;
      high = low + step < high ? low + step : high;
    }
    const int64_t size = rows.size(low), segments = size > 0 ? (size + kSegment - 1) / kSegment : 1;
    if (number - first_of(rows, low) >= segments) return;
    row = low, first = first_of(rows, low), count = static_cast<unsigned>(segments);
  }
};

// Bit k: token at + k is in the row and valid.
__device__ inline unsigned valid_run(const uint8_t* mask, int64_t at, int64_t length) {
  if (at >= length) return 0;
  const int inside = length - at < kRun ? static_cast<int>(length - at) : kRun;
  if (mask == nullptr) return (1u << inside) - 1;
  struct alignas(kRun) Bytes {
    uint8_t at[kRun];
  };
  unsigned bits = 0;
  if (inside == kRun && reinterpret_cast<uintptr_t>(mask + at) % kRun == 0) {
    const Bytes bytes = *reinterpret_cast<const Bytes*>(mask + at);
#pragma unroll
    for (int k = 0; k < kRun; ++k) bits |= bytes.at[k] != 0 ? 1u << k : 0u;
  } else {
#pragma unroll
    for (int k = 0; k < kRun; ++k) bits |= k < inside && mask[at + k] != 0 ? 1u << k : 0u;
  }
  return bits;
}

// Whether the row has a valid token in [from, length); the whole block asks.
__device__ inline bool any_valid(const uint8_t* mask, int64_t from, int64_t length) {
  constexpr int kAhead = 2;
  for (int64_t at = from; at < length; at += kAhead * kSegment) {
    unsigned bits = 0;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) bits |= valid_run(mask, at + k * kSegment + threadIdx.x * kRun, length);
    if (block_any<kRowThreads>(bits != 0)) return true;
  }
  return false;
}

// A team's part of the block's scratch memory, in which rows that are not aligned change hands.
template <int kLanes>
__device__ float* team_stage(float (&stage)[kStage]) {
  return stage + threadIdx.x / kLanes * (kLanes * (kRun + 1));
}

// From token k kLanes + lane in x[k] to token 8 lane + k.
template <int kLanes>
__device__ void to_runs(float* stage, float (&x)[kRun]) {
  const int lane = threadIdx.x % kLanes;
  __syncwarp();
#pragma unroll
  for (int k = 0; k < kRun; ++k) {
    const int i = k * kLanes + lane;
    stage[i + i / kRun] = x[k];
  }
  __syncwarp();
#pragma unroll
  for (int k = 0; k < kRun; ++k) x[k] = stage[lane * (kRun + 1) + k];
}

template <int kLanes>
__device__ void from_runs(float* stage, float (&x)[kRun]) {
  const int lane = threadIdx.x % kLanes;
  __syncwarp();
#pragma unroll
  for (int k = 0; k < kRun; ++k) stage[lane * (kRun + 1) + k] = x[k];
  __syncwarp();
#pragma unroll
  for (int k = 0; k < kRun; ++k) {
    const int i = k * kLanes + lane;
    x[k] = stage[i + i / kRun];
  }
}

struct alignas(16) FourFloats {
  float at[4];
};

// The tile from token `begin` of a row on: as runs if it is aligned, else for to_runs(). 0 beyond the row.
template <int kLanes>
__device__ void load_tile(const float* row, int64_t begin, int64_t length, bool aligned, float (&x)[kRun]) {
  const int lane = threadIdx.x % kLanes;
  const int64_t at = begin + lane * kRun;
  if (aligned && at + kRun <= length) {
    const FourFloats low = *reinterpret_cast<const FourFloats*>(row + at);
    const FourFloats high = *reinterpret_cast<const FourFloats*>(row + at + 4);
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = low.at[k], x[k + 4] = high.at[k];
    return;
  }
#pragma unroll
  for (int k = 0; k < kRun; ++k) {
    const int64_t i = aligned ? at + k : begin + k * kLanes + lane;
    x[k] = i < length ? row[i] : 0.0f;
  }
}

// x as load_tile() gives it.
template <int kLanes>
__device__ void store_tile(float* row, int64_t begin, int64_t length, bool aligned, const float (&x)[kRun]) {
  const int lane = threadIdx.x % kLanes;
  const int64_t at = begin + lane * kRun;
  if (aligned && at + kRun <= length) {
    *reinterpret_cast<FourFloats*>(row + at) = {x[0], x[1], x[2], x[3]};
    *reinterpret_cast<FourFloats*>(row + at + 4) = {x[4], x[5], x[6], x[7]};
    return;
  }
#pragma unroll
  for (int k = 0; k < kRun; ++k) {
    const int64_t i = aligned ? at + k : begin + k * kLanes + lane;
    if (i < length) row[i] = x[k];
  }
}

// Before a thread reads where the rows of a packed batch are. A padded batch has nothing to wait for.
__device__ inline void wait_for_bounds(const TokenRows& rows) {
  if (rows.packed()) wait_for_primary();
}

struct PackedOutputs {
  int64_t* bounds;        // [B + 1]: cu_seqlens forced into order and into [0, N]
  float *first, *second;  // tensors whose tokens that no row claims become 0; null for none
};

// What the blocks of a packed launch take for granted: a launch before it. Every block finds the highest bound, the
// first one writes them.
static __global__ void __launch_bounds__(kRowThreads) prepare_packed_kernel(TokenRows raw, PackedOutputs out) {
  if (raw.count > 0) allow_dependent_launch();
  constexpr int kEach = 4;
  __shared__ int64_t warps[kTiles];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const auto larger = [](int64_t a, int64_t b) { return a > b ? a : b; };
  int64_t reached = 0;
  for (int64_t base = 0; base <= raw.count; base += kRowThreads * kEach) {
    const int64_t b = base + threadIdx.x * kEach;
    int64_t bound[kEach], highest = 0;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      bound[k] = highest = larger(highest, b + k <= raw.count ? raw.bound(b + k) : 0);
    }
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int64_t before = __shfl_up_sync(kAllLanes, highest, step);
      if (lane >= step) highest = larger(highest, before);
    }
    __syncthreads();
    if (lane == kWarp - 1) warps[warp] = highest;
    __syncthreads();
    int64_t before = __shfl_up_sync(kAllLanes, highest, 1);
    before = larger(reached, lane > 0 ? before : 0);
    for (int w = 0; w < warp; ++w) before = larger(before, warps[w]);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (blockIdx.x == 0 && b + k <= raw.count) out.bounds[b + k] = larger(before, bound[k]);
    }
    for (int w = 0; w < kTiles; ++w) reached = larger(reached, warps[w]);
  }
  const auto clear = [&](float* tokens, int64_t from, int64_t to) {
    if (tokens == nullptr) return;
    const int64_t all = int64_t{gridDim.x} * kRowThreads;
    for (int64_t i = from + blockIdx.x * int64_t{kRowThreads} + threadIdx.x; i < to; i += all) tokens[i] = 0.0f;
  };
  for (int i = 0; i < 2; ++i) {
    clear(i == 0 ? out.first : out.second, 0, raw.bound(0));
    clear(i == 0 ? out.first : out.second, reached, raw.total);
  }
}

}  // namespace ppo
