// Token log-probabilities and entropy on the device: one pass over the logits.
//
// A row is cut into chunks of 8 KB, whatever the batch and wherever the row lies in memory. One warp takes a chunk and
// leaves its softmax statistics; the block that is the last to work on a row merges those of its chunks, in order.
//
// Within a chunk, lane l adds up the columns that the 16-byte vectors l, l + 32, ... hold. An odd vocabulary moves the
// 16-byte boundaries from row to row, and with them the columns of a lane. The sums must not depend on that: there is
// one sum per column modulo 32 vectors, and only at the end of the chunk are those sums added, in the columns' order.
#pragma once

#include "cuda/labels.cuh"
#include "cuda/logits.cuh"
#include "cuda/reduce.cuh"
#include "math/token_logprobs.h"

namespace ppo {

constexpr int kLogitThreads = 128;
constexpr int kLogitWarps = kLogitThreads / kWarp;
constexpr int kLogitBlocks = 5;  // per multiprocessor: 80 KB in flight
constexpr int kTileVectors = 8;  // loads in flight per thread
constexpr int kChunkTiles = 2;   // few enough terms per float32 sum that their rounding cannot add up to a bias

template <class T>
constexpr int kTileLogits = kTileVectors * kWarp * kPerVector<T>;
template <class T>
constexpr int kChunkLogits = kChunkTiles * kTileLogits<T>;

struct alignas(16) ChunkPart {
  float max, sum, weighted, unused;  // a SoftmaxPart
};

// The float32 sums of one lane: of 2^x and 2^x x, one per element of its vectors.
template <class T, bool kEntropy>
class LaneSums {
 public:
  __device__ explicit LaneSums(float c) : c_(c), base_(-std::numeric_limits<float>::max(), c) {}

  __device__ void add(const Vector (&v)[kTileVectors]) {
    uint32_t top = v[0].word[0];
#pragma unroll
    for (int i = 0; i < kTileVectors * kWords; ++i) top = max_word<T>(top, v[i / kWords].word[i % kWords]);
    raise(warp_max(max_of_word<T>(top)));
#pragma unroll
    for (int i = 0; i < kTileVectors * kWords; ++i) {
      float z[kPerWord<T>];
      word_to_floats<T>(v[i / kWords].word[i % kWords], z);
#pragma unroll
      for (int k = 0; k < kPerWord<T>; ++k) add(z[k], i % kWords * kPerWord<T> + k);
    }
  }

  // The warp's sums, in every lane. `head` is how many elements before its first column the chunk's vectors begin.
  __device__ ChunkPart fold(int head) {
    __shared__ float ring[kLogitWarps][2][kWarp * (kPerVector<T> + 1)];
    float (&sums)[2][kWarp * (kPerVector<T> + 1)] = ring[threadIdx.x / kWarp];
    const int lane = threadIdx.x % kWarp;
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kPerVector<T>; ++k) {
      const int column = (lane * kPerVector<T> + k - head) & (kWarp * kPerVector<T> - 1);
      const int at = column + column / kPerVector<T>;  // no two lanes in one bank
      sums[0][at] = sum_[k];
      if (kEntropy) sums[1][at] = weighted_[k];
    }
    __syncwarp();
    const float sum = warp_sum(sums[0]), weighted = kEntropy ? warp_sum(sums[1]) : 0.0f;
    // The offset is a rounded product; what it lacks goes back into the sums.
    const float excess = fmaf(base_.max, base_.scale, -base_.offset), factor = exp2_fast(-excess);
    return {sum == 0.0f ? -std::numeric_limits<float>::infinity() : base_.max, sum * factor,
            fmaf(-excess, sum, weighted) * factor, 0.0f};
  }

 private:
  __device__ void add(float z, int k) {
    float x = fmaf(z, base_.scale, -base_.offset);
    if (kEntropy) x = bounded_exponent(x);
    const float e = exp2_fast(x);
    sum_[k] += e;
    if (kEntropy) weighted_[k] = fmaf(e, x, weighted_[k]);
  }

