// The schema of every op, once in this repository. Python reads the same text: csrc/ops.cpp in a checkout, the copy
// that setup.py puts beside the package's modules in a wheel. Kernels register themselves beside their code (cpu/,
// cuda/).
#include <torch/csrc/stable/library.h>

#include <sstream>
#include <string>

namespace {

// Blank lines and lines that begin with // are skipped anywhere, a line that begins with a space goes on with a schema,
// and any other line begins one. ppo_kernels/_schemas.py splits this text, the only raw string literal here, alike.
constexpr const char* kSchemas = R"(
// Every tensor is on the device of the first; what has another shape or dtype than is said here, or a code that stands
// for nothing, is refused. Values are not looked at: an offset beyond its tensor is taken for the nearest one inside.
// B sequences, T response tokens, N packed tokens, V vocabulary. A token tensor is padded [B, T] with any row stride,
// or packed [N] with cu_seqlens [B+1]. Masks are bytes. Clamps that are off are infinite.

// logits [..., V]; labels and logprobs [...] or, with several labels per row, [..., K]; mask, temperature_rows (float64)
// and grad_entropy [...]; softmax_stats [2, ...] are the maximum of a row, NaN without a distribution, and the logarithm
// of the sum of exponentials over it, -1 for a row that was not read; [3, ...] with the entropy. A temperature is taken
// for the nearest one at which the gradient's factors are numbers of the dtype that is computed in; what is not above 0
// makes NaN. Logits that are overwritten overlap neither themselves nor another argument.
token_logprobs(Tensor logits, Tensor labels, Tensor? mask, Tensor? temperature_rows, float temperature,
    int ignore_index, bool entropy) -> (Tensor logprobs, Tensor softmax_stats)
token_logprobs_backward(Tensor logits, Tensor labels, Tensor? temperature_rows, Tensor? grad_logprobs,
    Tensor? grad_entropy, Tensor logprobs, Tensor softmax_stats, float temperature, int ignore_index) -> Tensor
token_logprobs_backward_(Tensor(a!) logits, Tensor labels, Tensor? temperature_rows, Tensor? grad_logprobs,
    Tensor? grad_entropy, Tensor logprobs, Tensor softmax_stats, float temperature, int ignore_index) -> ()

// scores, score_index, kl [B]. kl_coef_tensor, float64 0-d, takes the place of kl_coef where it is given.
kl_rewards(Tensor logprobs, Tensor ref_logprobs, Tensor scores, Tensor? mask, Tensor? score_index,
    Tensor? cu_seqlens, Tensor? kl_coef_tensor, float kl_coef, int kl_estimator, float score_clip,
    float kl_log_clamp, float kl_clamp) -> (Tensor rewards, Tensor kl)

// lam_rows [B] float64, bootstrap_value [B].
gae(Tensor rewards, Tensor values, Tensor? mask, Tensor? lam_rows, Tensor? bootstrap_value,
    Tensor? cu_seqlens, float gamma, float lam, int masked_steps) -> (Tensor advantages, Tensor returns)

// x contiguous, any shape; count, mean and m2 float64 0-d. Without them whiten computes its own.
moments(Tensor x, Tensor? mask) -> (Tensor count, Tensor mean, Tensor m2)
whiten(Tensor x, Tensor? mask, Tensor? count, Tensor? mean, Tensor? m2, bool shift_mean, bool unbiased,
    float eps) -> Tensor

// advantages, weights: token-level, or [B, 1]. row_weight [B]; normalizer float64 0-d (None: the number of valid
// tokens). grad is d(loss * normalizer)/d(first argument), empty unless asked for; stats as in the Python tuples.
// surrogate: 0 clip, 1 cispo, 2 sapo, 3 dppo_tv, 4 dppo_kl. level: 0 token, 1 sequence, 2 sequence_token, 3 geometric,
// the last for clip only, the second and third for the first three; unbiased_kl is for tokens. tau_pos and tau_neg are
// sapo's temperatures.
policy_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor? mask, Tensor? weights,
    Tensor? ref_logprobs, Tensor? row_weight, Tensor? normalizer, Tensor? cu_seqlens, Tensor? kl_coef_tensor,
    float cliprange_low, float cliprange_high, float dual_clip, float log_ratio_clamp, float kl_coef,
    int kl_estimator, float kl_log_clamp, float kl_clamp, bool unbiased_kl, int surrogate, int level, float delta,
    float tau_pos, float tau_neg, bool grad)
    -> (Tensor loss, Tensor stats, Tensor grad, Tensor inv_normalizer)
value_loss(Tensor values, Tensor old_values, Tensor returns, Tensor? mask, Tensor? row_weight,
    Tensor? normalizer, Tensor? cu_seqlens, float cliprange_value, bool grad)
    -> (Tensor loss, Tensor stats, Tensor grad, Tensor inv_normalizer)
// grad and inv_normalizer as a loss returns them, grad_loss 0-d: their product.
loss_backward(Tensor grad, Tensor grad_loss, Tensor inv_normalizer) -> Tensor

// weights and keep like logprobs, keep bool; stats as in the Python tuple. level: 0 token, 1 sequence, 2 geometric; mode:
// 0 truncate, 1 mask, 2 icepop; reject: 0 by nothing, 1 k1, 2 k2, 3 k3; reject_level: 0 token, 1 sum, 2 mean, 3 max.
importance_weights(Tensor logprobs, Tensor rollout_logprobs, Tensor? mask, Tensor? cu_seqlens, int level, int mode,
    int reject, int reject_level, float low, float high, float reject_low, float reject_high, float log_ratio_clamp)
    -> (Tensor weights, Tensor keep, Tensor stats)

// Rows in groups of group_size; scores [B]. variant: 0 separate, 1 joint. The rest as in policy_loss, the
// normalizer's None being the number of pairs.
p3o_loss(Tensor logprobs, Tensor old_logprobs, Tensor ref_logprobs, Tensor scores, Tensor? mask,
    Tensor? normalizer, Tensor? cu_seqlens, Tensor? kl_coef_tensor, int variant, int group_size, float kl_coef,
    float cliprange, float weight_clip, float log_ratio_clamp, bool grad)
    -> (Tensor loss, Tensor stats, Tensor grad, Tensor inv_normalizer)

// scores [R, B], of R rewards. Groups are runs of equal numbers in sorted_ids [B], element i of which is
// scores[:, order[i]]; without them, every group_size neighbours. A score that no place of order names has the advantage
// 0, one that several name that of any of them. mode: 0 rloo, 1 grpo, 2 dr_grpo, 3 maxrl, 4 rloo over the deviation of
// the others. heads, uint8 [R, B] and empty unless asked for: 2 where a group begins whose scores differ, 1 where one
// begins whose do not, else 0.
group_advantages(Tensor scores, Tensor? sorted_ids, Tensor? order, int group_size, int mode, float eps, bool stats)
    -> (Tensor advantages, Tensor heads)
)";

}  // namespace

STABLE_TORCH_LIBRARY(ppo_kernels, m) {
  std::istringstream lines(kSchemas);
  std::string schema;
  const auto define = [&] {
    if (!schema.empty()) m.def(schema.c_str());
    schema.clear();
  };
  for (std::string line; std::getline(lines, line);) {
    if (line.empty() || line.starts_with("//")) continue;
    if (line.front() != ' ') define();
    schema += line;
  }
  define();
}
