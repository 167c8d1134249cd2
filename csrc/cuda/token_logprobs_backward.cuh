// The gradient of token log-probabilities and entropy on the device: one read of the logits and one write.
#pragma once

#include "cuda/token_logprobs.cuh"

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
  const int64_t* labels;
  const double* temperature_rows;
  double temperature;
  const float *grad_logprobs, *grad_entropy;  // null: 0
  const float *logprobs, *entropy, *row_max, *log_sum;
  unsigned tiles_per_row;
};

struct GradientRow {
  float max, c, a, b, k, target;
  bool zero;
};

template <class T>
__device__ GradientRow gradient_row(const GradientInputs<T>& in, int64_t i) {
  const double g_logp = in.grad_logprobs != nullptr ? in.grad_logprobs[i] : 0.0;
  const double g_entropy = in.grad_entropy != nullptr ? in.grad_entropy[i] : 0.0;
  const double log_sum = in.log_sum[i];
  if (log_sum == kNotRead || (g_logp == 0.0 && g_entropy == 0.0)) return {0, 0, 0, 0, 0, 0, true};
  const double tau = in.temperature_rows != nullptr ? in.temperature_rows[i] : in.temperature;
  const double h = in.grad_entropy != nullptr ? in.entropy[i] : 0.0;
  const SoftmaxGradient row(g_logp, g_entropy, tau, in.logprobs[i], h, log_sum);
  const auto narrowed = [](double x) { return static_cast<float>(x); };
  return {
      in.row_max[i], narrowed(kLog2E / tau), narrowed(row.a), narrowed(row.b), narrowed(row.k), narrowed(row.target),
      false};
}

// One block is one tile of a row: the same vectors of 16-byte stores as the row has in memory, and its ends.
template <class T>
__global__ void __launch_bounds__(kGradientThreads) token_logprobs_backward_kernel(GradientInputs<T> in) {
  __shared__ GradientRow shared;
  const int64_t i = blockIdx.x / in.tiles_per_row, vocab = in.rows.vocab;
  if (threadIdx.x == 0) shared = gradient_row(in, i);
  const T* row = in.logits + in.rows.offset(i);
  T* out = in.gradient + in.gradient_rows.offset(i);
  const int64_t label = in.labels[i];
  const int head = elements_past_boundary(out);
  const bool together = elements_past_boundary(row) == head;  // aligned stores meet aligned loads
  const int64_t first = int64_t{blockIdx.x % in.tiles_per_row} * kGradientLogits<T> - head +
                        static_cast<int>(threadIdx.x) * kPerVector<T>;
  constexpr int kStep = kGradientThreads * kPerVector<T>;
  __syncthreads();
  const GradientRow g = shared;
  Vector v[kGradientVectors] = {};
  if (!g.zero) {
#pragma unroll
    for (int j = 0; j < kGradientVectors; ++j) {
      const int64_t column = first + j * kStep;
      v[j] = together && has_vector<T>(column, vocab) ? load_streaming(row + column)
                                                      : gather_vector(row, column, vocab, T{});
    }
#pragma unroll
    for (int j = 0; j < kGradientVectors; ++j) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        float z[kPerWord<T>];
        widen_word<T>(v[j].word[w], z);
#pragma unroll
        for (int k = 0; k < kPerWord<T>; ++k) z[k] = logit_gradient(z[k], g.max, g.c, g.a, g.b, g.k);
        v[j].word[w] = narrow_word<T>(z);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kGradientVectors; ++j) {
    const int64_t column = first + j * kStep;
    if (!g.zero && label >= column && label < column + kPerVector<T>) {
      T target;
      narrow(g.target, target);
      set_element(v[j], static_cast<int>(label - column), target);
    }
    if (has_vector<T>(column, vocab)) {
      store_streaming(out + column, v[j]);
    } else {
      scatter_vector(out, column, vocab, v[j]);
    }
  }
}

}  // namespace ppo