  // The maximum is that of the whole warp: what is added up depends on the columns alone.
  __device__ void raise(float max) {
    if (!(max > base_.max)) return;
    const SoftmaxBase next(max, c_);
    const float shift = next.scale == base_.scale ? bounded_exponent(base_.offset - next.offset) : -200.0f;
    const float factor = exp2_fast(shift);
#pragma unroll
    for (int k = 0; k < kPerVector<T>; ++k) {
      if (kEntropy) weighted_[k] = fmaf(shift, sum_[k], weighted_[k]) * factor;
      sum_[k] *= factor;
    }
    base_ = next;
  }

  __device__ static float warp_max(float x) {
    const auto ordered = [](int bits) { return bits ^ (bits >> 31 & 0x7fffffff); };  // as integers, floats in order
    return bits_as<float>(ordered(__reduce_max_sync(kAllLanes, ordered(bits_as<int>(x)))));
  }

  __device__ static float warp_sum(const float* ring) {
    const float* mine = ring + threadIdx.x % kWarp * (kPerVector<T> + 1);
    float x = 0.0f;
#pragma unroll
    for (int k = 0; k < kPerVector<T>; ++k) x += mine[k];
#pragma unroll
    for (int lanes = 1; lanes < kWarp; lanes *= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
    return x;
  }

  float c_;
  SoftmaxBase base_;
  float sum_[kPerVector<T>] = {}, weighted_[kPerVector<T>] = {};
};

// One chunk of a row, its columns counted from the chunk's first. The row has the columns [low, end), if not more.
template <class T>
struct Chunk {
  const T* data;
  int low, end;
  int target;  // the label's column, negative if another chunk has it
  int head;    // elements before column 0 at which its 16-byte vector begins

  __device__ Chunk(const T* row, int64_t begin, int64_t vocab, int64_t label)
      : data(row + begin),
        low(begin == 0 ? 0 : -kPerVector<T>),
        end(vocab - begin < 2 * kChunkLogits<T> ? static_cast<int>(vocab - begin) : 2 * kChunkLogits<T>),
        target(label >= begin && label - begin < kChunkLogits<T> ? static_cast<int>(label - begin) : -1),
        head(elements_past_boundary(row)) {}
};

// The lane's vectors of the tile at column `at`, and one more for lane 0 where there is a head.
template <class T>
__device__ void load_vectors(const Chunk<T>& chunk, int at, Vector (&v)[kTileVectors + 1]) {
  constexpr int kStep = kWarp * kPerVector<T>;
  const int lane = threadIdx.x % kWarp, first = at - chunk.head + lane * kPerVector<T>;
  const bool one_more = chunk.head != 0 && lane == 0;
  v[kTileVectors] = {};
  if (at - chunk.head >= chunk.low && at + kTileLogits<T> + kPerVector<T> <= chunk.end) {
#pragma unroll
    for (int i = 0; i < kTileVectors; ++i) v[i] = load_streaming(chunk.data + first + i * kStep);
    if (one_more) v[kTileVectors] = load_streaming(chunk.data + first + kTileLogits<T>);
    return;
  }
  // Two vectors of the row can lie across its ends. The warp puts them together, and one of -inf.
  __shared__ Vector ends[kLogitWarps][3];
  Vector* at_end = ends[threadIdx.x / kWarp];
  const int last = chunk.end - (chunk.end + chunk.head) % kPerVector<T>;
  __syncwarp();
  if (lane < 3 * kPerVector<T>) {
    const int end = lane / kPerVector<T>;
    const int column = (end == 0 ? -chunk.head : (end == 1 ? last : chunk.end)) + lane % kPerVector<T>;
    const bool there = column >= chunk.low && column < chunk.end;
    reinterpret_cast<T*>(at_end)[lane] = there ? chunk.data[column] : minus_infinity<T>();
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i <= kTileVectors; ++i) {
    const int column = first + i * kStep;
    const int end = column == -chunk.head ? 0 : (column == last ? 1 : 2);
    const bool whole = column >= chunk.low && column + kPerVector<T> <= chunk.end && (i < kTileVectors || one_more);
    v[i] = *(whole ? reinterpret_cast<const Vector*>(chunk.data + column) : at_end + end);
  }
}

// The lane's vectors of the columns from `at` on. Those that are the target, or beyond the row, come out as -inf.
template <class T>
__device__ void load_tile(const Chunk<T>& chunk, int at, Vector (&tile)[kTileVectors]) {
  const int lane = threadIdx.x % kWarp, head = chunk.head;
  Vector v[kTileVectors + 1];
  load_vectors(chunk, at, v);
  if (static_cast<unsigned>(chunk.target - at) < kTileLogits<T>) {
    const int element = chunk.target - at + head;
#pragma unroll
    for (int i = 0; i <= kTileVectors; ++i) {
      if (element / kPerVector<T> == i * kWarp + lane) {
        set_element(v[i], element % kPerVector<T>, minus_infinity<T>());
      }
    }
  }
  // The first `head` elements of lane 0's vectors belong to the columns one step before.
  const int moved = lane == 0 ? head : 0;
  if (head == 0) {
#pragma unroll
    for (int i = 0; i < kTileVectors; ++i) tile[i] = v[i];
    return;
  }
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const uint32_t early = low_elements<T>(moved - w * kPerWord<T>);
#pragma unroll
    for (int i = 0; i < kTileVectors; ++i) {
      tile[i].word[w] = (v[i].word[w] & ~early) | (v[i + 1].word[w] & early);
    }
  }
}

