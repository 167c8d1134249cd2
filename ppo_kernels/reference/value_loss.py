"""The clipped value loss, eager."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppo_kernels._rows import (
    find_rows,
    how_many,
    masked_mean,
    reduce_loss,
    select,
    valid_tokens,
)
from ppo_kernels._types import ValueStats, compute_dtype


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    cliprange_value: float | Tensor | None = 0.2,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ValueStats]:
    dtype = compute_dtype(values, old_values, returns)
    rows = find_rows(values, cu_seqlens)
    valid = valid_tokens(values, mask, rows)
    v, ret = select(values, valid, dtype), select(returns.detach(), valid, dtype)
    square = (v - ret).square()
    clipped_larger = torch.zeros_like(valid)
    if isinstance(cliprange_value, Tensor) or cliprange_value not in (None, math.inf):
        old = select(old_values.detach(), valid, dtype)
        if isinstance(cliprange_value, Tensor):  # of a traced graph, and may be infinite: then they are not read
            old = torch.where(cliprange_value == math.inf, 0.0, old)
        clipped = (torch.clamp(v, old - cliprange_value, old + cliprange_value) - ret).square()
        clipped_larger = clipped > square
        square = torch.maximum(square, clipped)
    total, count = reduce_loss(0.5 * square, valid, rows, row_weight, normalizer)

    with torch.no_grad():
        number = how_many(valid)
        target = ret.to(number.dtype)
        error = v.to(number.dtype) - target
        error_mean = masked_mean(error, valid, number)
        var_target = masked_mean((target - masked_mean(target, valid, number)).square(), valid, number)
        var_error = masked_mean((error - error_mean).square(), valid, number)
        stats = ValueStats(
            clipfrac=masked_mean(clipped_larger, valid, number),
            error_mean=error_mean,
            explained_variance=torch.where(var_target > 0, 1.0 - var_error / var_target, 0.0),
            count=count,
        )
        return total, ValueStats(*(s.to(dtype) for s in stats))
