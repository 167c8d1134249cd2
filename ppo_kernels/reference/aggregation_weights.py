"""How token losses become one number, eager."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kernels._rows import find_rows, row_sum, valid_tokens
from ppo_kernels._types import wide_dtype
from ppo_kernels.reference.group_advantages import runs


def aggregation_weights(
    mask: Tensor,
    mode: str = "token-mean",
    *,
    max_length: float | None = None,
    group_ids: Tensor | None = None,
    group_size: int | None = None,
    keep: Tensor | None = None,
    count: str = "original",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows = find_rows(mask, cu_seqlens)
    wide = wide_dtype(mask.device)  # a count beyond 2**24 is exact in float64
    valid = valid_tokens(mask, mask, rows)
    if keep is not None and count == "surviving":
        valid = valid & (keep != 0).reshape(-1)
    counts = row_sum(valid.to(wide), rows)
    weight = torch.ones_like(counts, dtype=torch.float32)
    if mode == "token-mean":
        return weight, counts.sum()
    if mode == "token-sum":
        return weight, torch.ones((), dtype=wide, device=mask.device)
    if mode == "prompt-mean":
        if group_ids is None:
            group_ids = torch.arange(counts.numel(), device=counts.device) // (group_size or 1)
        of_prompt, prompts = _of_groups(counts, group_ids)
        return torch.where(of_prompt > 0, 1.0 / of_prompt, 0.0).to(torch.float32), prompts
    if mode == "seq-mean-token-mean":
        weight = torch.where(counts > 0, 1.0 / counts, 0.0).to(torch.float32)
    elif mode == "seq-mean-token-sum-norm":
        weight = weight / (max(mask.size(1), 1) if max_length is None else max_length)
    return weight, (counts > 0).sum().to(wide)


def _of_groups(counts: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the tokens of its group, and how many groups have any."""
    ids, order = torch.sort(group_ids, stable=True)
    groups = runs(ids)
    totals = row_sum(counts[order], groups)
    out = torch.empty_like(counts)
    out[order] = totals[groups.row]
    return out, (totals > 0).sum().to(counts.dtype)