template <class T, bool kEntropy>
__device__ ChunkPart scan_chunk(const Chunk<T>& chunk, float c) {
  LaneSums<T, kEntropy> sums(c);
  const int end = chunk.end < kChunkLogits<T> ? chunk.end : kChunkLogits<T>;
#pragma unroll 1
  for (int at = 0; at < end; at += kTileLogits<T>) {
    Vector tile[kTileVectors];
    load_tile(chunk, at, tile);
    sums.add(tile);
  }
  return sums.fold(chunk.head);
}

// The statistics of a row from those of its chunks, by one warp.
__device__ inline SoftmaxPart merge_chunks(const ChunkPart* parts, int64_t chunks, double c) {
  const int lane = threadIdx.x % kWarp;
  double max = -std::numeric_limits<double>::infinity();
  for (int64_t i = lane; i < chunks; i += kWarp) max = fmax(max, static_cast<double>(parts[i].max));
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) max = fmax(max, __shfl_xor_sync(kAllLanes, max, lanes));
  SoftmaxPart all{max, 0.0, 0.0};
  for (int64_t i = lane; i < chunks; i += kWarp) {
    const SoftmaxPart part = with_max({parts[i].max, parts[i].sum, parts[i].weighted}, max, c);
    all.sum += part.sum;
    all.weighted += part.weighted;
  }
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    all.sum += __shfl_xor_sync(kAllLanes, all.sum, lanes);
    all.weighted += __shfl_xor_sync(kAllLanes, all.weighted, lanes);
  }
  return all;
}

template <class T>
struct LogprobInputs {
  const T* logits;
  LogitRows rows;
  const int64_t* labels;  // [rows][many]
  int64_t many;
  const uint8_t* mask;             // null: all valid
  const double* temperature_rows;  // null: `temperature` for all
  double temperature;
  int64_t ignore_index;

  __device__ RowLabels row_labels(int64_t i) const { return {labels + i * many, many, rows.vocab, ignore_index}; }
};

struct LogprobOutputs {
  float *logprobs, *entropy, *row_max, *log_sum;
  ChunkPart* parts;         // [rows][chunks]
  unsigned blocks_per_row;  // several leave it to another launch to merge the row's chunks
};

