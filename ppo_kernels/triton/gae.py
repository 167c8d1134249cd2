"""Generalised advantage estimation: one program per row, a scan along time in each block of it.

A token maps g, what the later tokens contribute to it, to what it contributes to the token before:

    A_t = r_t - V_t + g,    R_t = A_t + V_t,    g' = gamma lam A_t + gamma V_t

and a token that is no transition leaves g as it is. A stretch of tokens is therefore one affine map (a, b), whatever
masked_steps says, and g is gamma * bootstrap_value after the last valid token. The maps are float64:
rounding gamma * lam to float32 alone costs 1e-5 where it is close to 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_kernels.triton._launch import (
    as_vector,
    block_for,
    launch,
    mask_bytes,
    new_tokens,
    require_code,
    require_like,
    row_sizes,
    token_rows,
)
from ppo_kernels.triton._math import last_valid, load_valid, row_span


@triton.jit
def _then(a1, b1, a2, b2):
    """The map (a1, b1) followed by (a2, b2)."""
    return a2 * a1, a2 * b1 + b2


@triton.jit
def _columns(x):
    """The four columns of [lanes, 4], each lane's registers."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _entering(a, b, entering, LANES: tl.constexpr):
    """g as it enters each token of a block and, in lane 0, the next block, from the tokens' maps [lanes, 4].

    Lanes run against time, as the scan does. Only lane 0, which holds the latest tokens, looks at ``entering``.
    """
    a0, a1, a2, a3 = _columns(a)
    b0, b1, b2, b3 = _columns(b)
    lane_a, lane_b = _then(a3, b3, a2, b2)
    lane_a, lane_b = _then(lane_a, lane_b, a1, b1)
    lane_a, lane_b = _then(lane_a, lane_b, a0, b0)
    lane = tl.arange(0, LANES)
    lane_b = tl.where(lane == 0, lane_a * entering + lane_b, lane_b)
    _, after = tl.associative_scan((lane_a, lane_b), 0, _then)
    after = tl.gather(after, (lane + LANES - 1) % LANES, 0)  # of the lane before; lane 0: of the last one
    g3 = tl.where(lane == 0, entering, after)
    g2 = a3 * g3 + b3
    g1 = a2 * g2 + b2
    g0 = a1 * g1 + b1
    return tl.reshape(tl.join(tl.join(g0, g2), tl.join(g1, g3)), [LANES, 4]), after


@triton.jit(do_not_specialize=("rewards_stride", "values_stride", "mask_stride", "outputs_stride", "length"))
def _gae_rows(
    rewards, values, mask, lam_rows, bootstrap_value, starts, advantages, returns,
    rewards_stride, values_stride, mask_stride, outputs_stride, length,
    gamma: tl.float64, lam: tl.float64,
    UNIT: tl.constexpr, MASKED_STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = 4 * LANES
    row = tl.program_id(0).to(tl.int64)
    first, length = row_span(starts, length, row, UNIT)
    rewards += first * rewards_stride
    values += first * values_stride
    advantages += first * outputs_stride
    returns += first * outputs_stride
    if mask is not None:
        mask += first * mask_stride
    # A tensor, because the interpreter would round a Python number to float32 in tl.where.
    gamma = tl.full([], gamma, tl.float64)
    gamma_lam = gamma * (lam if lam_rows is None else tl.load(lam_rows + row))
    last = last_valid(mask, length, BLOCK)
    blocks = ((last + BLOCK) // BLOCK).to(tl.int32)
    for begin in range(blocks.to(tl.int64) * BLOCK, length, BLOCK):
        t = begin + tl.arange(0, BLOCK)
        zero = tl.zeros([BLOCK], advantages.dtype.element_ty)
        tl.store(advantages + t, zero, mask=t < length)
        tl.store(returns + t, zero, mask=t < length)

    entering = tl.zeros([LANES], tl.float64)
    if bootstrap_value is not None:
        entering += gamma * tl.load(bootstrap_value + row).to(tl.float64)
    # The lanes of a block run against time, the four tokens of a lane with it, for 16-byte loads.
    within = (LANES - 1 - tl.arange(0, LANES))[:, None] * 4 + tl.arange(0, 4)[None, :]
    for i in range(0, blocks):
        t = (blocks - 1 - i).to(tl.int64) * BLOCK + within
        inside = t < length
        valid = load_valid(mask, t, inside)
        until_last = t <= last
        live = valid if MASKED_STEPS == 0 else until_last
        read = until_last if MASKED_STEPS == 2 else valid
        reward = tl.where(read, tl.load(rewards + t, mask=inside, other=0.0), 0.0).to(tl.float64)
        value = tl.where(read, tl.load(values + t, mask=inside, other=0.0), 0.0).to(tl.float64)
        gain = reward - value

        a = tl.where(live, gamma_lam, 1.0)
        b = tl.where(live, gamma_lam * gain + gamma * value, 0.0)
        g, entering = _entering(a, b, entering, LANES)
        advantage = gain + g
        tl.store(advantages + t, tl.where(valid, advantage, 0.0).to(advantages.dtype.element_ty), mask=inside)
        tl.store(returns + t, tl.where(valid, advantage + value, 0.0).to(returns.dtype.element_ty), mask=inside)


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    lam_rows: Tensor | None,
    bootstrap_value: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
    masked_steps: int,
) -> tuple[Tensor, Tensor]:
    require_code("masked_steps", masked_steps, 3)
    rows = token_rows(rewards, cu_seqlens)
    require_like("values", values, rewards)
    mask = mask_bytes(mask, rewards)
    advantages, returns = new_tokens(rewards, rows), new_tokens(rewards, rows)
    # Four tokens per lane; long blocks hide the latency of the scan. A block that followed the mean length of packed
    # rows would let the neighbours of a row change its rounding.
    lanes = block_for(rows.length, most=2048, least=128) // 4 if rows.starts is None else 256
    launch(
        _gae_rows, rows.batch,
        rewards=rewards, values=values, mask=mask, starts=rows.starts, advantages=advantages, returns=returns,
        lam_rows=as_vector("lam_rows", lam_rows, (rows.batch,), torch.float64),
        bootstrap_value=as_vector("bootstrap_value", bootstrap_value, (rows.batch,), rewards.dtype),
        **row_sizes(rows, rewards=rewards, values=values, mask=mask, outputs=advantages),
        gamma=gamma, lam=lam,
        MASKED_STEPS=masked_steps, LANES=lanes, num_warps=lanes // 32,
    )  # fmt: skip
    return advantages, returns
