"""Importance weights, eager."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppo_kernels._rows import (
    effective_share,
    find_rows,
    how_many,
    masked_mean,
    row_sum,
    select,
    spread,
    valid_tokens,
)
from ppo_kernels._types import ImportanceStats, compute_dtype
from ppo_kernels.reference.kl_rewards import clamp


def row_max(x: Tensor, row: Tensor, batch: int) -> Tensor:
    return x.new_zeros(batch).scatter_reduce(0, row, x, "amax") if batch else x.new_zeros(0)


@torch.no_grad()
def importance_weights(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    level: str = "token",
    mode: str = "truncate",
    bounds: tuple[float, float] = (0.0, math.inf),
    reject: str | None = None,
    reject_level: str = "token",
    reject_bounds: tuple[float, float] = (-math.inf, math.inf),
    log_ratio_clamp: float | None = 20.0,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, ImportanceStats]:
    dtype = compute_dtype(logprobs, rollout_logprobs)
    rows = find_rows(logprobs, cu_seqlens)
    valid = valid_tokens(logprobs, mask, rows)
    number = how_many(valid)
    logp, rollout = select(logprobs, valid, dtype), select(rollout_logprobs, valid, dtype)
    d = clamp(logp - rollout, log_ratio_clamp)
    own = d.exp()
    counts = row_sum(valid.to(number.dtype), rows).clamp(min=1.0)

    ratio = own
    if level != "token":
        of_row = row_sum(logp.to(number.dtype) - rollout.to(number.dtype), rows)
        of_row = (of_row / counts if level == "geometric" else of_row).to(dtype)
        ratio = spread(clamp(of_row, log_ratio_clamp).exp(), rows)
    low, high = bounds
    inside = (ratio >= low) & (ratio <= high)
    accepted = valid
    if reject is not None:
        estimate = {"k1": -d, "k2": 0.5 * d * d, "k3": torch.expm1(d) - d}[reject]
        if reject_level == "max":
            estimate = spread(row_max(estimate, rows.row, rows.batch), rows)
        elif reject_level != "token":
            of_row = row_sum(estimate.to(number.dtype), rows)
            estimate = spread((of_row / counts if reject_level == "mean" else of_row).to(dtype), rows)
        accepted = valid & (estimate >= reject_bounds[0]) & (estimate <= reject_bounds[1])
    keep = accepted & inside if mode == "mask" else accepted
    weights = ratio.clamp(min=low).clamp(max=high) if mode == "truncate" else torch.where(inside, ratio, 0.0)
    weights = torch.where(keep, weights, 0.0)

    excess = torch.expm1(d)
    stats = ImportanceStats(
        ess=effective_share(weights, number),
        kl_k1=masked_mean(-d, valid, number),
        kl_k3=masked_mean(torch.expm1(d) - d, valid, number),
        chi2=masked_mean(excess * (excess + 2.0), valid, number),
        perplexity=torch.where(number > 0, masked_mean(-logp, valid, number).exp(), 0.0),
        rollout_perplexity=torch.where(number > 0, masked_mean(-rollout, valid, number).exp(), 0.0),
        weight_mean=masked_mean(weights, valid, number),
        ratio_max=torch.cat([torch.where(valid, ratio, 0.0), ratio.new_zeros(1)]).max(),
        clipfrac_high=masked_mean(ratio > high, valid, number),
        clipfrac_low=masked_mean(ratio < low, valid, number),
        rejectfrac=masked_mean(~keep, valid, number),
        count=number,
    )
    shaped = weights.view(logprobs.shape), keep.view(logprobs.shape)
    return *shaped, ImportanceStats(*(s.to(dtype) for s in stats))
