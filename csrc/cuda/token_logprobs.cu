#include "cuda/launch.cuh"
#include "cuda/token_logprobs.cuh"
#include "cuda/token_logprobs_backward.cuh"
#include "token_logprobs.h"

namespace ppo {
namespace {

constexpr int64_t kFillingBlocks = 8192;  // several waves of blocks on the largest GPU; it decides no bit

template <class F>
void dispatch_logits(const Tensor& logits, F&& f) {
  switch (logits.scalar_type()) {
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Float16{});
    default:
      PPO_CHECK(logits.scalar_type() == ScalarType::Float, "logits must be bfloat16, float16 or float32, got ",
                dtype_name(logits.scalar_type()));
  }
  return f(float{});
}

LogitRows logit_rows(const Tensor& logits) {
  LogitRows rows;
  rows.vocab = logits.size(logits.dim() - 1);
  rows.dims = 0;
  for (int64_t d = 0; d < logits.dim() - 1; ++d) {
    const int64_t size = logits.size(d), stride = logits.stride(d);
    if (size == 1) continue;
    if (rows.dims > 0 && rows.stride[rows.dims - 1] == size * stride) {
      rows.size[rows.dims - 1] *= size;
      rows.stride[rows.dims - 1] = stride;
      continue;
    }
    PPO_CHECK(rows.dims < kLeadingDims, "logits with more than ", kLeadingDims,
              " leading dimensions that do not merge; pass logits.contiguous()");
    rows.size[rows.dims] = size;
    rows.stride[rows.dims++] = stride;
  }
  rows.dims = std::max(rows.dims, 1);
  return rows;
}

std::tuple<Tensor, Tensor> token_logprobs(const Tensor& logits, const Tensor& labels, const OptTensor& mask,
                                          const OptTensor& temperature_rows, double temperature, int64_t ignore_index,
                                          bool entropy) {
  PPO_COUNT("token_logprobs");
  check_logits(logits);
  const Launcher launch(logits);
  const int64_t vocab = logits.size(logits.dim() - 1), rows = logits.numel() / vocab;
  const int64_t many = labels_per_row(labels, logits);
  const Sizes shape = leading_sizes(logits);
  const RowVector<int64_t> label("labels", labels, labels.sizes());
  const RowVector<uint8_t> valid("mask", mask, shape);
  const RowVector<double> tau("temperature_rows", temperature_rows, shape);
  const Tensor logp = empty(labels.sizes(), ScalarType::Float, logits);
  const Tensor stats = empty(stats_shape(shape, entropy), ScalarType::Float, logits);
  dispatch_logits(logits, [&](auto zero) {
    using T = decltype(zero);
    const int64_t chunks = (vocab + kChunkLogits<T> - 1) / kChunkLogits<T>;
    const int64_t wanted = (kFillingBlocks + rows - 1) / std::max<int64_t>(rows, 1);
    const int64_t blocks = std::clamp<int64_t>(wanted, 1, (chunks + kLogitWarps - 1) / kLogitWarps);
    const Tensor parts = empty({rows * chunks * 4}, ScalarType::Float, logits);
    const LogprobInputs<T> in{data_of<const T>(logits),
                              logit_rows(logits),
                              label.data(),
                              many,
                              valid.data(),
                              tau.data(),
                              temperature,
                              ignore_index};
    const LogprobOutputs out{data_of<float>(logp),      entropy ? data_of<float>(stats) + 2 * rows : nullptr,
                             data_of<float>(stats),     data_of<float>(stats) + rows,
                             data_of<ChunkPart>(parts), static_cast<unsigned>(blocks)};
    launch(entropy ? token_logprobs_kernel<T, true> : token_logprobs_kernel<T, false>, rows * blocks, kLogitThreads, in,
           out);
    if (blocks > 1) launch.dependent(merge_logprobs_kernel<T>, rows, kWarp, in, out);
  });
  return std::make_tuple(logp, stats);
}

void backward_into(const Tensor& out, const Tensor& logits, const Tensor& labels, const OptTensor& temperature_rows,
                   const OptTensor& grad_logprobs, const OptTensor& grad_entropy, const Tensor& logprobs,
                   const Tensor& softmax_stats, double temperature, int64_t ignore_index) {
  check_logits(logits);
  const Launcher launch(logits);
  const int64_t vocab = logits.size(logits.dim() - 1), rows = logits.numel() / vocab;
  const int64_t many = labels_per_row(labels, logits);
  const Sizes shape = leading_sizes(logits), of_labels = labels.sizes();
  const RowVector<int64_t> label("labels", labels, of_labels);
  const RowVector<double> tau("temperature_rows", temperature_rows, shape);
  const RowVector<float> g_logp("grad_logprobs", grad_logprobs, of_labels), logp("logprobs", logprobs, of_labels),
      g_h("grad_entropy", grad_entropy, shape),
      stats("softmax_stats", softmax_stats, stats_shape(softmax_stats, shape, grad_entropy.has_value()));
  dispatch_logits(logits, [&](auto zero) {
    using T = decltype(zero);
    // One tile more than the vocabulary fills may be needed, since a row's first vector can begin before it.
    const int64_t tiles = (vocab + kPerVector<T> - 1 + kGradientLogits<T> - 1) / kGradientLogits<T>;
    const GradientInputs<T> in{data_of<const T>(logits),
                               data_of<T>(out),
                               logit_rows(logits),
                               logit_rows(out),
                               label.data(),
                               many,
                               tau.data(),
                               temperature,
                               ignore_index,
                               g_logp.data(),
                               g_h.data(),
                               logp.data(),
                               g_h ? stats.data() + 2 * rows : nullptr,
                               stats.data(),
                               stats.data() + rows,
                               static_cast<unsigned>(tiles)};
    launch(token_logprobs_backward_kernel<T>, rows * tiles, kGradientThreads, in);
    if (many == 1 || !grad_logprobs.has_value()) return;
    const int64_t parts = (many + kGradientThreads - 1) / kGradientThreads;
    launch(label_gradients_kernel<T>, rows * parts, kGradientThreads, in, static_cast<unsigned>(parts));
  });
}

using Backward = TokenLogprobsBackward<decltype(backward_into), &backward_into, &new_like>;

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CUDA, m) {
  PPO_IMPL(m, "token_logprobs", ppo::token_logprobs);
  PPO_IMPL(m, "token_logprobs_backward", ppo::Backward::returned);
  PPO_IMPL(m, "token_logprobs_backward_", ppo::Backward::in_place);
}
