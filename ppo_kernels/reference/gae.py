"""Generalised advantage estimation, eager."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kernels._rows import (
    find_rows,
    last_valid,
    select,
    spread,
    valid_tokens,
)
from ppo_kernels._types import compute_dtype, wide_dtype


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    masked_steps: str = "skip",
    bootstrap_value: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(rewards, values, bootstrap_value)
    rows = find_rows(rewards, cu_seqlens)
    valid = valid_tokens(rewards, mask, rows)
    tokens = valid.numel()
    if tokens == 0 or rows.batch == 0:
        return torch.zeros_like(rewards, dtype=dtype), torch.zeros_like(rewards, dtype=dtype)
    position = torch.arange(tokens, device=valid.device)
    until_last = rows.owned & (position <= spread(last_valid(valid, rows), rows))
    live = valid if masked_steps == "skip" else until_last
    read = until_last if masked_steps == "keep" else valid
    # A float32 carry misses the error bound at gamma * lam = 1 and large T.
    wide = wide_dtype(valid.device)
    r, v = select(rewards, read, wide), select(values, read, wide)
    boot = torch.zeros((), dtype=wide, device=v.device)
    if bootstrap_value is not None:
        boot = spread(bootstrap_value.to(wide), rows)
    lam_t = spread(lam.to(wide), rows) if isinstance(lam, Tensor) else torch.full_like(v, lam)

    following = _next_live(live)
    same_row = (following < tokens) & (rows.row[following.clamp(max=tokens - 1)] == rows.row)
    next_v = torch.where(same_row, v[following.clamp(max=tokens - 1)], boot)
    delta = torch.where(live, r + gamma * next_v - v, 0.0)
    decay = torch.where(live, gamma * lam_t, 1.0)
    # Its steps double, and a graph of them would be made anew for each power of two of the length: one calls the scan
    # that ops/gae.py registers.
    opaque = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    scan = torch.ops.ppo_kernels_traced.reverse_affine_scan if opaque else reverse_affine_scan
    adv = scan(decay, delta, rows.row, tokens if rows.length is None else rows.length)
    adv, ret = torch.where(valid, adv, 0.0), torch.where(valid, adv + v, 0.0)
    return adv.to(dtype).reshape(rewards.shape), ret.to(dtype).reshape(rewards.shape)


def _next_live(live: Tensor) -> Tensor:
    """Position of the first live token strictly after each token, or the number of tokens."""
    tokens = live.numel()
    position = torch.where(live, torch.arange(tokens, device=live.device), tokens)
    reach = position.flip(0).cummin(0).values.flip(0)
    return torch.cat([reach[1:], reach.new_full((1,), tokens)])


def reverse_affine_scan(a: Tensor, b: Tensor, row: Tensor, longest: int) -> Tensor:
    """``y_t = b_t + a_t y_{t+1}`` within each row, by doubling: log2(longest row) vectorised steps."""
    step, b = 1, b.clone()
    while step < longest:
        joined = row[step:] == row[:-step]
        b_next = torch.where(joined, a[:-step] * b[step:], 0.0)
        a_next = torch.where(joined, a[step:], 0.0)
        b = torch.cat([b[:-step] + b_next, b[-step:]])
        a = torch.cat([a[:-step] * a_next, a[-step:]])
        step *= 2
    return b
