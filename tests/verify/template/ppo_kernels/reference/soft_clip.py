"""Soft clipping, eager."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def soft_clip(x: Tensor, mask: Tensor | None = None, *, cap: float = 5.0) -> Tensor:
    y = x / (1.0 + x.abs() / cap)
    return y if mask is None else torch.where(mask != 0, y, 0.0)
