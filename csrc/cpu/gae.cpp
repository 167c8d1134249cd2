// Generalised advantage estimation on CPU tensors: a backward walk over a few rows at a time, in float64. One row's
// recurrence is bound by the latency of its multiply-add, so that the rows of a team run side by side, each by itself.
#include "math/gae.h"

#include <array>

#include "cpu/block.h"
#include "cpu/pages.h"

namespace ppo {
namespace {

constexpr int64_t kTeam = 4;      // rows
constexpr int64_t kSteps = 1024;  // tokens of each row at a time; shorter runs through memory are slower

template <class T>
struct GaeRow {
  const T* rewards;
  const T* values;
  const uint8_t* mask;  // nullptr: all valid
  int64_t end;          // tokens not walked yet
  GaeStep<double> step;
  double ahead;  // S+ of token end - 1
  T *advantages, *returns;
};

// The tokens of a row as maps S = shift + scale S+. Those that are not read have shift 0.
template <class T>
PPO_CLONES void token_maps(const T* rewards, const T* values, const T* read, int64_t n, GaeStep<double> step,
                           double unread_scale, double* scale, double* shift) {
  const double gamma_lam = step.gamma * step.lam;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const double reward = rewards[i], value = values[i], one = read[i];
    shift[i] = step.next(one != 0.0 ? reward : 0.0, one != 0.0 ? value : 0.0, 0.0);
    scale[i] = one != 0.0 ? gamma_lam : unread_scale;
  }
}

// Replaces every shift by the S+ of its token.
template <int64_t kRows>
PPO_CLONES void walk(const double (*scale)[kSteps], double (*shift)[kSteps], int64_t first, double* ahead) {
  double s[kRows];
  for (int64_t k = 0; k < kRows; ++k) s[k] = ahead[k];
  for (int64_t i = kSteps - 1; i >= first; --i) {
    for (int64_t k = 0; k < kRows; ++k) {
      const double here = shift[k][i] + scale[k][i] * s[k];
      shift[k][i] = s[k];
      s[k] = here;
    }
  }
  for (int64_t k = 0; k < kRows; ++k) ahead[k] = s[k];
}

template <class T>
PPO_CLONES void gae_block(const T* rewards, const T* values, const T* valid, int64_t n, GaeStep<double> step,
                          const double* ahead, T* advantages, T* returns) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const double r = rewards[i], v = values[i], one = valid[i];
    const double advantage = step.advantage(r, v, ahead[i]);
    advantages[i] = one != 0.0 ? static_cast<T>(advantage) : T(0);
    returns[i] = one != 0.0 ? static_cast<T>(advantage + v) : T(0);
  }
}

// What follows the last valid token is zero and takes no part.
template <class T>
void skip_tail(GaeRow<T>& row) {
  for (; row.end > 0 && row.mask != nullptr && row.mask[row.end - 1] == 0; --row.end) {
    row.advantages[row.end - 1] = row.returns[row.end - 1] = T(0);
  }
}

template <int64_t kRows, class T>
void gae_team(std::array<GaeRow<T>, kTeam>& team, int64_t masked_steps) {
  double scale[kRows][kSteps], shift[kRows][kSteps], ahead[kRows];
  T valid[kRows][kSteps], ones[kSteps];
  std::fill(ones, ones + kSteps, T(1));
  const TokenRule masked = token_rule(false, masked_steps);
  for (;;) {
    int64_t first = kSteps, counts[kRows];
    for (int64_t k = 0; k < kRows; ++k) {
      GaeRow<T>& row = team[k];
      const int64_t n = counts[k] = std::min(kSteps, row.end), begin = row.end - n, at = kSteps - n;
      first = std::min(first, at);
      ahead[k] = row.ahead;
      if (row.mask != nullptr) {
        convert_mask(row.mask + begin, n, valid[k]);
      } else {
        std::fill(valid[k], valid[k] + n, T(1));
      }
      token_maps(row.rewards + begin, row.values + begin, masked.read ? ones : valid[k], n, row.step,
                 masked.transition ? row.step.gamma * row.step.lam : 1.0, scale[k] + at, shift[k] + at);
    }
    if (first == kSteps) return;
    for (int64_t k = 0; k < kRows; ++k) {  // past its own start a shorter row stands still
      std::fill(scale[k] + first, scale[k] + kSteps - counts[k], 1.0);
      std::fill(shift[k] + first, shift[k] + kSteps - counts[k], 0.0);
    }
    walk<kRows>(scale, shift, first, ahead);
    for (int64_t k = 0; k < kRows; ++k) {
      GaeRow<T>& row = team[k];
      const int64_t n = counts[k], begin = row.end - n;
      gae_block(row.rewards + begin, row.values + begin, valid[k], n, row.step, shift[k] + kSteps - n,
                row.advantages + begin, row.returns + begin);
      row.ahead = ahead[k];
      row.end = begin;
    }
  }
}

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const OptTensor& mask,
                               const OptTensor& lam_rows, const OptTensor& bootstrap_value, const OptTensor& cu_seqlens,
                               double gamma, double lam, int64_t masked_steps) {
  PPO_COUNT("gae");
  check_code("masked_steps", masked_steps, MaskedSteps::kCount);
  const Rows rows(rewards, cu_seqlens);
  return dispatch_compute(rewards, [&](auto zero) {
    using T = decltype(zero);
    const auto r = token_input<T>("rewards", rewards, rewards, rows),
               v = token_input<T>("values", values, rewards, rows);
    const auto m = token_input<uint8_t>("mask", mask, rewards, rows);
    const RowVector<double> lams("lam_rows", lam_rows, {rows.count});
    const RowVector<T> bootstraps("bootstrap_value", bootstrap_value, {rows.count});
    Tensor advantages = on_huge_pages(new_tokens(rewards, rows));
    Tensor returns = on_huge_pages(new_tokens(rewards, rows));
    T* adv = data_of<T>(advantages);
    T* ret = data_of<T>(returns);
    const auto row_of = [&](int64_t b) {
      const double lam_b = lams ? lams[b] : lam;
      const GaeStep<double> step{gamma, lam_b};
      const int64_t length = rows.size(b);
      const double bootstrap = bootstraps ? static_cast<double>(bootstraps[b]) : 0.0;
      GaeRow<T> row{r.row(rows, b), v.row(rows, b), m.row(rows, b),      length,
                    step,           bootstrap,      adv + rows.start(b), ret + rows.start(b)};
      skip_tail(row);
      return row;
    };
    // Few rows are shared out singly. A row's bits do not depend on its team.
    const int64_t threads = torch::stable::get_num_threads(), each = rows.count < kTeam * threads ? 1 : kTeam;
    const int64_t team_tokens = each * rewards.numel() / std::max<int64_t>(rows.count, 1);
    for_each((rows.count + each - 1) / each, 4096 / std::max<int64_t>(team_tokens, 1), [&](int64_t i) {
      std::array<GaeRow<T>, kTeam> team{};
      for (int64_t k = 0; k < each && i * each + k < rows.count; ++k) team[k] = row_of(i * each + k);
      each == 1 ? gae_team<1>(team, masked_steps) : gae_team<kTeam>(team, masked_steps);
    });
    return std::make_tuple(advantages, returns);
  });
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_kernels, CPU, m) { PPO_IMPL(m, "gae", ppo::gae); }
