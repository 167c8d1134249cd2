"""The clipped policy loss, eager."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kernels._types import PolicyStats, compute_dtype
from ppo_kernels.reference.kl_rewards import clamp, kl_estimate
from ppo_kernels.reference.rows import (
    find_rows,
    how_many,
    masked_mean,
    per_token,
    reduce_loss,
    scalar,
    select,
    valid_tokens,
)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cliprange: float | tuple[float, float] = 0.2,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = 20.0,
    weights: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float | Tensor = 0.0,
    kl_estimator: str = "k2",
    kl_log_clamp: float | None = 20.0,
    kl_clamp: float | None = None,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    dtype = compute_dtype(logprobs, old_logprobs, advantages, weights, ref_logprobs)
    low, high = cliprange if isinstance(cliprange, tuple) else (cliprange, cliprange)
    rows = find_rows(logprobs, cu_seqlens)
    valid = valid_tokens(logprobs, mask, rows)
    logp, old = select(logprobs, valid, dtype), select(old_logprobs.detach(), valid, dtype)
    adv = torch.where(valid, per_token(advantages.detach(), logprobs, rows, dtype), 0.0)

    log_ratio = logp - old
    d = clamp(log_ratio, log_ratio_clamp)
    ratio = d.exp()
    loss = torch.maximum(-adv * ratio, -adv * ratio.clamp(1.0 - low, 1.0 + high))
    dual = torch.zeros_like(valid)
    if dual_clip is not None:
        ceiling = -dual_clip * adv
        dual = (adv < 0) & (loss > ceiling)
        loss = torch.where(adv < 0, torch.minimum(loss, ceiling), loss)
    if weights is not None:
        loss = loss * torch.where(valid, per_token(weights.detach(), logprobs, rows, dtype), 0.0)
    ref_kl = torch.zeros_like(loss)
    if ref_logprobs is not None:
        ref = select(ref_logprobs.detach(), valid, dtype)
        coef = scalar(kl_coef, loss)
        ref_kl = kl_estimate(logp.detach(), ref, kl_estimator, kl_log_clamp, kl_clamp)
        # A coefficient of 0 is off: what it multiplies must be finite and have a finite gradient.
        x, y = torch.where(coef != 0, logp, 0.0), torch.where(coef != 0, ref, 0.0)
        loss = loss + coef * kl_estimate(x, y, kl_estimator, kl_log_clamp, kl_clamp)
    total, count = reduce_loss(loss, valid, rows, row_weight, normalizer)

    with torch.no_grad():
        number = how_many(valid)
        excess = ratio.to(number.dtype) - 1.0
        ratio_mean = masked_mean(excess, valid, number)
        stats = PolicyStats(
            approx_kl_k1=masked_mean(-d, valid, number),
            approx_kl_k2=masked_mean(0.5 * d * d, valid, number),
            approx_kl_k3=masked_mean(torch.expm1(d) - d, valid, number),
            ratio_mean=torch.where(count > 0, 1.0 + ratio_mean, 0.0),
            ratio_var=masked_mean((excess - ratio_mean).square(), valid, number),
            ratio_max=torch.cat([torch.where(valid, ratio, 0.0), ratio.new_zeros(1)]).max(),
            clipfrac_high=masked_mean((adv > 0) & (ratio > 1.0 + high), valid, number),
            clipfrac_low=masked_mean((adv < 0) & (ratio < 1.0 - low), valid, number),
            dual_clipfrac=masked_mean(dual, valid, number),
            ref_kl=masked_mean(ref_kl, valid, number),
            clamp_frac=masked_mean(
                torch.zeros_like(valid) if log_ratio_clamp is None else log_ratio.abs() > log_ratio_clamp,
                valid,
                number,
            ),
            count=count,
        )
        return total, PolicyStats(*(s.to(dtype) for s in stats))
