"""Rows of tokens, padded or packed, and the masked reductions that the reference ops and the entropy bonus share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ppo_kernels._types import wide_dtype


class Rows(NamedTuple):
    """Which row each flattened token belongs to; ``owned`` is False for a token that no row claims."""

    row: Tensor  # [N] int64, clamped to [0, B)
    owned: Tensor  # [N] bool
    start: Tensor  # [B] int64, flat position of the first token
    end: Tensor  # [B] int64, one past the last token
    length: int | None  # of every row if padded, None if packed

    @property
    def batch(self) -> int:
        return self.start.numel()


def scalar(x: float | Tensor, like: Tensor) -> Tensor:
    """A coefficient in the dtype that it multiplies: one that rounds to 0 there is off, as in the kernels."""
    if not isinstance(x, Tensor):  # filled in: to copy it to a GPU would wait for that
        return torch.full((), x, dtype=wide_dtype(like.device), device=like.device).to(like.dtype)
    return x.detach().to(dtype=like.dtype, device=like.device).reshape(())


def scaled_or_off(coef: Tensor, term: Tensor) -> Tensor:
    """A coefficient of 0 switches its term off, be that infinite or NaN."""
    return torch.where(coef == 0, 0.0, coef * term)


def find_rows(x: Tensor, cu_seqlens: Tensor | None) -> Rows:
    if cu_seqlens is None:
        batch, length = x.shape
        row = torch.arange(batch, device=x.device).repeat_interleave(length)
        start = torch.arange(batch, device=x.device) * length
        return Rows(row, torch.ones_like(row, dtype=torch.bool), start, start + length, length)
    # Forced into order and into [0, N], so that no value can make two rows overlap or leave the tensor.
    bounds = cu_seqlens.to(torch.int64).clamp(0, x.numel()).cummax(0).values
    position = torch.arange(x.numel(), device=x.device)
    row = torch.searchsorted(bounds[1:].contiguous(), position, right=True)
    batch = cu_seqlens.numel() - 1
    owned = (row < batch) & (position >= bounds[0])
    return Rows(row.clamp(max=max(batch - 1, 0)), owned, bounds[:-1], bounds[1:], None)


def valid_tokens(x: Tensor, mask: Tensor | None, rows: Rows) -> Tensor:
    return rows.owned if mask is None else rows.owned & (mask != 0).reshape(-1)


def select(x: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(valid, x.reshape(-1).to(dtype), 0.0)


def spread(x: Tensor, rows: Rows) -> Tensor:
    """One value per row, ``[B]``, as one per token."""
    return x[rows.row] if rows.batch else x.new_zeros(rows.row.shape)


def per_token(x: Tensor, like: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """Flatten a token-level tensor, or spread a ``[B]`` or ``[B, 1]`` one over the tokens of its rows."""
    x, token_level = x.to(dtype), x.shape == like.shape
    return x.reshape(-1) if token_level else spread(x.reshape(-1), rows)


def row_sum(x: Tensor, rows: Rows) -> Tensor:
    """``[B]``: sums of a floating flat tensor over the tokens of each row, in an order that does not vary."""
    if rows.length is not None:
        return x.reshape(rows.batch, rows.length).sum(1)
    if rows.batch == 0:
        return x[:0]  # not fresh zeros: a loss over no rows is still differentiable
    if forward_ad._current_level >= 0:  # segment_reduce has no forward mode
        return x.new_zeros(rows.batch).index_add(0, rows.row, torch.where(rows.owned, x, 0.0))
    # The segments have to begin at token 0: what lies before the first row is one of its own.
    lengths = torch.cat([rows.start[:1], rows.end - rows.start])
    return torch.segment_reduce(x, "sum", lengths=lengths, unsafe=True, initial=0.0)[1:]


def last_valid(valid: Tensor, rows: Rows) -> Tensor:
    """``[B]``: flat position of each row's last valid token, -1 where it has none."""
    position = torch.where(valid, torch.arange(valid.numel(), device=valid.device), -1)
    if rows.length is not None:
        position = torch.nn.functional.pad(position.reshape(rows.batch, rows.length), (0, 1), value=-1)
        return position.amax(1)
    last = torch.full((rows.batch,), -1, dtype=torch.int64, device=valid.device)
    return last.scatter_reduce(0, rows.row, position, "amax") if rows.batch else last


def reduce_loss(
    loss: Tensor, valid: Tensor, rows: Rows, row_weight: Tensor | None, normalizer: float | Tensor | None
) -> tuple[Tensor, Tensor]:
    """``sum(valid * row_weight * loss) / normalizer`` (0 if the normalizer is 0), and the valid-token count."""
    count, wide = valid.sum(), wide_dtype(loss.device)
    if row_weight is not None:
        loss = loss * spread(row_weight.detach().to(loss.dtype), rows)
    total = torch.where(valid, loss, 0.0).sum().to(wide)
    scale = torch.as_tensor(count if normalizer is None else normalizer, dtype=wide, device=loss.device)
    empty = scale == 0  # selected on both sides: neither a NaN among the losses nor 1 / 0 may show
    quotient = torch.where(empty, 0.0, total) * torch.where(empty, 0.0, 1.0 / scale)
    return quotient.to(loss.dtype), count.to(loss.dtype)


def how_many(valid: Tensor) -> Tensor:
    """The number of valid elements, in the dtype that statistics are added up in."""
    return valid.sum().to(wide_dtype(valid.device))


def effective_share(weights: Tensor, number: Tensor) -> Tensor:
    """The effective sample size of weights, 0 where they do not count, over the ``number`` of those that do."""
    wide = weights.to(number.dtype)
    squares = wide.square().sum()
    return torch.where(squares == 0, 0.0, wide.sum().square() / squares / number.clamp(min=1.0))


def masked_mean(x: Tensor, valid: Tensor, number: Tensor) -> Tensor:
    """The mean over the valid elements, ``number`` of them; 0 if there are none."""
    total = torch.where(valid, x.to(number.dtype), 0.0).sum()
    return torch.where(number > 0, total / number, 0.0)
