"""Moments and whitening, eager."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ppo_kernels._types import compute_dtype, wide_dtype


@torch.no_grad()
def moments(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    valid = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
    wide = wide_dtype(x.device)
    count = valid.sum().to(wide)
    inverse = torch.where(count > 0, 1.0 / count, 0.0)
    mean = torch.where(valid, x.to(wide), 0.0).sum() * inverse
    m2 = torch.where(valid, x.to(wide) - mean, 0.0).square().sum()
    return count, mean, m2


def merge_moments(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of a union from those of its disjoint parts, folded in order (Chan, Golub, LeVeque, 1979)."""
    count, mean, m2 = parts[0]
    for n, mu, part_m2 in parts[1:]:
        total = count + n
        share = torch.where(total > 0, n / total, 0.0)
        step = torch.where(n > 0, mu - mean, 0.0)
        m2 = m2 + part_m2 + step * step * count * share
        mean = mean + step * share
        count = total
    return count, mean, m2


@torch.no_grad()
def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
    statistics: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    dtype = compute_dtype(x)
    count, mean, m2 = moments(x, mask) if statistics is None else statistics
    freedom = count - 1 if unbiased else count
    variance = torch.where(count > 1, m2 / freedom, 0.0)
    scale = torch.where(variance + eps == 0, 0.0, torch.rsqrt(variance + eps))
    valid = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
    y = torch.where(valid, x.to(mean.dtype) - mean, 0.0) * scale
    if not shift_mean:
        y = y + mean
    return torch.where(valid, y, 0.0).to(dtype)
