#include "cuda/p3o_loss.cuh"
#include "cuda/rows_launch.cuh"

namespace ppo {
namespace {

LossResult p3o_loss(const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& ref_logprobs,
                    const Tensor& scores, const OptTensor& mask, const OptTensor& normalizer,
                    const OptTensor& cu_seqlens, const OptTensor& kl_coef_tensor, int64_t variant, int64_t group_size,
                    double kl_coef, double cliprange, double weight_clip, double log_ratio_clamp, bool grad) {
  PPO_COUNT("p3o_loss");
  check_dtype<float>("logprobs", logprobs);
  const Launcher launch(logprobs);
  const int64_t rows = token_rows(logprobs, cu_seqlens).count;
  check_code("variant", variant, P3OVariant::kCount);
  PPO_CHECK(group_size >= 1 && rows % group_size == 0, "group_size must divide the ", rows, " rows, got ", group_size);
  const int64_t blocks = std::max<int64_t>(1, rows / group_size);  // one even for no group: it writes the zeros
  const LossTensors out(logprobs, blocks, P3OLoss::Partials::kCount, P3OStat::kCount, normalizer, grad);
  const RowWork work =
      grad ? RowWork(launch, logprobs, cu_seqlens, {out.grad}) : RowWork(launch, logprobs, cu_seqlens, {});
  const Tensor responses = empty({rows * int64_t{sizeof(Response) / 8}}, ScalarType::Double, logprobs),
               slopes = empty({rows}, ScalarType::Float, logprobs);
  const auto input = [&](const char* name, const Tensor& x) {
    return token_input<float>(name, x, logprobs, work.rows);
  };
  const RowVector<float> score("scores", scores, {rows});
  const RowVector<double> coef("kl_coef_tensor", kl_coef_tensor, {});
  const P3OInputs in{work.rows,
                     input("logprobs", logprobs),
                     input("old_logprobs", old_logprobs),
                     input("ref_logprobs", ref_logprobs),
                     token_input<uint8_t>("mask", mask, logprobs, work.rows),
                     score.data(),
                     pair_options(variant, kl_coef, cliprange, weight_clip, log_ratio_clamp),
                     coef.data(),
                     group_size,
                     vector_aligned(logprobs) && vector_aligned(old_logprobs) && vector_aligned(ref_logprobs) &&
                         vector_aligned(out.grad),
                     data_of<Response>(responses),
                     data_of<float>(slopes)};
  work.launch(p3o_rows_kernel, rows, in);
  const LossResult result = out.run<P3OLoss>(launch, p3o_pairs_kernel, blocks, in);
  if (grad) launch(p3o_gradient_kernel, rows, kRowThreads, in, data_of<float>(out.grad));
  return result;
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CUDA, m) { PPO_IMPL(m, "p3o_loss", ppo::p3o_loss); }
