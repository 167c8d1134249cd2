"""Advantages over the responses to one prompt, eager."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kernels._types import compute_dtype, wide_dtype
from ppo_kernels.reference.rows import Rows, row_sum


@torch.no_grad()
def group_advantages(scores: Tensor, group_ids: Tensor, *, mode: str = "rloo", eps: float = 1e-4) -> Tensor:
    ids, order = torch.sort(group_ids, stable=True)
    groups = runs(ids)
    # Differences to the group's first score: equal scores, whatever their size, have a deviation of exactly 0.
    wide = wide_dtype(scores.device)
    x = scores.to(wide)[order]
    x = x - x[groups.start.clamp(max=max(x.numel() - 1, 0))][groups.row]
    count = (groups.end - groups.start).to(wide)
    centred = x - (row_sum(x, groups) / count)[groups.row]
    if mode == "rloo":
        centred = centred * torch.where(count > 1, count / (count - 1), 1.0)[groups.row]
    elif mode == "grpo":
        variance = torch.where(count > 1, row_sum(centred.square(), groups) / (count - 1), 0.0)
        spread = variance.sqrt() + eps
        centred = centred * torch.where(spread == 0, 0.0, 1.0 / spread)[groups.row]
    out = torch.empty_like(centred)
    out[order] = centred
    return out.to(compute_dtype(scores))


def runs(ids: Tensor) -> Rows:
    """The runs of equal neighbours as packed rows: as many as there are elements, the last of them empty."""
    heads = torch.ones_like(ids, dtype=torch.bool)
    heads[1:] = ids[1:] != ids[:-1]
    row = heads.cumsum(0) - 1
    bounds = torch.searchsorted(row, torch.arange(ids.numel() + 1, device=ids.device))
    return Rows(row, torch.ones_like(heads), bounds[:-1], bounds[1:], None)
