// The gradient of token_logprobs on the device: one read of the logits and one write of the gradient.
#pragma once

#include "cuda/labels.cuh"
#include "cuda/logits.cuh"
#include "math/token_logprobs.h"

namespace ppo {

constexpr int kGradientThreads = 256;
constexpr int kGradientVectors = 4;  // per thread

template <class T>
constexpr int kGradientLogits = kGradientThreads * kGradientVectors * kPerVector<T>;

template <class T>
struct GradientInputs {
  const T* logits;
  T* gradient;
  LogitRows rows, gradient_rows;
  const int64_t* labels;  // [rows][many], as grad_logprobs and logprobs are
  int64_t many;
  const double* temperature_rows;
  double temperature;
  int64_t ignore_index;
  const float *grad_logprobs, *grad_entropy;  // null: 0
  const float *logprobs, *entropy, *row_max, *log_sum;
  unsigned tiles_per_row;

  __device__ RowLabels row_labels(int64_t i) const { return {labels + i * many, many, rows.vocab, ignore_index}; }
  __device__ const float* row_gradients(int64_t i) const {
    return grad_logprobs != nullptr ? grad_logprobs + i * many : nullptr;
  }
};

struct GradientRow {
  float max, c, a, b, k, target;
  bool zero;
};

template <class T>
__device__ SoftmaxGradient softmax_gradient(const GradientInputs<T>& in, int64_t i, double sum) {
  const double g_entropy = in.grad_entropy != nullptr ? in.grad_entropy[i] : 0.0;
  const double tau =
      usable_temperature<float>(in.temperature_rows != nullptr ? in.temperature_rows[i] : in.temperature);
  const double h = in.grad_entropy != nullptr ? in.entropy[i] : 0.0;
  return {sum, g_entropy, tau, h, in.log_sum[i]};
}

template <class T>
__device__ GradientRow gradient_row(const GradientInputs<T>& in, int64_t i, const LabelGradients& g) {
  const bool of_entropy = in.grad_entropy != nullptr && in.grad_entropy[i] != 0.0f;
  if (in.log_sum[i] == kNotRead || (!g.any && !of_entropy)) return {0, 0, 0, 0, 0, 0, true};
  const SoftmaxGradient row = softmax_gradient(in, i, g.sum);
  const auto to_single = [](double x) { return static_cast<float>(x); };
  return {in.row_max[i],
          to_single(kLog2E / row.tau),
          to_single(row.a),
          to_single(row.b),
          to_single(row.k),
          in.many > 1 ? 0.0f : to_single(row.label(in.logprobs[i], g.sum, 0.0)),
          false};
}

// Whether the row may have a gradient, for what a thread can read at once; a row without is not worth its traffic.
template <class T>
__device__ bool may_have_gradient(const GradientInputs<T>& in, int64_t i) {
  const bool of_labels = in.grad_logprobs != nullptr && (in.many > 1 || in.grad_logprobs[i] != 0.0f);
  return in.log_sum[i] != kNotRead && (of_labels || (in.grad_entropy != nullptr && in.grad_entropy[i] != 0.0f));
}

// One block is one tile of a row: the same vectors of 16-byte stores as the row has in memory, and its ends.
template <class T>
__global__ void __launch_bounds__(kGradientThreads, 4 - kFewerBlocks)
    token_logprobs_backward_kernel(GradientInputs<T> in) {
  __shared__ GradientRow shared;
  const int64_t i = blockIdx.x / in.tiles_per_row, vocab = in.rows.vocab;
  const RowLabels labels = in.row_labels(i);
  const T* row = in.logits + in.rows.offset(i);
  T* out = in.gradient + in.gradient_rows.offset(i);
  const int64_t label = in.many == 1 ? in.labels[i] : -1;
  const int head = elements_past_boundary(out);
  const bool together = elements_past_boundary(row) == head;  // aligned stores meet aligned loads
  const int64_t begin = int64_t{blockIdx.x % in.tiles_per_row} * kGradientLogits<T> - head;
  const int64_t first = begin + static_cast<int>(threadIdx.x) * kPerVector<T>;
  constexpr int kStep = kGradientThreads * kPerVector<T>;
  Vector v[kGradientVectors] = {};
  if (may_have_gradient(in, i)) {  // asked for before the row's factors are known
#pragma unroll
    for (int j = 0; j < kGradientVectors; ++j) {
      const int64_t column = first + j * kStep;
      v[j] = together && has_vector<T>(column, vocab) ? load_streaming(row + column)
                                                      : gather_vector(row, column, vocab, T{});
    }
  }
  if (threadIdx.x < kWarp) {
    const LabelGradients all = gradients_of(labels, in.row_gradients(i));
    if (threadIdx.x == 0) shared = gradient_row(in, i, all);
  }
  __syncthreads();
  const GradientRow g = shared;
#pragma unroll
  for (int j = 0; j < kGradientVectors; ++j) {
    if (g.zero) {
      v[j] = {};
      continue;
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      float z[kPerWord<T>];
      word_to_floats<T>(v[j].word[w], z);
#pragma unroll
      for (int k = 0; k < kPerWord<T>; ++k) z[k] = logit_gradient(z[k], g.max, g.c, g.a, g.b, g.k);
      v[j].word[w] = floats_to_word<T>(z);
    }
  }
#pragma unroll
  for (int j = 0; j < kGradientVectors; ++j) {
    const int64_t column = first + j * kStep;
    if (!g.zero && label >= column && label < column + kPerVector<T>) {
      T target;
      from_compute(g.target, target);
      set_element(v[j], static_cast<int>(label - column), target);
    }
    if (has_vector<T>(column, vocab)) {
      store_streaming(out + column, v[j]);
    } else {
      scatter_vector(out, column, vocab, v[j]);
    }
  }
}

// The gradients of a row's labels where it has several, over what the kernel above left there. The first of equal
// labels is written, for all of them.
template <class T>
__global__ void __launch_bounds__(kGradientThreads) label_gradients_kernel(GradientInputs<T> in, unsigned parts) {
  const int64_t i = blockIdx.x / parts;
  const int64_t k = int64_t{blockIdx.x % parts} * kGradientThreads + threadIdx.x;
  const RowLabels labels = in.row_labels(i);
  const bool of_entropy = in.grad_entropy != nullptr && in.grad_entropy[i] != 0.0f;
  if (in.log_sum[i] == kNotRead || k >= labels.count || !labels.counts(k) || !labels.inside(k)) return;
  const float* g = in.row_gradients(i);
  double own = 0.0;
  LabelGradients others;
  for (int64_t j = 0; j < labels.count; ++j) {
    if (labels.data[j] != labels.data[k]) {
      others.add(labels, j, g[j]);
    } else if (j < k) {
      return;
    } else {
      own += g[j];
    }
  }
  if (own == 0.0 && !others.any && !of_entropy) return;
  const SoftmaxGradient row = softmax_gradient(in, i, 0.0);
  T* out = in.gradient + in.gradient_rows.offset(i);
  from_compute(static_cast<float>(row.label(in.logprobs[i * in.many + k], own, others.sum)), out[labels.data[k]]);
}

}  // namespace ppo