// What a warp knows of the row that it ends.
template <class T>
struct LogprobRow {
  const LogprobInputs<T>& in;
  int64_t i, chunks;
  const T* row;
  RowLabels labels;
  Anchor anchor;
  double c;

  __device__ LogprobRow(const LogprobInputs<T>& inputs, int64_t number)
      : in(inputs),
        i(number),
        chunks((in.rows.vocab + kChunkLogits<T> - 1) / kChunkLogits<T>),
        row(in.logits + in.rows.offset(i)),
        labels(in.row_labels(i)) {
    if (in.mask == nullptr || in.mask[i] != 0) anchor = anchor_of(labels, row);
    c = kLog2E / usable_temperature<float>(in.temperature_rows != nullptr ? in.temperature_rows[i] : in.temperature);
  }
  __device__ bool is_read() const { return anchor.label >= 0; }

  // Merges the chunks of a row that is read and writes its results; by one warp.
  __device__ void finish(const LogprobOutputs& out) const {
    SoftmaxRow result = anchor.counts ? row_of(std::numeric_limits<double>::quiet_NaN()) : row_not_read();
    if (is_read()) {
      const SoftmaxPart others = merge_chunks(out.parts + i * chunks, chunks, c);
      if (threadIdx.x % kWarp == 0) {
        result = finish_row(others, static_cast<double>(to_compute(row[anchor.label])), c);
        if (anchor.outside) result.entropy = std::numeric_limits<double>::quiet_NaN();
      }
      if (in.many > 1) {
        result.max = __shfl_sync(kAllLanes, result.max, 0);
        result.log_sum = __shfl_sync(kAllLanes, result.log_sum, 0);
      }
    }
    const int lane = threadIdx.x % kWarp;
    if (lane == 0) {
      out.row_max[i] = static_cast<float>(result.max);
      out.log_sum[i] = static_cast<float>(result.log_sum);
      if (out.entropy != nullptr) out.entropy[i] = static_cast<float>(result.entropy);
    }
    for (int64_t k = lane; k < labels.count; k += kWarp) {
      double logp = 0.0;
      if (labels.counts(k) && result.log_sum != kNotRead) {
        logp = labels.inside(k) ? result.logp(to_compute(row[labels.data[k]]), c)
                                : std::numeric_limits<double>::quiet_NaN();
      }
      out.logprobs[i * labels.count + k] = static_cast<float>(logp);
    }
  }
};

template <class T, bool kEntropy>
__global__ void __launch_bounds__(kLogitThreads, kLogitBlocks)
    token_logprobs_kernel(LogprobInputs<T> in, LogprobOutputs out) {
  if (out.blocks_per_row > 1) allow_dependent_launch();
  const unsigned part = blockIdx.x % out.blocks_per_row;
  const LogprobRow<T> row(in, blockIdx.x / out.blocks_per_row);
  if (row.is_read()) {
    const int64_t step = int64_t{out.blocks_per_row} * kLogitWarps;
#pragma unroll 1
    for (int64_t j = int64_t{part} * kLogitWarps + threadIdx.x / kWarp; j < row.chunks; j += step) {
      const Chunk<T> chunk(row.row, j * kChunkLogits<T>, in.rows.vocab, row.anchor.label);
      const ChunkPart of_chunk = scan_chunk<T, kEntropy>(chunk, static_cast<float>(row.c));
      if (threadIdx.x % kWarp == 0) out.parts[row.i * row.chunks + j] = of_chunk;
    }
    __syncthreads();
  }
  if (out.blocks_per_row == 1 && threadIdx.x < kWarp) row.finish(out);
}

// Ends rows that several blocks have read: a block of one warp for each.
template <class T>
__global__ void __launch_bounds__(kWarp) merge_logprobs_kernel(LogprobInputs<T> in, LogprobOutputs out) {
  wait_for_primary();
  LogprobRow<T>(in, blockIdx.x).finish(out);
}

}  // namespace ppo
