"""The loss of pairwise proximal policy optimization, eager."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kernels._rows import (
    find_rows,
    how_many,
    masked_mean,
    reduce_loss,
    row_sum,
    scalar,
    scaled_or_off,
    select,
    valid_tokens,
)
from ppo_kernels._types import P3OStats, compute_dtype, wide_dtype
from ppo_kernels.reference.kl_rewards import clamp


def p3o_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    variant: str = "joint",
    group_size: int = 2,
    kl_coef: float | Tensor = 0.05,
    cliprange: float = 0.2,
    weight_clip: float = 10.0,
    log_ratio_clamp: float | None = 20.0,
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, P3OStats]:
    dtype = compute_dtype(logprobs, old_logprobs, ref_logprobs, scores)
    rows = find_rows(logprobs, cu_seqlens)
    valid = valid_tokens(logprobs, mask, rows)
    # An error of a sum over a whole sequence is an error of its ratio's exponent.
    wide = wide_dtype(valid.device)
    logp, old, ref = (select(x, valid, wide) for x in (logprobs, old_logprobs.detach(), ref_logprobs.detach()))
    shift = row_sum(logp - old, rows)  # D = S - S_old
    margin = row_sum(logp.detach() - ref, rows)  # S
    alive = row_sum(valid.to(wide), rows) > 0
    reward = torch.where(alive, scores.detach().to(wide), 0.0)

    first, second = torch.triu_indices(group_size, group_size, 1, device=logprobs.device)
    both = alive.reshape(-1, group_size)[:, first] & alive.reshape(-1, group_size)[:, second]

    def of_pairs(x: Tensor) -> tuple[Tensor, Tensor]:
        """[B] as the two sides of every pair, [groups, pairs]; 0 in a pair that does not count."""
        x = x.reshape(-1, group_size)
        return torch.where(both, x[:, first], 0.0), torch.where(both, x[:, second], 0.0)

    shift_i, shift_j = of_pairs(shift)
    margin_i, margin_j = of_pairs(margin)
    reward_i, reward_j = of_pairs(reward)
    s_gap = margin_i - margin_j
    coef = scalar(kl_coef, s_gap)
    q = reward_i - reward_j - scaled_or_off(coef, s_gap)
    bound = scalar(weight_clip, s_gap).log()
    if variant == "separate":
        log_weights = torch.stack([shift_i, shift_j]).detach()
        w_i, w_j = log_weights.clamp(-bound, bound).exp()
        rho_i, rho_j = clamp(shift_i, log_ratio_clamp).exp(), clamp(shift_j, log_ratio_clamp).exp()
        loss_i, clipped_i = _clipped(-q * w_j, rho_i, 1.0 - cliprange, 1.0 + cliprange)
        loss_j, clipped_j = _clipped(q * w_i, rho_j, 1.0 - cliprange, 1.0 + cliprange)
        loss, clipped = 0.5 * (loss_i + loss_j), torch.stack([clipped_i, clipped_j])
    else:
        log_weights = (shift_i + shift_j).detach()[None]
        k = q * log_weights[0].clamp(-bound, bound).exp()
        # d = S_i - S_j is d_old plus this step, and clip(d, d_old - e, d_old + e) is d_old plus its clip: so no d_old,
        # however large, can round away what decides.
        step = shift_i - shift_j
        surrogate, clipped_ij = _clipped(-k, step, -cliprange, cliprange)
        # This has no gradient: with the reference off, one that is not finite drops out.
        constant = torch.where(s_gap.isfinite() | (coef != 0), s_gap - step.detach(), 0.0)
        loss, clipped = 0.5 * (surrogate - k * constant), clipped_ij[None]
    total, count = reduce_loss(loss.reshape(-1), both.reshape(-1), rows, None, normalizer)
    total = total.to(dtype)

    with torch.no_grad():
        d = clamp(shift, log_ratio_clamp)
        beyond = torch.zeros_like(alive) if log_ratio_clamp is None else shift.abs() > log_ratio_clamp
        each = both.expand(log_weights.shape)
        rows_alive, pairs, weights = how_many(alive), how_many(both), how_many(each)
        better = reward_i - reward_j
        preferred = torch.where(better > 0, s_gap, torch.where(better < 0, -s_gap, better * s_gap))  # else 0 or NaN
        stats = P3OStats(
            approx_kl_k1=masked_mean(-d, alive, rows_alive),
            approx_kl_k3=masked_mean(torch.expm1(d) - d, alive, rows_alive),
            ref_kl=masked_mean(margin, alive, rows_alive),
            ratio_mean=masked_mean(d.exp(), alive, rows_alive),
            ratio_max=torch.cat([torch.where(alive, d.exp(), 0.0), d.new_zeros(1)]).max(),
            clamp_frac=masked_mean(beyond, alive, rows_alive),
            weight_mean=masked_mean(log_weights.clamp(-bound, bound).exp(), each, weights),
            weight_clipfrac=masked_mean(log_weights.abs() > bound, each, weights),
            clipfrac=masked_mean(clipped, each, weights),
            reward_gap=masked_mean(q.abs(), both, pairs),
            margin=masked_mean(preferred, both, pairs),
            accuracy=masked_mean(preferred > 0, both, pairs),
            count=count,
        )
        return total, P3OStats(*(s.to(dtype) for s in stats))


def _clipped(slope: Tensor, x: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """``max(slope x, slope clip(x))``, and where the clip is what counts."""
    plain, clipped = slope * x, slope * x.clamp(low, high)
    return torch.maximum(plain, clipped), clipped > plain
