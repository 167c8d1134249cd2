"""How token losses become one number, eager."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kernels._types import wide_dtype
from ppo_kernels.reference.rows import find_rows, row_sum, valid_tokens


def aggregation_weights(
    mask: Tensor, mode: str = "token-mean", *, max_length: float | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    rows = find_rows(mask, cu_seqlens)
    wide = wide_dtype(mask.device)  # a count beyond 2**24 is exact in float64
    counts = row_sum(valid_tokens(mask, mask, rows).to(wide), rows)
    weight = torch.ones_like(counts, dtype=torch.float32)
    if mode == "token-mean":
        return weight, counts.sum()
    if mode == "token-sum":
        return weight, torch.ones((), dtype=wide, device=mask.device)
    if mode == "seq-mean-token-mean":
        weight = torch.where(counts > 0, 1.0 / counts, 0.0).to(torch.float32)
    elif mode == "seq-mean-token-sum-norm":
        weight = weight / (max(mask.size(1), 1) if max_length is None else max_length)
    return weight, (counts > 0).sum().to(wide)
