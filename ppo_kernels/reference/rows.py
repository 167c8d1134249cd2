"""Rows of tokens, padded or packed, and the masked reductions that every reference op shares."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Which row each flattened token belongs to; ``owned`` is False for a token that no row claims."""

    row: Tensor  # [N] int64, clamped to [0, B)
    owned: Tensor  # [N] bool
    count: int  # B
    longest: int  # an upper bound of the row length


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any of the tensors is float64, else float32."""
    return (
        torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    )


def find_rows(x: Tensor, cu_seqlens: Tensor | None) -> Rows:
    if cu_seqlens is None:
        batch, length = x.shape
        row = torch.arange(batch, device=x.device).repeat_interleave(length)
        return Rows(row, torch.ones_like(row, dtype=torch.bool), batch, length)
    tokens, batch = x.numel(), cu_seqlens.numel() - 1
    position = torch.arange(tokens, device=x.device)
    ends = cu_seqlens[1:].to(torch.int64).cummax(0).values
    row = torch.searchsorted(ends, position, right=True)
    owned = (row < batch) & (position >= cu_seqlens[0])
    return Rows(row.clamp(max=max(batch - 1, 0)), owned, batch, tokens)


def valid_tokens(x: Tensor, mask: Tensor | None, rows: Rows) -> Tensor:
    return rows.owned if mask is None else rows.owned & (mask != 0).reshape(-1)


def select(x: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(valid, x.reshape(-1).to(dtype), 0.0)


def per_token(x: Tensor, like: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """Flatten a token-level tensor, or spread a ``[B]`` or ``[B, 1]`` one over the tokens of its rows."""
    if x.shape == like.shape:
        return x.reshape(-1).to(dtype)
    return x.reshape(-1).to(dtype)[rows.row]


def row_sum(x: Tensor, rows: Rows) -> Tensor:
    return x.new_zeros(rows.count).index_add(0, rows.row, x)


def last_valid(valid: Tensor, rows: Rows) -> Tensor:
    """``[B]``: flat position of each row's last valid token, -1 where it has none."""
    position = torch.where(valid, torch.arange(valid.numel(), device=valid.device), -1)
    last = torch.full((rows.count,), -1, dtype=torch.int64, device=valid.device)
    return last.scatter_reduce(0, rows.row, position, "amax")


def first_owned(rows: Rows) -> Tensor:
    tokens = rows.row.numel()
    position = torch.where(rows.owned, torch.arange(tokens, device=rows.row.device), tokens)
    first = torch.full((rows.count,), tokens, dtype=torch.int64, device=rows.row.device)
    return first.scatter_reduce(0, rows.row, position, "amin")


def reduce_loss(
    loss: Tensor, valid: Tensor, rows: Rows, row_weight: Tensor | None, normalizer: float | Tensor | None
) -> tuple[Tensor, Tensor]:
    """``sum(valid * row_weight * loss) / normalizer`` (0 if the normalizer is 0), and the valid-token count."""
    count = valid.sum().to(loss.dtype)
    if row_weight is not None:
        loss = loss * row_weight.detach().to(loss.dtype)[rows.row]
    total = torch.where(valid, loss, 0.0).sum()
    scale = count if normalizer is None else torch.as_tensor(normalizer, dtype=loss.dtype, device=loss.device)
    return total * torch.where(scale == 0, 0.0, 1.0 / scale), count


def masked_mean(x: Tensor, valid: Tensor) -> Tensor:
    count = valid.sum().double()
    total = torch.where(valid, x.double(), 0.0).sum()
    return torch.where(count > 0, total / count, 0.0)
